"""dev.py as a newcomer meets it, in a small project; only the installer, which needs a network, is stood in for."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

SETUP_CFG = """[options]
install_requires = jax
[options.extras_require]
test = pytest
plot = matplotlib
[tool:pytest]
testpaths = tests
"""

# Records what it is asked for, and makes an environment whose interpreter is this one.
UV = f"""#!{sys.executable}
import json, os, pathlib, sys, time
log = pathlib.Path(os.environ["LOG"])
with log.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "venv":
    folder = pathlib.Path(sys.argv[-1])
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to({sys.executable!r})
elif os.environ.get("INSTALLER") == "fails":
    sys.exit(7)
elif os.environ.get("INSTALLER") == "hangs":
    time.sleep(40)
"""

# What the environment runs: says what it was asked for and where, then ends as the environment says.
PROGRAM = """
import json, os, signal, sys, time
ends = json.loads(os.environ.get("ENDS", "{}")).get(sys.argv[1], 0)
with open(os.environ["LOG"], "a") as log:
    log.write(json.dumps({"pid": os.getpid(), "args": sys.argv[1:], "cwd": os.getcwd(),
                          "PYTHONDONTWRITEBYTECODE": os.environ.get("PYTHONDONTWRITEBYTECODE")}) + "\\n")
if ends == "waits":
    arrived, arrives = os.pipe()
    os.set_blocking(arrives, False)
    signal.set_wakeup_fd(arrives)  # a byte for each; a handler may be called once for two
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: None)
    signal.alarm(40)
    print("ready", flush=True)
    got = os.read(arrived, 1)
    time.sleep(0.3)
    os.write(arrives, b".")
    got += os.read(arrived, 9)
    sys.exit({b"\\x02.": 130, b"\\x0f.": 75}.get(got, 99))
if ends == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(ends)
"""


class Project:
    """A folder with dev.py in it, and a log of what was installed and run."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder, self.log = folder, path.parent / "log"
        self.started: list[subprocess.Popen[str]] = []
        self.environment = {
            "PATH": str(path),
            "LOG": str(self.log),
            "PYENV_ROOT": str(path.parent / "pyenv"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def popen(self, *args: str, before: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*before, sys.executable, str(self.folder / "dev.py"), *args],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.popen(*args, **environment)
        texts = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, *texts)

    def logged(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def calls(self) -> list[Any]:
        """What has been installed (lists) and run (dictionaries) since the last time this was asked."""
        lines = self.logged().splitlines()
        self.log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def installs(self) -> list[str]:
        """What was made and installed, in short: ["venv .venv", "."]."""
        return [
            f"venv {Path(call[-1]).name}" if call[0] == "venv" else call[-1]
            for call in self.calls()
            if isinstance(call, list)
        ]


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    folder, path = tmp_path / "project", tmp_path / "bin"
    (folder / "llm_jax").mkdir(parents=True)
    shutil.copy(ROOT / "dev.py", folder)
    (folder / "setup.cfg").write_text(SETUP_CFG)
    (folder / "pyproject.toml").write_text("[project]\n")
    (folder / "constraints.txt").write_text("jax==0.10.2\n")
    (folder / "llm_jax" / "__main__.py").write_text(PROGRAM)
    (folder / "pytest.py").write_text(PROGRAM)
    path.mkdir()
    (path / "uv").write_text(UV)
    (path / "uv").chmod(0o755)
    project = Project(folder, path)
    yield project
    for process in project.started:
        process.kill()
        process.communicate()


@pytest.fixture
def dev() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dev_under_test", ROOT / "dev.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_second_call_installs_nothing(project: Project) -> None:
    assert project.run("setup").returncode == 0
    assert project.installs() == ["venv .venv", "."]
    again = project.run("setup")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert project.installs() == []


def test_an_extra_is_added_to_the_same_environment_once(project: Project) -> None:
    project.run("setup")
    project.run("setup", "plot")
    project.run("test")
    project.run("setup", "plot")
    assert project.installs() == ["venv .venv", ".", ".[plot]", ".[plot,test]"]


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "a requirement": (lambda f: (f / "setup.cfg").write_text(SETUP_CFG.replace("= jax", "= jax flax")), True),
    "an extra's requirement": (lambda f: (f / "setup.cfg").write_text(SETUP_CFG.replace("= pytest", "= ruff")), True),
    "a pin": (lambda f: (f / "constraints.txt").write_text("jax==0.10.3\n"), True),
    "the build": (lambda f: (f / "pyproject.toml").write_text("[build-system]\n"), True),
    "pytest's options": (lambda f: (f / "setup.cfg").write_text(SETUP_CFG + "addopts = -ra\n"), False),
    "a comment": (lambda f: (f / "setup.cfg").write_text("# hello\n" + SETUP_CFG), False),
    "the interpreter is gone": (lambda f: (f / ".venv" / "bin" / "python").unlink(), True),
    "the environment is gone": (lambda f: shutil.rmtree(f / ".venv"), True),
}


@pytest.mark.parametrize(("change", "matters"), CHANGES.values(), ids=CHANGES)
def test_what_an_environment_is_made_from_decides_when_it_is_made_anew(
    project: Project, change: Callable[[Path], object], matters: bool
) -> None:
    project.run("setup")
    project.calls()
    change(project.folder)
    project.run("setup")
    assert project.installs() == (["venv .venv", "."] if matters else [])


def test_a_new_environment_has_the_extras_of_the_old_one(project: Project) -> None:
    project.run("setup", "plot")
    (project.folder / "constraints.txt").write_text("jax==0.10.3\n")
    project.calls()
    project.run("setup")
    assert project.installs() == ["venv .venv", ".[plot]"]


def test_a_copy_of_a_checkout_does_not_run_the_original(project: Project, tmp_path: Path) -> None:
    project.run("setup")
    project.calls()
    project.folder = Path(shutil.copytree(project.folder, tmp_path / "copy", symlinks=True))
    project.run("setup")
    assert project.installs() == ["venv .venv", "."]


def test_another_python_has_another_environment(dev: ModuleType, project: Project) -> None:
    versions = ("3.11.7 (main, gcc 12)", "3.11.8 (main, gcc 12)", "3.11.7 (main, gcc 13)")
    assert len({dev.fingerprint(project.folder, dev.Python("python", version)) for version in versions}) == 3


def test_an_installation_that_fails_is_not_taken_for_finished(project: Project) -> None:
    failed = project.run("setup", INSTALLER="fails")
    assert failed.returncode == 7
    assert "dev.py: the installation failed at: " in failed.stderr
    project.calls()
    assert project.run("setup").returncode == 0
    assert project.installs() == ["venv .venv", "."]


@pytest.mark.parametrize("finished", [[], ["setup"]], ids=["the first", "an addition"])
def test_an_installation_that_is_killed_is_not_taken_for_finished(project: Project, finished: list[str]) -> None:
    if finished:
        project.run(*finished)
    process = project.popen("setup", "plot", INSTALLER="hangs")
    wait_for(lambda: '".[plot]"' in project.logged())
    installer = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    process.kill()
    os.kill(installer, signal.SIGKILL)
    process.wait(60)
    project.calls()
    assert project.run("setup").returncode == 0
    assert project.installs() == ["venv .venv", ".[plot]"]


def test_ctrl_c_ends_an_installation_without_a_traceback(project: Project) -> None:
    process = project.popen("setup", INSTALLER="hangs")
    wait_for(lambda: '"."' in project.logged())
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"{project.folder / 'dev.py'}" not in stderr


def test_two_calls_at_once_install_once(project: Project) -> None:
    both = [project.popen("setup") for _ in range(2)]
    for process in both:
        process.communicate(timeout=60)
    assert [process.returncode for process in both] == [0, 0]
    assert project.installs() == ["venv .venv", "."]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_quickstart_is_three_programs(project: Project) -> None:
    done = project.run("quickstart", "train.steps=3", "run_dir=runs/mine")
    assert done.returncode == 0
    assert done.stdout == ""
    runs = [call for call in project.calls() if isinstance(call, dict)]
    assert [run["args"] for run in runs] == [
        ["train", "configs/quickstart.py", "train.steps=3", "run_dir=runs/mine"],
        ["eval", "runs/mine"],
        ["report", "runs/mine"],
    ]
    assert {run["cwd"] for run in runs} == {str(project.folder)}
    assert {run["PYTHONDONTWRITEBYTECODE"] for run in runs} == {None}
    assert len({run["pid"] for run in runs}) == 3
    *_, seconds = done.stderr.splitlines()
    assert [part.split()[0] for part in seconds.removeprefix("dev.py: seconds: ").split(", ")] == [
        "install",
        "train",
        "eval",
        "report",
    ]


def test_the_quickstarts_run_directory_is_its_configs(project: Project) -> None:
    project.run("quickstart")
    assert [call["args"] for call in project.calls() if isinstance(call, dict)] == [
        ["train", "configs/quickstart.py"],
        ["eval", "runs/quickstart"],
        ["report", "runs/quickstart"],
    ]


@pytest.mark.parametrize(
    ("verb", "code", "seen"),
    [("train", c, c) for c in (1, 3, 65, 75, 130)] + [("train", "dies", 137), ("eval", 74, 74)],
)
def test_the_quickstart_ends_with_the_first_failure_and_its_exit_code(
    project: Project, verb: str, code: int | str, seen: int
) -> None:
    assert project.run("quickstart", ENDS=json.dumps({verb: code})).returncode == seen
    verbs = [call["args"][0] for call in project.calls() if isinstance(call, dict)]
    assert verbs == ["train", "eval", "report"][: ["train", "eval"].index(verb) + 1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to dev.py", "to its group"])
def test_a_signal_reaches_the_program_once_and_its_exit_code_comes_back(
    project: Project, number: signal.Signals, code: int, send: Callable[[int, int], None]
) -> None:
    process = project.popen("quickstart", ENDS=json.dumps({"train": "waits"}))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    send(process.pid, number)
    assert process.wait(60) == code
    assert [call["args"][0] for call in project.calls() if isinstance(call, dict)] == ["train"]


IGNORE_HANGUP = (
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
)


def test_a_signal_that_is_ignored_stays_ignored(project: Project) -> None:
    """As with nohup: whoever ignores SIGHUP is not stopped by it, nor is the program."""
    process = project.popen(
        "quickstart", before=[sys.executable, "-c", IGNORE_HANGUP], ENDS=json.dumps({"train": "waits"})
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_test_becomes_pytest(project: Project) -> None:
    process = project.popen("test", "-k", "mesh", ENDS=json.dumps({"--dist": 5}))
    process.communicate(timeout=60)
    assert process.returncode == 5
    (run,) = [call for call in project.calls() if isinstance(call, dict)]
    assert run["pid"] == process.pid
    cores = str(min(len(os.sched_getaffinity(0)), 8))
    assert run["args"] == ["--dist", "loadfile", "--no-loadscope-reorder", "-n", cores, "-m", "not slow", "-k", "mesh"]


def second_python(project: Project, answers: str) -> str:
    """Puts another Python of the other side of 3.12 where pyenv would; its minor version."""
    minor = "12" if sys.version_info < (3, 12) else "11"
    path = Path(project.environment["PYENV_ROOT"]) / "versions" / f"3.{minor}.9" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{answers.format(minor=minor)}\n")
    path.chmod(0o755)
    return minor


def test_all_is_everything_and_then_the_ordinary_tests_on_another_python(project: Project) -> None:
    minor = second_python(project, "echo '3.{minor}.9 (main)'")
    done = project.run("test", "--all", "-x")
    assert done.returncode == 0
    calls = project.calls()
    assert [call["args"][5:] for call in calls if isinstance(call, dict)] == [
        ["-m", "not whole", "-x"],
        ["-m", "not slow", "-x"],
    ]
    venvs = [call for call in calls if isinstance(call, list) and call[0] == "venv"]
    assert [Path(call[-1]).name for call in venvs] == [".venv", f".venv-3.{minor}"]
    assert venvs[1][venvs[1].index("--python") + 1].endswith(f"3.{minor}.9/bin/python")


def test_a_signal_ends_all_of_all(project: Project) -> None:
    second_python(project, "echo '3.{minor}.9 (main)'")
    process = project.popen("test", "--all", ENDS=json.dumps({"--dist": "waits"}))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert len([call for call in project.calls() if isinstance(call, dict)]) == 1


def test_without_another_python_all_says_so(project: Project) -> None:
    second_python(project, "echo not found >&2; exit 127")  # a shim with nothing behind it
    done = project.run("test", "--all", ENDS=json.dumps({"--dist": 1}))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("dev.py: no second Python: none of 3.1")
    assert len([call for call in project.calls() if isinstance(call, dict)]) == 1


def test_a_failure_on_either_python_is_a_failure(project: Project) -> None:
    minor = second_python(project, "echo '3.{minor}.9 (main)'")
    assert project.run("setup", "test").returncode == 0
    # Where the second environment's own pytest fails, the first one's success does not hide it.
    program = (project.folder / "pytest.py").read_text()
    (project.folder / "pytest.py").write_text(
        program.replace("sys.exit(ends)", "sys.exit(5 * ('not slow' in sys.argv))")
    )
    assert project.run("test", "--all").returncode == 5
    assert (project.folder / f".venv-3.{minor}").is_dir()


def test_lint_runs_all_three_and_returns_the_first_failure(project: Project) -> None:
    project.run("setup", "test")
    for name, code in (("ruff", 3), ("basedpyright", 4)):
        tool = project.folder / ".venv" / "bin" / name
        tool.write_text(f"#!/bin/sh\necho {name} $1\nexit {code}\n")
        tool.chmod(0o755)
    done = project.run("lint")
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["ruff check", "ruff format", "basedpyright --pythonpath"]


HELP = """\
Makes .venv once, pinned by constraints.txt, then runs a task in it. Needs Python 3.11 or newer, and pip or uv.

python3 dev.py quickstart [path=value ...]    train, evaluate and report on configs/quickstart.py
python3 dev.py test [--all] [pytest's ...]    the tests without the slow ones; --all: all, and on a second Python
python3 dev.py test -m whole                  the rest of the long proofs, of which --all runs a sample
python3 dev.py lint                           ruff and the type checker
python3 dev.py setup [extra ...]              only make the environment, with extras of setup.cfg
"""


@pytest.mark.parametrize(
    ("args", "code", "stdout", "stderr"),
    [
        (["--help"], 0, HELP, ""),
        ([], 2, HELP, ""),
        (["tset"], 2, "", "dev.py: no such task: tset; there are quickstart, test, lint, setup\n"),
        (["setup", "tup"], 2, "", "dev.py: no such extra: tup; there are plot, test\n"),
        (["lint", "--fix"], 2, "", "dev.py: lint takes no arguments, and not --fix\n"),
        (["quickstart", "fast"], 2, "", "dev.py: quickstart takes path=value, such as train.steps=100, and not fast\n"),
    ],
)
def test_what_it_says_of_itself(project: Project, args: list[str], code: int, stdout: str, stderr: str) -> None:
    done = project.run(*args)
    assert (done.returncode, done.stdout, done.stderr) == (code, stdout, stderr)
    assert project.calls() == []


def test_a_python_that_is_too_old_is_told_so(project: Project) -> None:
    source = (project.folder / "dev.py").read_text()
    ast.parse(source, feature_version=(3, 7))
    (project.folder / "dev.py").write_text(
        source.replace("OLDEST_MINOR, NEWEST_MINOR = 11, 14", "OLDEST_MINOR, NEWEST_MINOR = 90, 90")
    )
    done = project.run("setup")
    assert done.returncode == 2
    assert done.stderr == f"dev.py: Python 3.90 or newer is needed, and this is {sys.version.split()[0]}\n"


def script(folder: Path, name: str, text: str) -> str:
    folder.joinpath(name).write_text(f"#!/bin/sh\n{text}\n")
    folder.joinpath(name).chmod(0o755)
    return str(folder / name)


def test_without_ensurepip_the_environment_is_made_without_pip_and_filled_from_outside(
    dev: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = script(tmp_path, "full", "exit 0")
    debian = script(tmp_path, "debian", 'case "$2" in *ensurepip*) exit 1;; esac')
    bare = script(tmp_path, "bare", "exit 1")
    folder = tmp_path / ".venv"
    assert dev.make_command(folder, dev.Python(full, "3.11"), None) == [full, "-m", "venv", str(folder)]
    assert dev.install_command(full, dev.Python(full, "3.11"), None)[:4] == [full, "-m", "pip", "install"]
    assert dev.make_command(folder, dev.Python(debian, "3.11"), None)[3:] == ["--without-pip", str(folder)]
    assert dev.install_command(bare, dev.Python(debian, "3.11"), None)[:6] == [
        debian,
        "-m",
        "pip",
        "--python",
        bare,
        "install",
    ]
    with pytest.raises(SystemExit):
        dev.install_command(bare, dev.Python(bare, "3.11"), None)
    assert "has neither ensurepip nor pip; install one of python3-venv, pip and uv" in capsys.readouterr().err


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with dev.py and what it has installed: this one, where the tests run in its environment; else a copy."""
    if Path(sys.prefix) == ROOT / ".venv" and (ROOT / ".venv" / "stamp").exists():
        return ROOT
    folder = tmp_path / "clone"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    shutil.copytree(ROOT / "llm_jax", folder / "llm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, str(folder / "dev.py"), "setup"]
    subprocess.run(command, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, check=True)
    return folder


@pytest.mark.slow
def test_a_real_installation_is_whole_pinned_and_compiled(installed: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, str(installed / "dev.py"), "setup"], capture_output=True, check=True)
    assert time.monotonic() - start < 5 and not done.stderr

    inside = installed / ".venv" / "bin" / "python"
    listed = "from importlib.metadata import distributions\nfor d in distributions(): print(d.name, d.version)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    output = subprocess.run([inside, "-c", listed], env=environment, capture_output=True, text=True, check=True).stdout
    found = {tuple(line.lower().replace("_", "-").split()) for line in output.splitlines()} - {("llm-jax", "0.1.0")}
    pins = {tuple(line.partition(" ;")[0].split("==")) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {pair for pair in found if pair[0] not in ("pip", "setuptools")} <= pins
    assert {"jax", "flax", "grain", "sentencepiece"} <= {name for name, _ in found}
    site = next(installed.glob(".venv/lib/python*/site-packages"))
    # Most of its modules are never imported.
    assert len(list(site.glob("jax/**/*.pyc"))) == len(list(site.glob("jax/**/*.py")))
    shown = subprocess.run(
        [installed / ".venv" / "bin" / "llm-jax", "--help"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train" in shown.stdout


def test_the_pins_name_no_registry_and_both_lines_of_jax() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    assert "@" not in text
    assert "jax==0.10.2 ; python_full_version < '3.12'\njax==0.12" in text


def test_the_pinned_libtpu_is_the_one_that_jax_asks_for() -> None:
    """Beside another the 8B does not compile. Of the two pins the one for this Python, as its JAX is."""
    (asked,) = (line for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu"))
    pins = (Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines())
    linux = {"sys_platform": "linux", "platform_machine": "x86_64"}
    (pin,) = (one for one in pins if one.name == "libtpu" and one.marker and one.marker.evaluate(linux))
    (version,) = pin.specifier
    assert Requirement(asked).specifier.contains(version.version)
