"""Makes .venv once, pinned by constraints.txt, then runs a task in it. Needs Python 3.11 or newer, and pip or uv.

python3 dev.py quickstart [path=value ...]    train, evaluate and report on configs/quickstart.py
python3 dev.py test [--all] [pytest's ...]    the tests without the slow ones; --all: all, and on a second Python
python3 dev.py test -m whole                  the rest of the long proofs, of which --all runs a sample
python3 dev.py lint                           ruff and the type checker
python3 dev.py setup [extra ...]              only make the environment, with extras of setup.cfg
"""

# Standard library only, and no syntax newer than Python 3.7, so that an old interpreter can say that it is too old.
from __future__ import annotations

import configparser
import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Iterator, NamedTuple, NoReturn

ROOT = pathlib.Path(__file__).resolve().parent
OLDEST_MINOR, NEWEST_MINOR = 11, 14
CONFIG, RUN_DIR = "configs/quickstart.py", "runs/quickstart"
# The suite's workers share compiled programs within a test file, so a file stays with one worker; files come in the
# order of tests/conftest.py, the longest first, and not in that of their numbers of tests.
PYTEST = ["-m", "pytest", "--dist", "loadfile", "--no-loadscope-reorder", "-n"]
HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Python(NamedTuple):
    """An interpreter: its path, and its sys.version."""

    path: str
    version: str

    @property
    def minor(self) -> int:
        """11 for Python 3.11."""
        return int(self.version.split(".")[1])


HERE = Python(sys.executable, sys.version)


def main(args: list[str]) -> int:
    """Runs the task that the arguments name and returns its exit code."""
    tasks = {"quickstart": quickstart, "test": test, "lint": lint, "setup": setup}
    if not args or args[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if args else 2
    if args[0] not in tasks:
        stop("no such task: {}; there are {}".format(args[0], ", ".join(tasks)))
    if sys.version_info < (3, OLDEST_MINOR):
        newer = find_pythons(range(OLDEST_MINOR, NEWEST_MINOR + 1))
        hint = f"; try: {newer[0].path} dev.py {' '.join(args)}" if newer else ""
        stop(f"Python 3.{OLDEST_MINOR} or newer is needed, and this is {sys.version.split()[0]}{hint}")
    os.chdir(str(ROOT))
    return tasks[args[0]](args[1:])


def setup(extras: list[str]) -> int:
    """Makes the environment with the core and the named extras."""
    known = set(sections(ROOT)["options.extras_require"])
    unknown = [extra for extra in extras if extra not in known]
    if unknown:
        stop(f"no such extra: {unknown[0]}; there are {', '.join(sorted(known))}")
    environment(".venv", HERE, extras)
    return 0


def quickstart(overrides: list[str]) -> int:
    """Trains, evaluates and reports, each by a program of its own; says on stderr how long each took."""
    for arg in overrides:
        if "=" not in arg:
            stop(f"quickstart takes path=value, such as train.steps=100, and not {arg}")
    run_dir = [RUN_DIR, *(arg[len("run_dir=") :] for arg in overrides if arg.startswith("run_dir="))][-1]
    seconds = {}

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        seconds[phase] = time.monotonic() - start

    with timed("install"):
        python = environment(".venv", HERE, [])
    for verb in (["train", CONFIG, *overrides], ["eval", run_dir], ["report", run_dir]):
        with timed(verb[0]):
            code = run([python, "-m", "llm_jax", *verb])
        if code:
            return code
    say("seconds: " + ", ".join(f"{phase} {took:.0f}" for phase, took in seconds.items()))
    return 0


def test(args: list[str]) -> int:
    """Runs pytest; with --all the slow tests too, and then the ordinary ones on another Python, where there is one."""
    everything = "--all" in args
    rest = [arg for arg in args if arg != "--all"]
    # The slow tests compile for TPUs too, and run lm-evaluation-harness.
    python = environment(".venv", HERE, ["test", "tpu", "eval"] if everything else ["test"])
    suite = [*PYTEST, str(min(cores(), 8))]
    ordinary = [*suite, "-m", "not slow", *rest]
    if not everything:
        execute([python, *ordinary])
    code = run([python, *suite, "-m", "not whole", *rest])
    # Between Python 3.11 and 3.12 the newest JAX that can be installed changes: the second is on the other side.
    minors = range(12, NEWEST_MINOR + 1) if HERE.minor == 11 else range(11, 12)
    others = find_pythons(minors)
    if not others:
        say("no second Python: none of {} was found".format(", ".join(f"3.{minor}" for minor in minors)))
        return code
    other = environment(f".venv-3.{others[0].minor}", others[0], ["test"])
    say(f"the tests without the slow ones on Python {others[0].version.split()[0]}")
    other_code = run([other, *ordinary])
    return code or other_code


def lint(args: list[str]) -> int:
    """Runs the linter, the formatter's check and the type checker, all three; returns the first failure."""
    if args:
        stop(f"lint takes no arguments, and not {args[0]}")
    python = environment(".venv", HERE, ["test"])
    ruff, checker = (str(pathlib.Path(python).with_name(name)) for name in ("ruff", "basedpyright"))
    codes = [run([ruff, "check"]), run([ruff, "format", "--check"]), run([checker, "--pythonpath", python])]
    return next((code for code in codes if code), 0)


def environment(name: str, python: Python, extras: list[str]) -> str:
    """The interpreter of the named environment, which is made or completed first if its stamp says that it must be."""
    folder = ROOT / name
    inside = folder / "bin" / "python"
    want = fingerprint(ROOT, python)

    def missing() -> bool:
        made_of, installed = read_stamp(folder)
        return made_of != want or not set(extras) <= set(installed) or not inside.exists()

    if missing():
        # Of two calls at once the second waits here, and then finds the work done.
        with open(str(folder) + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if missing():
                install(folder, python, want, extras)
    return str(inside)


def install(folder: pathlib.Path, python: Python, want: str, extras: list[str]) -> None:
    """Installs the project and its extras; the stamp that vouches for it is taken off first and put back last."""
    start = time.monotonic()
    made_of, installed = read_stamp(folder)
    extras = sorted({*extras, *installed})
    uv, inside = shutil.which("uv"), str(folder / "bin" / "python")
    tool, number = "uv" if uv else "pip", python.version.split()[0]
    say(f"installing {project(extras)} into {folder.name} with {tool}, on Python {number}")
    write_stamp(folder, "unfinished", extras)
    if made_of != want or not os.path.exists(inside):
        shutil.rmtree(str(folder), ignore_errors=True)
        must(make_command(folder, python, uv))
        write_stamp(folder, "unfinished", extras)
    must([*install_command(inside, python, uv), "-c", "constraints.txt", "-e", project(extras)])
    # Without bytecode every start would compile thousands of modules; pip compiles on one core, this on all of them.
    # Its exit code says nothing: packages may ship files that are not meant for this Python.
    run([inside, "-m", "compileall", "-qq", "-j", "0", str(folder / "lib")])
    write_stamp(folder, want, extras)
    say(f"installed in {time.monotonic() - start:.0f} s")


def make_command(folder: pathlib.Path, python: Python, uv: str | None) -> list[str]:
    """The command that makes an empty environment; without ensurepip (Debian splits it off) one without pip."""
    if uv:
        return [uv, "venv", "--quiet", "--python", python.path, str(folder)]
    without = [] if can_import(python.path, "ensurepip") else ["--without-pip"]
    return [python.path, "-m", "venv", *without, str(folder)]


def install_command(inside: str, python: Python, uv: str | None) -> list[str]:
    """The command that installs into an environment, without its arguments."""
    if uv:
        return [uv, "pip", "install", "--quiet", "--python", inside]
    options = ["install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-compile"]
    if can_import(inside, "pip"):
        return [inside, "-m", "pip", *options]
    if can_import(python.path, "pip"):
        return [python.path, "-m", "pip", "--python", inside, *options]
    stop(f"{python.path} has neither ensurepip nor pip; install one of python3-venv, pip and uv, and run this again")


def project(extras: list[str]) -> str:
    """What pip is asked to install: the project in this folder, with extras."""
    return ".[{}]".format(",".join(extras)) if extras else "."


def fingerprint(root: pathlib.Path, python: Python) -> str:
    """A hash of all that an environment is made from; pytest's options, which stand in setup.cfg too, are not in it."""
    made_from = [str(root), python.version]
    for name, options in sections(root).items():
        if name.startswith(("metadata", "options")):
            made_from += [name, *(f"{key}={value}" for key, value in options.items())]
    made_from += [(root / name).read_text() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256("\0".join(made_from).encode()).hexdigest()


def sections(root: pathlib.Path) -> dict[str, dict[str, str]]:
    """setup.cfg as section -> key -> value."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(str(root / "setup.cfg"))
    return {name: dict(parser[name]) for name in parser.sections()}


def read_stamp(folder: pathlib.Path) -> tuple[str, list[str]]:
    """The fingerprint and the extras of a finished installation; a fingerprint of "" or "unfinished" is none."""
    try:
        made_of, *extras = (folder / "stamp").read_text().split()
    except (OSError, ValueError):
        return "", []
    return made_of, extras


def write_stamp(folder: pathlib.Path, made_of: str, extras: list[str]) -> None:
    """Replaces the stamp in one move, so that it is never half written."""
    folder.mkdir(exist_ok=True)
    new = folder / "stamp.new"
    new.write_text(" ".join([made_of, *extras]))
    os.replace(str(new), str(folder / "stamp"))


def find_pythons(minors: range) -> list[Python]:
    """Interpreters of these versions of Python 3 that run, one of each: from PATH, or else pyenv's."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = []
    for minor in minors:
        paths = [shutil.which(f"python3.{minor}"), *sorted(str(p) for p in pyenv.glob(f"3.{minor}.*/bin/python"))]
        for path in filter(None, paths):
            # A name on PATH may be a shim that runs nothing.
            answer = subprocess.run([path, "-c", "import sys; print(sys.version)"], stdout=-1, stderr=-1, check=False)
            if answer.stdout.startswith(f"3.{minor}.".encode()):
                found.append(Python(path, answer.stdout.decode().rstrip("\n")))
                break
    return found


def can_import(python: str, module: str) -> bool:
    """Whether an interpreter has a module."""
    return subprocess.run([python, "-c", f"import {module}"], stderr=-1, check=False).returncode == 0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def task_environment() -> dict[str, str]:
    """The environment of whatever runs here: bytecode is kept, or every process start compiles thousands of modules."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def execute(command: list[str]) -> NoReturn:
    """Becomes the command, so that its exit code and every signal are its own."""
    os.execve(command[0], command, task_environment())


def run(command: list[str]) -> int:
    """The exit code of a command (128 + n for death by signal n); if a signal stopped it, this program stops too.

    The command has a process group of its own and signals are handed on, so that Ctrl-C reaches it once, whether it
    comes from a terminal, which sends it to a whole group, or from kill.
    """
    received: list[int] = []
    child = None

    def hand_on(number: int, frame: object) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(number)

    # What is ignored stays so: nohup ignores SIGHUP.
    heard = [number for number in HANDED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in heard}
    try:
        child = subprocess.Popen(command, env=task_environment(), process_group=0)
        for number in received:  # came while the child was being started
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = 128 - code if code < 0 else code
    if received:
        sys.exit(code or 128 + received[0])
    return code


def must(command: list[str]) -> None:
    """Runs a step of the installation; its failure ends this program with its exit code."""
    code = run(command)
    if code:
        stop(f"the installation failed at: {' '.join(command)}", code)


def say(line: str) -> None:
    """Prints a line of this program's own, on stderr: stdout is the task's."""
    print(f"dev.py: {line}", file=sys.stderr, flush=True)


def stop(line: str, code: int = 2) -> NoReturn:
    """Ends the program with one line."""
    say(line)
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
