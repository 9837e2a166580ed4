"""Jobs of `llm-jax launch slurm` on a real Slurm: requeued where that helps, and bit for bit the same for it."""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_jax.launch.config import SlurmResources
from llm_jax.launch.slurm import NotSubmitted, submit
from tests.conftest import ROOT
from tests.slurm_lab import KILL_WAIT_S, Slurm, running_slurm
from tests.training import SMALL, assert_same_history, curve, has_lines, lines, newest

# tests/training.py's run, with half its updates.
STEPS = 20
SHORT = (*(wish for wish in SMALL if not wish.startswith("train.steps=")), f"train.steps={STEPS}")
TWO_NODES = {"nodes": 2, "partition": "low", "restarts": 1}

# Every process of the program goes through this. Faults are planted around it, never in it.
PLANTED = """\
import os, sys, time
from llm_jax import __main__, guards

attempt, process = int(os.environ.get("SLURM_RESTART_COUNT", 0)), int(os.environ["SLURM_PROCID"])
stop, calls = guards.Guards.stop, 0

def planted(self):
    global calls
    calls += 1
{fault}
    return stop(self)

guards.Guards.stop = planted
sys.exit(__main__.main(sys.argv[3:]))
"""
SLOW = "    time.sleep({seconds} if attempt == 0 else 0)"
RAISES = "    if process == 1 and calls == 6: raise RuntimeError('planted')"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with running_slurm() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def in_one_go(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same job, undisturbed."""
    folder = tmp_path_factory.mktemp("in_one_go")
    job = launch(slurm, folder, TWO_NODES)
    ended = slurm.wait_for_state(job, "COMPLETED", "FAILED")
    assert ended[:2] == ("COMPLETED", 0), log(folder)
    return folder / "run"


def launch(slurm: Slurm, folder: Path, resources: dict, *words: str, python: str | None = None) -> str:
    """Submits the short run, or other words of the command line; returns the job's number.

    python is the text of a program that stands in for the interpreter.
    """
    if python is not None:
        (folder / "bin").mkdir()
        (folder / "bin" / "python").write_text(python)
        (folder / "bin" / "python").chmod(0o755)
        resources = resources | {"setup": [f"PATH={shlex.quote(str(folder / 'bin'))}:$PATH"]}
    (folder / "resources.yaml").write_text(json.dumps(resources))
    words = words or (str(ROOT / "configs" / "tiny_causal.py"), *SHORT, f"run_dir={folder / 'run'}")
    command = [sys.executable, "-m", "llm_jax", "launch", "slurm", *words, "--resources", "resources.yaml", "--submit"]
    done = subprocess.run(command, cwd=folder, env=slurm.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Submitted batch job "), done.stdout
    return done.stdout.split()[-1]


def plant(folder: Path, fault: str) -> str:
    """An interpreter that runs the program with a fault in it."""
    planted = folder / "planted.py"
    planted.write_text(PLANTED.format(fault=fault))
    return f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(planted))} "$@"\n'


def log(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted((folder / "logs").glob("*.out")))


def requeued(slurm: Slurm, job: str, restarts: int = 1, timeout: float = 120) -> None:
    """Waits until Slurm has put the job back into the queue, and has it begin at once."""
    waiting = ("PENDING", restarts)
    slurm.wait(lambda: slurm.job(job)[:2] == waiting, timeout, f"job {job} to be requeued")
    slurm.start_now(job)
    slurm.wait(lambda: slurm.job(job)[:2] != waiting, timeout, f"job {job} to begin again")


def ended(slurm: Slurm, job: str, folder: Path, timeout: float = 300) -> tuple[str, int]:
    """State and exit code of a job that has ended, or was requeued; fails where it goes on for longer than that."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    begun = slurm.job(job).restarts
    slurm.wait(
        lambda: (now := slurm.job(job)).state in over or (now.state == "PENDING" and now.restarts > begun),
        timeout,
        f"the end of job {job}\n{log(folder)}",
    )
    return slurm.job(job).state, slurm.job(job).exit_code


# What the processes of each attempt do: (process 0, process 1).
SAVES = "trap 'kill $!; exit 75' TERM; sleep 60 & wait"
ATTEMPTS = {
    "a stall is restarted": ("exit 76", SAVES),
    "saved, without limit": ("exit 75", SAVES),
    # The survivors of a death have an exception.
    "a death by signal is restarted": ("sleep 0.3; exit 1", "kill -9 $$"),
    "SIGTERM before it is heeded": (SAVES, "kill -15 $PPID $$"),
    # The code of the first to fail is not the highest of all.
    "an exception ends the job": ("exit 1", SAVES),
}


@pytest.mark.slow
def test_what_is_requeued_and_how_often(slurm: Slurm, tmp_path: Path) -> None:
    """Real tasks that end as the program would."""
    cases = [
        f"{attempt}.{process}) {script} ;;"
        for attempt, scripts in enumerate(ATTEMPTS.values())
        for process, script in enumerate(scripts)
    ]
    program = "\n".join(["#!/bin/bash", "case ${SLURM_RESTART_COUNT:-0}.$SLURM_PROCID in", *cases, "esac"])
    job = launch(slurm, tmp_path, TWO_NODES | {"restarts": 2}, python=program)
    for restarts in range(1, len(ATTEMPTS)):
        requeued(slurm, job, restarts)
    assert ended(slurm, job, tmp_path) == ("FAILED", 1), log(tmp_path)
    told = [line for line in log(tmp_path).splitlines() if line.startswith("exit code")]
    assert told == [
        "exit code 76: requeued (restart 1 of 2)",
        "exit code 75: requeued (saved)",
        "exit code 137: requeued (restart 2 of 2)",
        "exit code 75: requeued (saved)",
        "exit code 1: the job ends",
    ]


def test_what_sbatch_refuses_is_told(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.env[name])
    with pytest.raises(NotSubmitted, match=r"^sbatch did not take the job: .*invalid partition") as refused:
        submit("#!/bin/bash\n#SBATCH --partition=none\n", SlurmResources())
    assert refused.value.exit_code == 3 and "\n" not in str(refused.value)


@pytest.mark.slow
def test_restarts_come_to_an_end(slurm: Slurm, tmp_path: Path) -> None:
    job = launch(slurm, tmp_path, TWO_NODES, python="#!/bin/bash\nexit 76")
    requeued(slurm, job)
    assert ended(slurm, job, tmp_path) == ("FAILED", 76)


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    """Although its processes save and exit with 75."""
    job = launch(slurm, tmp_path, TWO_NODES, python=f"#!/bin/bash\necho begun; {SAVES}")
    slurm.wait(lambda: (tmp_path / "logs").exists() and log(tmp_path).count("begun") == 2, 20, "two processes")
    slurm.run("scancel", job)
    assert ended(slurm, job, tmp_path)[0] == "CANCELLED"
    time.sleep(1)
    assert slurm.job(job) == slurm.wait_for_state(job, "CANCELLED")
    assert slurm.job(job).restarts == 0


@pytest.mark.slow
def test_preempted_and_requeued_it_is_the_same_run(slurm: Slurm, in_one_go: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = launch(slurm, tmp_path, TWO_NODES, python=plant(tmp_path, SLOW.format(seconds=0.5)))
    slurm.wait(functools.partial(has_lines, run_dir, 6), 240, "six updates")
    urgent = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    slurm.run("sbatch", *urgent)
    requeued(slurm, job)
    assert "exit code 75: requeued (saved)" in log(tmp_path)
    assert 6 <= newest(run_dir) < STEPS
    assert ended(slurm, job, tmp_path) == ("COMPLETED", 0), log(tmp_path)
    assert f"resumed from {run_dir}" in log(tmp_path)
    assert_same_history(run_dir, in_one_go, STEPS)


@pytest.mark.slow
def test_out_of_time_and_requeued_it_is_the_same_run(slurm: Slurm, in_one_go: Path, tmp_path: Path) -> None:
    """Limits are whole minutes, which slurmctld looks at twice a minute: this one is set one to two minutes ahead."""
    run_dir, begun = tmp_path / "run", time.monotonic()
    resources = TWO_NODES | {"time": "60", "signal_seconds": 90}
    job = launch(slurm, tmp_path, resources, python=plant(tmp_path, SLOW.format(seconds=3)))
    slurm.wait(functools.partial(has_lines, run_dir, 6), 240, "six updates")
    minutes = int(time.monotonic() - begun) // 60 + 2
    slurm.run("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes}")
    slurm.wait(lambda: slurm.job(job).state == "PENDING", 90, f"job {job} to be requeued")
    slurm.run("scontrol", "update", f"jobid={job}", "TimeLimit=60")
    requeued(slurm, job)
    assert "exit code 75: requeued (saved)" in log(tmp_path)
    assert 6 <= newest(run_dir) < STEPS
    assert ended(slurm, job, tmp_path) == ("COMPLETED", 0), log(tmp_path)
    assert f"resumed from {run_dir}" in log(tmp_path)
    assert_same_history(run_dir, in_one_go, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_node_is_lost_and_it_is_the_same_run(slurm: Slurm, in_one_go: Path, tmp_path: Path, which: int) -> None:
    """From one moment to the next nothing of it answers, as when the power fails; later it is back."""
    run_dir, lost = tmp_path / "run", slurm.nodes[which]
    job = launch(slurm, tmp_path, TWO_NODES, python=plant(tmp_path, SLOW.format(seconds=0.5)))
    slurm.wait(functools.partial(has_lines, run_dir, 6), 240, "six updates")
    silent = slurm.lose(lost)
    # Slurm finds out by itself too, after SlurmdTimeout.
    slurm.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=lost")
    for pid in silent:
        os.kill(pid, signal.SIGKILL)
    slurm.start_node(lost)
    requeued(slurm, job)
    assert newest(run_dir) < STEPS
    assert ended(slurm, job, tmp_path) == ("COMPLETED", 0), log(tmp_path)
    assert f"resumed from {run_dir}" in log(tmp_path)
    assert_same_history(run_dir, in_one_go, STEPS)


@pytest.mark.slow
def test_an_exception_in_one_process_ends_the_job(slurm: Slurm, tmp_path: Path) -> None:
    job = launch(slurm, tmp_path, TWO_NODES, python=plant(tmp_path, RAISES))
    slurm.wait(lambda: (tmp_path / "logs").exists() and "RuntimeError: planted" in log(tmp_path), 240, "the exception")
    began = time.monotonic()
    assert ended(slurm, job, tmp_path) == ("FAILED", 1), log(tmp_path)
    slurm.wait(lambda: not slurm.processes(f"SLURM_JOB_ID={job}"), 30, "all to be gone")
    assert time.monotonic() - began < KILL_WAIT_S + 15
    assert "1: Traceback" in log(tmp_path)
    assert slurm.job(job).restarts == 0


@pytest.mark.slow
def test_two_configs_are_an_array(slurm: Slurm, tmp_path: Path) -> None:
    """At the same time, on the same nodes, without meeting each other."""
    configs = [tmp_path / "one.py", tmp_path / "two.py"]
    for config, lr in zip(configs, ("1e-3", "2e-3"), strict=True):
        wishes = [*SHORT, f"run_dir={tmp_path / config.stem}", f"name={config.stem}", f"optim.lr={lr}"]
        config.write_text(
            "from llm_jax.config import load, override\nfrom llm_jax.run import Run\n\n\ndef config():\n"
            f"    return override(load({str(ROOT / 'configs' / 'tiny_causal.py')!r}, Run), {wishes!r})\n"
        )
    job = launch(slurm, tmp_path, TWO_NODES, *map(str, configs), "train.steps=8")
    for index, name in enumerate(("one", "two")):
        assert ended(slurm, f"{job}_{index}", tmp_path) == ("COMPLETED", 0), log(tmp_path)
        assert len(lines(tmp_path / name)) == 8
        assert (tmp_path / "logs" / f"one-and-1-more-{job}_{index}.out").exists()
    assert curve(tmp_path / "one") != curve(tmp_path / "two")
