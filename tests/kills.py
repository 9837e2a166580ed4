"""A tiny run of `llm-jax train` that is killed again and again, and its history held against an uninterrupted one's."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llm_jax.checkpoint import Checkpoints
from tests.conftest import ROOT, STRICT, free_port
from tests.training import TIMES, arrays, curve, half_written, has_lines, is_saving, newest, steps_written, train

STEPS, EVERY = 60, 10
# Held-out rows are looked at too, and some checkpoints come by the clock: their number is not the same in each life.
OVERRIDES = (
    f"train.steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "checkpoint.minutes=0.02",
    "eval.every=10",
    "eval.rows=16",
)
PROGRAM = ("-m", "llm_jax")
PHASES = ("start", "restore", "compile", "training", "save", "end", "on a finished run")
# How often a kill aims at what: the time to the first update, updates, half-written checkpoints, the last update.
AIMS = {"beginning": 40, "training": 25, "saving": 30, "end": 5}
PATIENCE_S = 600.0


class Trial(NamedTuple):
    """A run directory, and what trains there: so many processes of `python *program train ...`, one device each."""

    run_dir: Path
    processes: int
    cache: Path
    """Of compiled programs, and its own: a kill can leave half an entry, which JAX never replaces."""
    program: tuple[str, ...] = PROGRAM


class Kill(NamedTuple):
    """What was killed, and how it stood at that moment."""

    aim: str
    victims: str
    phase: str
    seconds: float
    """Since the processes' start."""
    restored: int
    """The newest checkpoint when they started."""
    updates: int
    """Lines in metrics.jsonl."""
    checkpoint: int
    """The newest checkpoint."""
    half_written: int
    """Unfinished checkpoints that lay there."""
    others: str
    """What became of the process that was not hit: it ended by itself, or was killed too some seconds later."""


@dataclasses.dataclass(frozen=True)
class Life:
    """The processes from one start to their end, and where process 0 prints."""

    trial: Trial
    processes: list[subprocess.Popen[bytes]]
    restored: int
    litter: set[int]
    """Inodes of what lay half-written already."""
    started: float

    @property
    def half_written(self) -> int:
        """How many checkpoints these processes have begun and not completed."""
        return len(inodes(half_written(self.trial.run_dir)) - self.litter)

    @property
    def said(self) -> str:
        """What process 0 has printed so far."""
        return output(self.trial, 0).read_text(errors="replace")

    def goes_on(self) -> bool:
        """Whether every process lives. Raises AssertionError, with what they printed, where one has failed."""
        for i, process in enumerate(self.processes):
            code = process.poll()
            assert code in (None, 0), f"process {i} ended with {code}:\n{output(self.trial, i).read_text()}"
        return all(process.returncode is None for process in self.processes)

    def wait(self) -> None:
        """Returns when all have ended well. Raises AssertionError otherwise."""
        deadline = time.monotonic() + PATIENCE_S
        while self.goes_on() or any(process.returncode is None for process in self.processes):
            assert time.monotonic() < deadline, f"not done after {PATIENCE_S} s:\n{self.said}"
            time.sleep(0.01)

    def kill(self, victims: list[int]) -> None:
        """SIGKILL; those that have ended already are past it."""
        for i in victims:
            if self.processes[i].poll() is None:
                self.processes[i].send_signal(signal.SIGKILL)
        for i in victims:
            self.processes[i].wait()


def output(trial: Trial, process: int) -> Path:
    """Where a process prints."""
    return trial.run_dir.with_name(f"{trial.run_dir.name}.{process}.txt")


@contextlib.contextmanager
def begun(trial: Trial) -> Iterator[Life]:
    """Starts the processes; none outlives the context."""
    kept = {name: value for name, value in os.environ.items() if name not in (*STRICT, "PYTHONDONTWRITEBYTECODE")}
    env = kept | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(trial.cache),
    }
    if trial.processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(trial.processes)}
    arguments = train(trial.run_dir, *OVERRIDES)[len(PROGRAM) :]
    processes = []
    litter = inodes(half_written(trial.run_dir))
    life = Life(trial, processes, newest(trial.run_dir), litter, time.monotonic())
    try:
        for i in range(trial.processes):
            with output(trial, i).open("wb") as file:
                own = {"JAX_PROCESS_ID": str(i)} if trial.processes > 1 else {}
                command = [sys.executable, *trial.program, *arguments]
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=trial.run_dir.parent,
                        env=env | own,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield life
    finally:
        life.kill([*range(len(processes))])


def to_the_end(trial: Trial) -> float:
    """Lets the run go on to its end, and returns how many seconds it took to the first update, if there was one."""
    with begun(trial) as life:
        while not is_training(life) and life.goes_on():
            time.sleep(0.01)
        beginning_s = time.monotonic() - life.started
        life.wait()
        return beginning_s


def killed(trial: Trial, draw: random.Random, beginning_s: float) -> Kill | None:
    """One life, killed at a random moment; None if it ended well before that moment came.

    beginning_s: how long a start takes to its first update.
    """
    # A finished run has nothing to aim at.
    finished = newest(trial.run_dir) == STEPS
    aim = "beginning" if finished else draw.choices([*AIMS], [*AIMS.values()])[0]
    with begun(trial) as life:
        reached, delay = moment(aim, life, draw, beginning_s)
        while not reached() and life.goes_on():
            time.sleep(0.002)
        time.sleep(delay)
        everyone = [*range(trial.processes)]
        victims = draw.choice([everyone, *([i] for i in everyone)])
        if not any(life.processes[i].poll() is None for i in victims):
            life.wait()
            return None
        life.kill(victims)
        kill = Kill(
            aim=aim,
            victims="all" if victims == everyone else f"process {victims[0]} of {trial.processes}",
            phase="on a finished run" if finished else phase(life),
            seconds=round(time.monotonic() - life.started, 2),
            restored=life.restored,
            updates=updates(trial.run_dir),
            checkpoint=newest(trial.run_dir),
            half_written=life.half_written,
            others="",
        )
        return kill if len(victims) == trial.processes else kill._replace(others=end_of_the_others(life, draw))


def moment(aim: str, life: Life, draw: random.Random, beginning_s: float) -> tuple[Callable[[], bool], float]:
    """When to kill: as soon as a condition holds, and so many seconds later."""
    run_dir = life.trial.run_dir
    match aim:
        case "training":
            goal = min(life.restored + draw.randint(1, 3 * EVERY), STEPS)
            # Before the first update is printed, the lines are those of an earlier life.
            return (lambda: is_training(life) and has_lines(run_dir, goal)), draw.uniform(0, 0.05)
        case "saving":
            goal = life.restored + draw.randint(1, 2 * EVERY)
            return (lambda: is_training(life) and is_saving(run_dir, goal)), draw.uniform(0, 0.15)
        case "end":
            return (lambda: is_training(life) and has_lines(run_dir, STEPS)), draw.uniform(0, 1)
    at = life.started + draw.uniform(0, beginning_s)
    return (lambda: time.monotonic() >= at), 0.0


def is_training(life: Life) -> bool:
    """Whether the first update of this life has been made: that is printed."""
    return re.search(r"^step +\d+/", life.said, re.MULTILINE) is not None


def phase(life: Life) -> str:
    """What process 0 was doing when it was killed, by what it has printed and written."""
    run_dir, said = life.trial.run_dir, life.said
    lock = run_dir / "lock"
    if not lock.exists() or f"process {life.processes[0].pid} " not in lock.read_text():
        return "start"
    if life.half_written:
        return "save"
    if is_training(life):
        return "training" if updates(run_dir) < STEPS else "end"
    return "compile" if "resumed from" in said or not life.restored else "restore"


def inodes(paths: list[Path]) -> set[int]:
    """What is there under these names."""
    found = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.add(path.stat().st_ino)
    return found


def updates(run_dir: Path) -> int:
    """Lines in metrics.jsonl, or 0 where there is none yet."""
    return len(steps_written(run_dir)) if has_lines(run_dir, 0) else 0


def end_of_the_others(life: Life, draw: random.Random) -> str:
    """After a while a launcher kills whoever is left; so long they may do what they like, end by themselves too."""
    started, patience = time.monotonic(), draw.uniform(0, 5)
    left = [i for i, process in enumerate(life.processes) if process.poll() is None]
    while time.monotonic() < started + patience and any(life.processes[i].poll() is None for i in left):
        time.sleep(0.01)
    codes = [life.processes[i].poll() for i in left]
    life.kill(left)
    if not left:
        return "ended well before"
    took = f"after {time.monotonic() - started:.1f} s"
    return ", ".join(f"killed {took}" if code is None else f"ended with {code} {took}" for code in codes)


def survived(trial: Trial, draw: random.Random, kills: int, beginning_s: float) -> Iterator[Kill]:
    """Kills the run up to so many times, until it has come to its end and once after that; then lets it end."""
    for _ in range(kills):
        after_the_end = newest(trial.run_dir) == STEPS
        kill = killed(trial, draw, beginning_s)
        if kill is not None:
            yield kill
        if after_the_end:
            break
    to_the_end(trial)


def differences(run_dir: Path, other: Path) -> list[str]:
    """In what two histories differ, the first of each kind; whatever was trained, written down and saved counts."""
    found, steps = [], [line["step"] for line in curve(run_dir)]
    if steps != [*range(1, STEPS + 1)]:
        found.append(f"the updates written down are {steps}")
    # The hash is of the rows and their numbers, so that a batch that is trained twice has two.
    batches = [[(line["batch_index"], line["batch_hash"]) for line in curve(d)] for d in (run_dir, other)]
    if batches[0] != batches[1] or [index for index, _ in batches[0]] != [*range(STEPS)]:
        found.append(f"the batches trained are others: {batches[0]}")
    for name in ("metrics.jsonl", "validation.jsonl"):
        ours, theirs = untimed(run_dir / name), untimed(other / name)
        if ours != theirs:
            first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
            found.append(
                f"{name}: {len(ours)} and {len(theirs)} lines, first {ours[first:][:1]} and {theirs[first:][:1]}"
            )
    # A kill between the last checkpoint and the end of an older one leaves one more: nobody comes to remove it.
    gone = checkpoints(other) - checkpoints(run_dir)
    if gone:
        found.append(f"checkpoints {sorted(gone)} are not there")
    strays = [p.name for p in (run_dir / "checkpoints").iterdir() if not p.name.isdecimal()]
    if strays:
        found.append(f"beside the checkpoints lie {strays}")
    if Checkpoints(run_dir / "checkpoints", read_only=True).newest_intact() != STEPS:
        found.append("the last checkpoint is not intact")
        return found
    ours, theirs = arrays(run_dir, STEPS), arrays(other, STEPS)
    if ours.keys() != theirs.keys():
        found.append("the last checkpoints hold other arrays")
        return found
    unequal = [a for a in ours if ours[a].dtype != theirs[a].dtype or ours[a].tobytes() != theirs[a].tobytes()]
    return [*found, f"arrays of other bits: {unequal}"] if unequal else found


def checkpoints(run_dir: Path) -> set[int]:
    """The numbers of those that are whole."""
    return {int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdecimal()}


def untimed(path: Path) -> list[dict]:
    """A file's lines of JSON without what the clock says."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
