"""`launch local`: every line of output, one exit code, restarts by the rule, and nothing left behind.

Most processes here are a few lines of Python in the program's place: what is proved is what becomes of them.
"""

import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_jax.config import ConfigError
from llm_jax.exit_codes import DONE, INTERRUPTED, MEANINGS
from llm_jax.launch.config import LocalResources
from llm_jax.launch.job import Job, is_retried, is_saved
from llm_jax.launch.local import Exit, environments, exit_code_when_asked, is_restarted, render, verdict
from tests.conftest import ROOT, Running, Start
from tests.training import DATA, assert_same_history, has_lines, newest, steps_written, train, wait_for

LAUNCHER = """
import json, sys
from llm_jax.launch import local
from llm_jax.launch.config import LocalResources
from llm_jax.launch.job import Job
resources, program, *words = sys.argv[1:]
job = Job(("config",), tuple(words), ())
sys.exit(local.run(job, LocalResources(**json.loads(resources)), [sys.executable, "-c", program]))
"""

# What each program begins with: who it is, and which attempt this is, which the coordinator's ports tell.
CHILD = """
import os, signal, subprocess, sys, time
me, n = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
port = os.environ["JAX_COORDINATOR_ADDRESS"].removeprefix("127.0.0.1:")
with open("ports", "a+") as file:
    file.write(f"{port}\\n")
    file.seek(0)
    attempt = len(set(file.read().split()))
print("pid", os.getpid(), flush=True)
def on_sigterm(code):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
def wait_for_all():
    open(f"ready-{port}-{me}", "w").close()
    while not all(os.path.exists(f"ready-{port}-{i}") for i in range(n)): time.sleep(0.01)
def stop():
    with open("stopped", "w") as file: file.write(str(os.getpid()))
    os.rename("stopped", f"stopped-{port}")
    os.kill(os.getpid(), signal.SIGSTOP)
def wait_for_stop():
    while not os.path.exists(f"stopped-{port}"): time.sleep(0.01)
    while open(f"/proc/{open(f'stopped-{port}').read()}/stat").read().rpartition(")")[2].split()[0] != "T": pass
"""

Launch = Callable[..., Running]


@pytest.fixture
def launch(start: Start) -> Launch:
    """launch(program, **resources) starts the launcher on CHILD + program."""

    def launch(program: str, *words: str, env: dict[str, str] | None = None, **resources: object) -> Running:
        said = json.dumps({"grace_seconds": 0.5, **resources})
        return start("-c", LAUNCHER, said, CHILD + program, *words, env=env)

    return launch


def pids(running: Running) -> list[int]:
    """The processes that have said theirs."""
    return [int(pid) for pid in re.findall(r"^\[\d+\] pid (\d+)$", running.stdout.read_text(), re.MULTILINE)]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has buried yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the launcher itself said."""
    return [line.removeprefix("launch: ") for line in done.stderr.splitlines() if line.startswith("launch: ")]


# The verdict: who failed first, and who only followed.


@pytest.mark.parametrize(
    ("exits", "code"),
    [
        ([Exit(0, 0), Exit(1, 0)], 0),
        ([Exit(1, 75), Exit(0, 75)], 75),
        # The others follow the first: with a lost peer's traceback, an abort of JAX's, or by our hand.
        ([Exit(1, -9), Exit(0, 1)], 137),
        ([Exit(1, -11), Exit(0, -6)], 139),
        ([Exit(0, 1), Exit(1, -6)], 1),
        ([Exit(0, 1), Exit(1, -15, by_us=True), Exit(2, -9, by_us=True)], 1),
        ([Exit(1, 76), Exit(0, 1)], 76),
        ([Exit(1, 76), Exit(0, 76)], 76),
        # Who tells what is wrong decides, whenever that was.
        ([Exit(0, 75), Exit(1, 74)], 74),
        ([Exit(1, -6), Exit(0, 2)], 2),
        ([Exit(1, 76), Exit(0, 70)], 70),
        # Saved is saved, though somebody had to be ended afterwards; but who died alone was not asked to.
        ([Exit(0, 75), Exit(1, -9, by_us=True)], 75),
        ([Exit(0, 75), Exit(1, -9)], 137),
        ([Exit(0, 75), Exit(1, 1)], 1),
        # Of a run that is done the others may have something to write.
        ([Exit(0, 0), Exit(1, -9, by_us=True)], 137),
        ([Exit(0, 0), Exit(1, 75)], 75),
        # Asked to stop, one had no handler yet; its peer missed it.
        ([Exit(1, -15, by_us=True), Exit(0, 1)], 143),
        ([Exit(0, 130)], 130),
        ([Exit(0, -2)], 130),
    ],
)
def test_the_verdict(exits: list[Exit], code: int) -> None:
    assert verdict(exits) == code


def test_the_verdict_of_any_three() -> None:
    """All that may happen to three processes: what must hold whatever it was."""
    ends = [(code, False) for code in (0, 1, 2, 65, 74, 75, 76, 130, -6, -9, -15)] + [(-9, True), (-15, True)]
    for three in itertools.product(ends, repeat=3):
        exits = [Exit(i, code, by_us) for i, (code, by_us) in enumerate(three)]
        code, codes = verdict(exits), [exit.returncode for exit in exits]
        own = [exit.returncode for exit in exits if not exit.by_us and exit.returncode not in (0, 75)]
        assert (code == 0) == (set(codes) == {0}), exits
        if {2, 65, 74} & set(codes):
            assert code in {2, 65, 74} and not is_restarted(code, 0, 3), exits
        if code == 75:
            assert 75 in codes and not own, exits
        if own and exits[0].returncode in own and not {2, 65, 74} & set(codes):
            assert code == codes[0] if codes[0] > 0 else code == 128 - codes[0], exits


def test_what_is_restarted_and_what_is_not() -> None:
    for code in range(256):
        again = [code for restarts in range(4) if is_restarted(code, restarts, 3)]
        if code == 75:
            assert is_saved(code) and len(again) == 4
        elif code == 76 or code in (129, 134, 137, 139, 143):
            assert is_retried(code) and len(again) == 3
        elif code in MEANINGS or code < 128 or code > 192:
            assert not is_retried(code) and not is_saved(code) and not again, code


@pytest.mark.parametrize(
    ("code", "ctrl_c", "sigterm"), [(75, 130, 75), (143, 130, 75), (137, 130, 75), (76, 130, 75), (130, 130, 75)]
)
def test_who_asks_for_a_stop_is_answered(code: int, ctrl_c: int, sigterm: int) -> None:
    assert exit_code_when_asked(code, signal.SIGINT) == ctrl_c
    assert exit_code_when_asked(code, signal.SIGTERM) == exit_code_when_asked(code, signal.SIGHUP) == sigterm


@pytest.mark.parametrize("code", [0, 1, 2, 3, 65, 70, 74])
def test_a_failure_while_stopping_is_not_hidden(code: int) -> None:
    assert exit_code_when_asked(code, signal.SIGINT) == exit_code_when_asked(code, signal.SIGTERM) == code


# The environment, and what is printed.


def test_environments() -> None:
    resources = LocalResources(processes=2, devices=3, environment={"JAX_PLATFORMS": "cuda", "A": "b c"})
    one, two = environments(resources, 999)
    assert one == {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:999",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
        "JAX_NUM_CPU_DEVICES": "3",
        "JAX_PLATFORMS": "cuda",
        "A": "b c",
    }
    assert two == one | {"JAX_PROCESS_ID": "1"}
    with pytest.raises(ConfigError) as error:
        environments(LocalResources(environment={"JAX_PROCESS_ID": "1", "X": ""}), 999)
    assert error.value.lines == ("environment.JAX_PROCESS_ID: the launcher sets it; leave it out",)


def test_what_is_printed_can_be_pasted(tmp_path: Path) -> None:
    """The same words and variables reach the processes, whatever a shell would make of them."""
    words = ("model.x=[1, 2]", "name=a b'c$HOME", "seed=3")
    text = render(Job(("some config.py",), words, ()), LocalResources(environment={"Y": "$(false) 'x'"}))
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nfor word; do echo "$JAX_PROCESS_ID $JAX_NUM_CPU_DEVICES $Y: $word"; done\n')
    program.chmod(0o755)
    (starter,) = {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    done = subprocess.run(["sh"], input=text.replace(starter, str(program)), capture_output=True, text=True, check=True)
    sent = ["-m", "llm_jax", "train", "some config.py", *words]
    assert sorted(done.stdout.splitlines()) == sorted(f"{i} 4 $(false) 'x': {word}" for i in "01" for word in sent)


# The output.


def test_every_line_comes_through_whole(launch: Launch) -> None:
    """Two processes write two megabytes each to both streams at once, with bytes that are no text."""
    program = """
import threading
def write(file, name):
    for i in range(20000):
        file.write(b"%s %d %s\\n" % (name, i, b"." * 80))
        if i % 97 == 0: file.flush()
    file.write(b"\\xff\\xfe last line of " + name)
    file.flush()
threads = [threading.Thread(target=write, args=(f.buffer, b)) for f, b in ((sys.stdout, b"out"), (sys.stderr, b"err"))]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    running = launch(program)
    assert running.wait(60).returncode == 0
    for path, name in ((running.stdout, b"out"), (running.stderr, b"err")):
        lines = path.read_bytes().splitlines()
        for process in (b"[0] ", b"[1] "):
            mine = [line.removeprefix(process) for line in lines if line.startswith(process)]
            wanted = [b"%s %d %s" % (name, i, b"." * 80) for i in range(20000)]
            assert [line for line in mine if not line.startswith(b"pid")] == [*wanted, b"\xff\xfe last line of " + name]
    assert path.read_bytes().endswith(b"\n")


def test_processes_see_no_terminal(launch: Launch) -> None:
    program = """
from rich.console import Console
print(Console().is_terminal, sys.stdout.isatty(), sys.stderr.isatty(), sys.stdin.read() == "", "no newline", end="")
"""
    running = launch(program, processes=1, env={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"})
    assert running.wait(60).returncode == 0
    assert "[0] False False False True no newline\n" in running.stdout.read_text()


def test_who_reads_no_more_ends_the_job(start: Start) -> None:
    """As in `llm-jax launch local ... | head`: the processes go, and nobody waits for a full pipe."""
    program = CHILD + "\nwhile True: print('y' * 1000)"
    running = start("-c", READS_LITTLE, LAUNCHER, json.dumps({"grace_seconds": 0.5}), program)
    done = running.wait(60)
    assert done.returncode == 0 and "the output cannot be written; SIGTERM to process" in done.stderr
    assert "BrokenPipeError" in done.stderr
    assert not any(map(is_alive, pids(running)))


READS_LITTLE = """
import subprocess, sys
job = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.PIPE)
for _ in range(20): print(job.stdout.readline().decode(), end="", flush=True)
job.stdout.close()
sys.exit(job.wait() == 0)
"""


# Failures.


def test_the_first_failure_ends_all_with_what_they_have_started(launch: Launch) -> None:
    """Process 1 raises; 0 ignores SIGTERM, 2 is stopped, 3 goes when asked; each has a child."""
    program = """
child = subprocess.Popen(["sleep", "600"])
print("pid", child.pid, flush=True)
if me == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)
if me == 3: on_sigterm(75)
wait_for_all()
if me == 2: stop()
wait_for_stop()
if me == 1: raise RuntimeError("planted")
time.sleep(600)
"""
    started = time.monotonic()
    running = launch(program, processes=4, restarts=5)
    done = running.wait(30)
    assert done.returncode == 1
    assert "[1] RuntimeError: planted\n" in done.stderr
    assert told(done) == [
        "process 1 ended with exit code 1 (unexpected: a traceback was printed); SIGTERM to processes 0, 2, 3",
        "processes 0, 2 did not end within 0.5 s of SIGTERM: SIGKILL",
        "attempt 1 ended with exit code 1 (unexpected: a traceback was printed)",
    ]
    assert len(pids(running)) == 8
    assert not any(map(is_alive, pids(running)))
    assert time.monotonic() - started < 20


def test_a_stopped_process_and_a_stall_are_restarted(launch: Launch) -> None:
    """Process 0 is stopped, the others see no progress; the next attempt goes through."""
    program = """
if attempt == 2: sys.exit()
wait_for_all()
if me == 0: stop()
wait_for_stop()
sys.exit(76)
"""
    running = launch(program, processes=3)
    done = running.wait(30)
    assert done.returncode == 0, done.stderr
    assert "process 0 did not end within 0.5 s of SIGTERM: SIGKILL" in told(done)
    assert told(done)[-1] == (
        "attempt 1 ended with exit code 76 (no progress: restart); attempt 2 begins, restart 1 of 3"
    )
    assert len(pids(running)) == 6 and not any(map(is_alive, pids(running)))


# Restarts.


def test_saved_is_restarted_without_limit_and_each_time_on_a_port_of_its_own(launch: Launch, tmp_path: Path) -> None:
    program = """
wait_for_all()
time.sleep(0.1 * me)
sys.exit(75 if attempt < 6 else 0)
"""
    running = launch(program, restarts=0)
    done = running.wait(30)
    assert done.returncode == 0, done.stderr
    assert told(done) == [
        f"attempt {i} ended with exit code 75 (saved on request: run the same command again); attempt {i + 1} begins"
        for i in range(1, 6)
    ]
    ports = (tmp_path / "ports").read_text().split()
    assert len(ports) == 12 and len(set(ports)) == 6


def test_stalls_and_deaths_are_restarted_up_to_the_limit_and_saves_are_not_counted(launch: Launch) -> None:
    program = """
on_sigterm(0)
wait_for_all()
if attempt == 2: sys.exit(75)
if me == 0: time.sleep(600)
if attempt == 3: os.kill(os.getpid(), signal.SIGSEGV)
sys.exit(76)
"""
    done = launch(program, restarts=2).wait(30)
    assert done.returncode == 76
    ended = [line for line in told(done) if line.startswith("attempt")]
    assert ended == [
        "attempt 1 ended with exit code 76 (no progress: restart); attempt 2 begins, restart 1 of 2",
        "attempt 2 ended with exit code 75 (saved on request: run the same command again); attempt 3 begins",
        "attempt 3 ended with exit code 139 (killed by SIGSEGV); attempt 4 begins, restart 2 of 2",
        "attempt 4 ended with exit code 76 (no progress: restart); all 2 restarts are used up",
    ]


def test_who_does_not_end_after_the_others_were_saved_is_ended(launch: Launch) -> None:
    program = """
if attempt == 2: sys.exit()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
wait_for_all()
if me == 0: sys.exit(75)
time.sleep(600)
"""
    done = launch(program).wait(30)
    assert done.returncode == 0
    assert told(done) == [
        "process 1 did not end within 0.5 s of the others; SIGTERM to process 1",
        "process 1 did not end within 0.5 s of SIGTERM: SIGKILL",
        "attempt 1 ended with exit code 75 (saved on request: run the same command again); attempt 2 begins",
    ]


# Signals to the launcher.


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 75), ("SIGHUP", 75)])
def test_a_signal_goes_on_as_sigterm_and_ends_the_job(launch: Launch, number: str, code: int) -> None:
    """The processes take longer to save than grace_seconds, which is for failures; nothing is restarted."""
    program = """
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""
    running = launch(program)
    wait_for(lambda: running.stdout.read_text().count("ready") == 2, running)
    running.process.send_signal(signal.Signals[number])
    done = running.wait(30)
    assert done.returncode == code
    assert done.stdout.count("saved") == 2 and len(pids(running)) == 2
    assert told(done) == [f"{number}: the processes save and end; a second Ctrl-C kills them"]


def test_a_second_ctrl_c_kills(launch: Launch) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
print("ready", flush=True)
while True: time.sleep(1)
"""
    running = launch(program, grace_seconds=60)
    wait_for(lambda: running.stdout.read_text().count("ready") == 2, running)
    running.process.send_signal(signal.SIGINT)
    wait_for(lambda: running.stdout.read_text().count("heard") == 2, running)
    running.process.send_signal(signal.SIGINT)
    assert running.wait(10).returncode == INTERRUPTED
    assert not any(map(is_alive, pids(running)))


def test_nobody_outlives_a_launcher_that_is_killed(launch: Launch) -> None:
    running = launch("print('ready', flush=True)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)")
    wait_for(lambda: running.stdout.read_text().count("ready") == 2, running)
    running.process.kill()
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids(running))):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Training.


SHORT = ("train.steps=12", "optim.warmup_steps=2")

# In the program's place: the program, in which one process comes to grief before a batch; once.
PLANTED = """
import contextlib, os, signal, sys
from llm_jax.train import loop
real = loop.stream
def stream(rows, **rest):
    with contextlib.closing(real(rows, **rest)) as batches:
        for fetched in batches:
            mark = f"{os.environ['JAX_PROCESS_ID']}-{fetched.t}"
            fault = dict(fault.split("=") for fault in os.environ["FAULTS"].split()).get(mark)
            if fault and not os.path.exists(mark):
                open(mark, "w").close()
                if fault == "raise": raise RuntimeError("planted")
                os.kill(os.getpid(), signal.Signals[fault])
            yield fetched
loop.stream = stream
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
PLANTED_LAUNCHER = """
import sys
from llm_jax.launch import local
from llm_jax.launch.config import LocalResources
from llm_jax.launch.job import read_job
faults, program, _, _, _, config, *overrides = sys.argv[1:]
resources = LocalResources(devices=4, environment={"FAULTS": faults})
sys.exit(local.run(read_job([config], overrides, resources), resources, [sys.executable, "-c", program]))
"""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The run directory, and the output, of `llm-jax launch local` with 2 processes of 4 devices, undisturbed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    _, _, _, *words = train(folder / "run", *SHORT)
    command = [sys.executable, "-m", "llm_jax", "launch", "local", *words, "--resources", "launch/local.yaml"]
    done = subprocess.run([*command, "--submit"], cwd=ROOT, capture_output=True, text=True, check=False)
    return folder / "run", done


def test_two_processes_train_to_the_end(rehearsal: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, done = rehearsal
    assert done.returncode == DONE, done.stdout + done.stderr
    assert re.search(r"^\[0\] step 12/12  loss", done.stdout, re.MULTILINE)
    assert f"[0] done: 12 steps; next: llm-jax eval {run_dir}\n" in done.stdout
    assert "\n[0] mesh: data 8 (8 cpu); " in done.stdout
    assert all(re.match(r"\[[01]\] ", line) for line in (done.stdout + done.stderr).splitlines())
    assert newest(run_dir) == 12


@pytest.mark.slow
def test_a_run_that_is_saved_and_killed_is_launched_on_and_does_not_differ(
    rehearsal: tuple[Path, subprocess.CompletedProcess[str]], start: Start, tmp_path: Path
) -> None:
    """SIGTERM to process 1 before batch 3, SIGKILL to process 0 before batch 9: three attempts, one history."""
    faults = "1-3=SIGTERM 0-9=SIGKILL"
    done = start("-c", PLANTED_LAUNCHER, faults, PLANTED, *train(tmp_path / "run", *SHORT)).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, last = [line for line in told(done) if line.startswith("attempt")]
    assert first.startswith("attempt 1 ended with exit code 75 ") and first.endswith("; attempt 2 begins")
    assert last == "attempt 2 ended with exit code 137 (killed by SIGKILL); attempt 3 begins, restart 1 of 3"
    assert done.stdout.count("resumed from") == 2
    assert_same_history(tmp_path / "run", rehearsal[0], step=12)


@pytest.mark.slow
def test_an_exception_ends_all_within_15_seconds(start: Start, tmp_path: Path) -> None:
    running = start("-c", PLANTED_LAUNCHER, "1-3=raise", PLANTED, *train(tmp_path / "run", *SHORT))
    wait_for(lambda: "[1] RuntimeError: planted" in running.stderr.read_text(), running)
    done = running.wait(15)
    assert done.returncode == 1
    assert "[1] Traceback (most recent call last):" in done.stderr
    assert told(done)[0].startswith(
        "process 1 ended with exit code 1 (unexpected: a traceback was printed); SIGTERM to"
    )
    assert told(done)[-1] == "attempt 1 ended with exit code 1 (unexpected: a traceback was printed)"


@pytest.mark.parametrize(
    "steps", [pytest.param(40, marks=pytest.mark.slow), pytest.param(150, marks=[pytest.mark.slow, pytest.mark.whole])]
)
@pytest.mark.parametrize("config", [("tiny_causal",), ("tiny_mlm", "model.head_transform=true")], ids="+".join)
def test_collectives_of_two_axes_do_not_wait_for_each_other(
    config: tuple[str, ...], steps: int, start: Start, tmp_path: Path
) -> None:
    """fsdp within a process and data across: devices that begin their collectives in different orders hang, often."""
    name, *changes = config
    words = (str(ROOT / "configs" / f"{name}.py"), DATA, f"run_dir={tmp_path / 'run'}", "mesh.fsdp=4", *changes)
    words = (*words, f"train.steps={steps}", "checkpoint.every=200", "eval.every=0")
    words = (*words, "watchdog.floor_s=30", "watchdog.grace_s=5")
    file = tmp_path / "one_attempt.yaml"
    file.write_text("processes: 2\ndevices: 4\nrestarts: 0\n")
    done = start("-m", "llm_jax", "launch", "local", *words, "--resources", str(file), "--submit").wait()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_deaf_and_the_stopped_go_with_sigkill(start: Start, tmp_path: Path) -> None:
    """Process 0 is stopped before batch 3, and process 1, which waits for it in a collective, is killed."""
    faults = "0-3=SIGSTOP"
    running = start("-c", PLANTED_LAUNCHER, faults, PLANTED, *train(tmp_path / "run", *SHORT))
    wait_for(lambda: sum(map(is_stopped, children(running.process.pid))) == 1, running)
    other = next(pid for pid in children(running.process.pid) if not is_stopped(pid))
    os.kill(other, signal.SIGKILL)
    done = running.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    assert told(done) == [
        "process 1 ended with exit code 137 (killed by SIGKILL); SIGTERM to process 0",
        "process 0 did not end within 10 s of SIGTERM: SIGKILL",
        "attempt 1 ended with exit code 137 (killed by SIGKILL); attempt 2 begins, restart 1 of 3",
    ]


@pytest.mark.slow
def test_ctrl_c_saves_and_returns_130(
    rehearsal: tuple[Path, subprocess.CompletedProcess[str]], start: Start, tmp_path: Path
) -> None:
    """And the same command goes on as if nothing had been."""
    run_dir = tmp_path / "run"
    _, _, _, *words = train(run_dir, *SHORT)
    command = ("-m", "llm_jax", "launch", "local", *words, "--resources", "launch/local.yaml", "--submit")
    running = start(*command, cwd=ROOT)
    wait_for(functools.partial(has_lines, run_dir, 2), running)
    running.process.send_signal(signal.SIGINT)
    done = running.wait(60)
    assert done.returncode == INTERRUPTED, done.stdout + done.stderr
    assert f"[0] saved in {run_dir}; the same command goes on from there\n" in done.stdout
    assert newest(run_dir) == len(steps_written(run_dir)) < 12
    assert start(*command, cwd=ROOT).wait().returncode == 0
    assert_same_history(run_dir, rehearsal[0], step=12)


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
