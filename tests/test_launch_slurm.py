"""The sbatch script: what it asks Slurm for, what it runs, and whose exit code it believes."""

import os
import subprocess
from pathlib import Path

import pytest

from llm_jax.config import ConfigError
from llm_jax.launch import cli
from llm_jax.launch.config import SlurmResources
from llm_jax.launch.job import Job, read_job
from llm_jax.launch.slurm import NotSubmitted, render, submit
from tests.conftest import ROOT

CAUSAL, MOE = "configs/tiny_causal.py", "configs/tiny_moe.py"

# What `llm-jax launch slurm` was asked for each of the rendered examples.
EXAMPLES = {
    "llama3_8b.slurm.sh": ("configs/llama3_8b.py", "--resources", "launch/slurm_gpu.yaml"),
    "array.slurm.sh": (CAUSAL, MOE, "mesh.fsdp=4", "--resources", "launch/slurm_cpu.yaml"),
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def script(*configs: str, overrides: tuple[str, ...] = (), **resources: object) -> str:
    asked = SlurmResources.model_validate(resources)
    return render(read_job(configs or (CAUSAL,), overrides, asked), asked)


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_is_rendered(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["slurm", *EXAMPLES[name]]) == 0
    assert capsys.readouterr().out == (ROOT / "launch" / "examples" / name).read_text()


def test_every_example_is_held_to_that() -> None:
    assert {path.name for path in (ROOT / "launch" / "examples").glob("*.sh")} == set(EXAMPLES)


def test_what_is_asked_of_slurm() -> None:
    said = script(
        nodes=2, tasks_per_node=2, gpus_per_node=2, cpus_per_task=6, time="2-00:00:00", partition="a b", account="me",
        exclusive=True, options=("--constraint=h100&ib",), signal_seconds=240, log_dir="my logs/100%",
    )  # fmt: skip
    assert options(said) == [
        "--job-name=tiny_causal",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=6",
        "--gpus-per-node=2",
        "--time=2-00:00:00",
        "--partition='a b'",
        "--account=me",
        "--exclusive",
        "--constraint=h100&ib",
        "--output='my logs/100%%/tiny_causal-%j.out'",
        "--open-mode=append",
        "--requeue",
        "--signal=TERM@240",
    ]
    # Srun takes no cores over from sbatch.
    assert "srun --export=ALL --cpus-per-task=6 --label --kill-on-bad-exit=1 --wait=60" in said
    assert "JAX_LOCAL_DEVICE_IDS" not in said, "one device a process is what JAX gives it by itself"


def test_several_configs_are_an_array() -> None:
    said = script(CAUSAL, MOE, array_limit=1, coordinator_port=12000)
    assert "--array=0-1%1" in options(said)
    assert "--output=logs/tiny_causal-and-1-more-%A_%a.out" in options(said)
    assert f"  0) run=(train {CAUSAL}) ;;\n  1) run=(train {MOE}) ;;\n" in said
    assert "export JAX_COORDINATOR_PORT=$((12000 + SLURM_ARRAY_TASK_ID))" in said


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        ({"environment": {"A-B": "1"}}, "environment: 'A-B' is no variable's name"),
        ({"options": ("constraint=h100",)}, "options: 'constraint=h100' must begin with a dash, and be one line"),
        (
            {"gpus_per_node": 8, "tasks_per_node": 4, "nodes": 1},
            "gpus_per_node = 8, but tasks_per_node x devices_per_task = 4 x 1; every GPU that is asked for is used",
        ),
    ],
)
def test_mistakes_are_told_before_anything_queues(resources: dict, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        script(**resources)
    assert str(error.value) == told


def test_the_mesh_is_held_against_the_devices() -> None:
    with pytest.raises(ConfigError, match=r"not divisible by mesh\.data = 3"):
        script(nodes=3)


def test_where_there_is_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotSubmitted, match=r"^sbatch: No such file or directory; --submit is for"):
        submit("#!/bin/bash", SlurmResources())
    assert (tmp_path / "logs").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(NotSubmitted, match=r"^log_dir = file/logs: cannot be made: Not a"):
        submit("#!/bin/bash", SlurmResources(log_dir="file/logs"))


# In place of Slurm's commands: srun runs one process after the other, and tells the highest exit code as srun does.
COMMANDS = """\
srun() {
  local highest=0 code
  for ((SLURM_PROCID = 0; SLURM_PROCID < PROCESSES; SLURM_PROCID++)); do
    export SLURM_PROCID SLURM_LOCALID=$SLURM_PROCID
    "${@:5}" || { code=$?; ((code > highest)) && highest=$code; }
  done
  return $highest
}
scontrol() { echo "scontrol $*"; exit 0; }
"""


def run_script(said: str, folder: Path, ends: tuple[str, ...], **env: str) -> subprocess.CompletedProcess[str]:
    """The script, whose program ends as the shell text of each process says."""
    program = folder / "python"
    program.write_text(
        "#!/bin/bash\n"
        + "\n".join(["case $SLURM_PROCID in", *map("{0[0]}) {0[1]} ;;".format, enumerate(ends)), "esac"])
    )
    program.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    env = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "PROCESSES": str(len(ends))} | env
    return subprocess.run(
        ["bash"], input=COMMANDS + said, cwd=folder, env=env, capture_output=True, text=True, check=False
    )


ASKED = "kill -TERM $PPID"


@pytest.mark.parametrize(
    ("ends", "code", "again"),
    [
        (("exit 0", "exit 0"), 0, False),
        (("exit 75", "exit 75"), 75, True),
        (("exit 76", "exit 76"), 76, True),
        # Peers of the one that failed, aborted by JAX, or ended by srun and saved in time.
        *(((f"exit {code}", "exit 134"), code, False) for code in (1, 2, 3, 65, 70, 74, 127, 130)),
        *(((f"exit {code}", f"{ASKED}; exit 75"), code, False) for code in (1, 74, 127)),
        (("exit 1", f"{ASKED}; exit 139"), 1, False),
        (("exit 1", f"{ASKED}; exit 76"), 1, False),
        (("kill -9 $$", "exit 1"), 137, True),
        (("kill -SEGV $$", "exit 134"), 139, True),
        (("exit 76", "exit 1"), 76, True),
        (("exit 134", "exit 134"), 134, True),
        # What the program says is wrong is that, even where a peer was killed.
        (("exit 74", "kill -9 $$"), 74, False),
        # A save that fails on the way out.
        ((f"{ASKED}; exit 75", f"{ASKED}; exit 74"), 74, False),
        ((f"{ASKED}; exit 75", f"{ASKED}; exit 134"), 75, True),
        # SIGTERM before the program could heed it: nothing was there to save.
        ((f"{ASKED}; kill -TERM $$", f"{ASKED}; kill -TERM $$"), 75, True),
        # The shell was killed too, and has noted nothing.
        (("kill -9 $PPID $$", "exit 0"), 137, True),
        (("kill -9 $PPID $$", "exit 75"), 75, True),
    ],
)  # fmt: skip
def test_whose_exit_code_is_believed(tmp_path: Path, ends: tuple[str, ...], code: int, again: bool) -> None:
    done = run_script(script(), tmp_path, ends)
    assert ("scontrol requeue 7" in done.stdout) == again, done.stdout + done.stderr
    if again:
        assert f"exit code {code}: requeued" in done.stdout
    else:
        assert done.returncode == code
    assert (tmp_path / "logs").exists() and (tmp_path / "logs" / "tiny_causal-7").exists() == (code != 0)


def test_restarts_are_counted_over_attempts(tmp_path: Path) -> None:
    said = script(restarts=2)
    ends = (("exit 76", True), ("exit 75", True), ("kill -9 $$", True), ("exit 75", True), ("exit 76", False))
    for attempt, (end, again) in enumerate(ends):
        count = {"SLURM_RESTART_COUNT": str(attempt)} if attempt else {}
        done = run_script(said, tmp_path, (end,), **count)
        assert ("scontrol requeue" in done.stdout) == again, (attempt, done.stdout)
    assert done.returncode == 76
    # Another job of the same number, when Slurm counts from the start again, has all of its restarts.
    assert "restart 1 of 2" in run_script(said, tmp_path, ("exit 76",)).stdout


def test_arguments_environment_and_devices_arrive_as_they_are(tmp_path: Path) -> None:
    word = "a 'b' \"c\" $HOME `d` \\ *"
    job = Job(("my config.py",), (f"name={word}",), read_job([CAUSAL], [], SlurmResources()).runs)
    resources = SlurmResources(
        devices_per_task=4, environment={"WORD": word}, setup=("export PLACE=here", "cd /"), log_dir="my logs"
    )
    told = """printf '%s|' "$@" "$WORD" "$PLACE" "$JAX_LOCAL_DEVICE_IDS"; exit 3"""
    done = run_script(render(job, resources), tmp_path, (told, told))
    arguments = f"-m|llm_jax|train|my config.py|name={word}|{word}|here|"
    assert f"{arguments}0,1,2,3|{arguments}4,5,6,7|" in done.stdout, done.stderr
    assert (tmp_path / "my logs" / "tiny_causal-7" / "attempt-0" / "1").read_text() == "10 3\n", "notes stay by the log"


def test_a_set_up_that_fails_ends_the_job(tmp_path: Path) -> None:
    done = run_script(script(setup=("false", "true")), tmp_path, ("echo trained",))
    assert done.returncode == 1 and "trained" not in done.stdout
