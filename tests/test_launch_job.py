"""What a launch checks before anything starts: files of resources, meshes against devices; and what is printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.config import ConfigError
from llm_jax.launch.config import JobSetResources, LocalResources, SlurmResources
from llm_jax.launch.job import as_exit_code, check_fit, read_job, read_resources, tell
from llm_jax.run import Run
from llm_jax.train.config import MeshConfig
from tests.conftest import ROOT

TINY = "configs/tiny_causal.py"
LOCAL = ("--resources", "launch/local.yaml")

IMPORTED = """
import sys
from llm_jax.__main__ import main
code = main(sys.argv[1:])
print(sorted({"jax", "optax", "flax", "numpy"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def launch(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`llm-jax launch`, which says last on stderr what it imported of the things that take long."""
    command = [sys.executable, "-c", IMPORTED, "launch", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


# Files of resources.


def read(tmp_path: Path, text: str) -> LocalResources:
    (tmp_path / "x.yaml").write_text(text)
    return read_resources(str(tmp_path / "x.yaml"), LocalResources)


@pytest.mark.parametrize(
    ("text", "processes", "environment"),
    [
        ("", 2, {}),
        ("# nothing but a comment\n", 2, {}),
        ("processes: 3\nenvironment: {A: b}\n", 3, {"A": "b"}),
        # What YAML would take for a number of seconds, a date, or false.
        (
            "environment:\n  A: 24:00:00\n  B: 2024-01-01\n  NO: no\n  D: on\n  E: 010\n",
            2,
            {"A": "24:00:00", "B": "2024-01-01", "NO": "no", "D": "on", "E": "010"},
        ),
    ],
)
def test_what_a_file_says(tmp_path: Path, text: str, processes: int, environment: dict[str, str]) -> None:
    assert read(tmp_path, text) == LocalResources(processes=processes, environment=environment)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("proceses: 3\n", ": proceses: no such field; did you mean processes?"),
        ("processes: 0\n", ": processes = 0: must be at least 1"),
        ("processes: two\n", ": processes = 'two': must be a whole number"),
        ("processes: 2.0\n", ": processes = 2.0: must be a whole number"),
        ("processes: 2024-01-01\n", ": processes = '2024-01-01': must be a whole number"),
        ("grace_seconds: .inf\n", ": grace_seconds = '.inf': must be a number"),
        ("environment: {A: 1}\n", ": environment.A = 1: must be text"),
        ("environment: A=1\n", ": environment = 'A=1': must be a mapping of names to text"),
        (
            "- processes\n- devices\n",
            """: says ["processes", "devices"]; it must say `field: value`, one field a line""",
        ),
        ("processes\n", ": says 'processes'; it must say `field: value`, one field a line"),
        ("environment:\n  1: a\n", ", line 2: a key has to be text, in quotes if YAML takes it for something else"),
        ("environment:\n  [a, b]: c\n", ", line 2: a key has to be text, in quotes"),
        ("processes: 2\ndevices: 3\nprocesses: 4\n", ", line 3: processes is given twice"),
        ("processes: 2\n devices: 3\n", ", line 2: mapping values are not allowed here"),
        ("processes: [2\n", ", line 2: expected ',' or ']', but got '<stream end>'"),
        ("processes: *two\n", ", line 1: found undefined alias 'two'"),
        (
            "processes: !!binary aGk=\n",
            ": is not YAML that stands for JSON: Object of type bytes is not JSON serializable",
        ),
        (
            "environment: &all\n  A: *all\n",
            ": is not YAML that stands for JSON: Circular reference detected",
        ),
        ("processes: !!python/object:os.system {}\n", ", line 1: could not determine a constructor for the tag "),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_a_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    (line,) = error.value.lines
    assert line.startswith(f"{tmp_path / 'x.yaml'}{told}"), line


def test_every_mistake_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, "proceses: 3\ndevices: 0\nrestarts: -1\n")
    assert len(error.value.lines) == 3 and all(str(tmp_path / "x.yaml") in line for line in error.value.lines)


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "local.yaml").write_text("")
    (tmp_path / "noise.yaml").write_bytes(b"\xff\xfe\xff")
    for name, told in {
        "locale.yaml": f": no such file; did you mean {tmp_path / 'local.yaml'}?",
        "quite-different": ": no such file",
        "": ": cannot be read: Is a directory",
        "noise.yaml": ": is not YAML that stands for JSON: ",
    }.items():
        path = str(tmp_path / name) if name else str(tmp_path)
        with pytest.raises(ConfigError) as error:
            read_resources(path, LocalResources)
        assert error.value.lines[0].startswith(path + told), error.value


def test_the_files_that_are_shipped_can_be_read() -> None:
    kinds = {"local": LocalResources, "slurm": SlurmResources, "jobset": JobSetResources}
    files = sorted((ROOT / "launch").glob("*.yaml"))
    assert files
    for file in files:
        read_resources(str(file), kinds[file.stem.partition("_")[0]])


# The mesh against the devices.


@pytest.mark.parametrize(
    "resources",
    [
        LocalResources(processes=2, devices=4),
        SlurmResources(nodes=2, tasks_per_node=2, devices_per_task=2),
        JobSetResources(image="x", slices=2, hosts=2, devices_per_host=2),
    ],
)
def test_a_mesh_is_made_of_exactly_the_devices(resources: LocalResources | SlurmResources | JobSetResources) -> None:
    for mesh in (MeshConfig(), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, tensor=4), MeshConfig(data=1, context=8)):
        check_fit(Run(mesh=mesh), resources)
    for mesh, told in (
        (MeshConfig(data=1, fsdp=16), "mesh needs 16 devices (fsdp 16), and there are 8"),
        (MeshConfig(fsdp=3), "mesh.data = -1: 8 devices are not divisible by the other axes' 3"),
        (MeshConfig(data=4), "the mesh uses 4 of 8 devices; with several processes it uses all"),
    ):
        run = Run(mesh=mesh)
        with pytest.raises(ConfigError) as error:
            check_fit(run, resources)
        assert str(error.value) == told


def test_one_process_may_leave_devices_unused() -> None:
    check_fit(Run(mesh=MeshConfig(data=4)), LocalResources(processes=1, devices=8))


def test_every_config_is_checked_and_has_a_directory_of_its_own() -> None:
    resources = SlurmResources(nodes=1, devices_per_task=8)
    with pytest.raises(ConfigError) as error:
        read_job([TINY, "configs/tiny_moe.py"], ["mesh.data=16"], resources)
    assert [line.partition(": ")[0] for line in error.value.lines] == [TINY, "configs/tiny_moe.py"]
    with pytest.raises(ConfigError, match="run_dir = a is another config's too"):
        read_job([TINY, "configs/tiny_moe.py"], ["run_dir=a"], resources)
    job = read_job([TINY, "configs/tiny_moe.py"], ["seed=3"], resources)
    assert job.command(1) == ["train", "configs/tiny_moe.py", "seed=3"]
    assert [run.seed for run in job.runs] == [3, 3]


# Exit codes in words.


@pytest.mark.parametrize(
    ("returncode", "told"),
    [
        (0, "exit code 0 (done)"),
        (76, "exit code 76 (no progress: restart)"),
        (-9, "exit code 137 (killed by SIGKILL)"),
        (-2, "exit code 130 (interrupted by Ctrl-C)"),
        (-40, "exit code 168 (killed by signal 40)"),
        (5, "exit code 5 (not one of llm-jax's)"),
        (255, "exit code 255 (not one of llm-jax's)"),
    ],
)
def test_an_exit_code_in_words(returncode: int, told: str) -> None:
    assert tell(as_exit_code(returncode)) == told


# The verb.


def test_a_job_is_printed_without_jax() -> None:
    done = launch("local", TINY, "seed=3", *LOCAL)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.count("-m llm_jax train configs/tiny_causal.py seed=3 &\n") == 2
    assert done.stdout.endswith("wait\n") and "JAX_PROCESS_ID=1 JAX_NUM_CPU_DEVICES=4 " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["local", TINY, "mesh.tensor=3", *LOCAL], "model.d_ff = 176 is not divisible by mesh.tensor = 3\n"),
        (
            ["local", TINY, "mesh.data=1", "mesh.fsdp=16", *LOCAL],
            f"{TINY}: mesh needs 16 devices (fsdp 16), and there are 8\n",
        ),
        (
            ["local", TINY, "mesh.data=1", "--submit", *LOCAL],
            f"{TINY}: the mesh uses 1 of 8 devices; with several processes it uses all\n",
        ),
        (["local", TINY, "seed=x", *LOCAL], "seed = 'x': must be a whole number\n"),
        (
            ["local", TINY, "configs/tiny_moe.py", *LOCAL],
            "llm-jax launch: local takes one config; several make an array, which only slurm has; "
            "llm-jax launch --help shows how it is used\n",
        ),
        (["local", "seed=3", *LOCAL], "llm-jax launch: no config file; llm-jax launch --help shows how it is used\n"),
        (
            ["local", TINY, "--resources", "launch/locl.yaml"],
            "launch/locl.yaml: no such file; did you mean launch/local.yaml?\n",
        ),
        (["local", TINY, "--submti", *LOCAL], "llm-jax launch: --submti: no such option; did you mean --submit?\n"),
        (
            ["local", TINY],
            "llm-jax launch: the following arguments are required: --resources; "
            "llm-jax launch --help shows how it is used\n",
        ),
    ],
)
def test_mistakes_are_lines_on_stderr_before_anything_starts(arguments: list[str], told: str) -> None:
    done = launch(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told + "[]\n")


def test_what_the_readme_says_of_an_unknown_field(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "mine.yaml").write_text("proceses: 2\n")
    done = launch("local", str(ROOT / TINY), "--resources", "launch/mine.yaml", cwd=tmp_path)
    line = "launch/mine.yaml: proceses: no such field; did you mean processes?"
    assert done.stderr.splitlines()[0] == line
    assert f"`{line}`" in (ROOT / "launch" / "README.md").read_text()


def test_help() -> None:
    done = launch("--help")
    assert done.stdout.startswith("usage: llm-jax launch ") and "--submit" in done.stdout
    assert done.stderr == "" and done.returncode == 0
