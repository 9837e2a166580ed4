"""What a watcher does next, from nothing but what lies in the run's directory."""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llm_jax import durable
from llm_jax.checkpoint import RECORD
from llm_jax.eval.history import (
    BEST,
    EVALUATIONS,
    ROLLBACKS,
    Row,
    abandoned,
    best_of,
    last_rollback,
    lines,
    standing,
)
from llm_jax.manifest import Damaged, Kind, numbers, read

# Between two looks at the directory; a signal waits no longer than this either.
LOOK_S = 1.0
# Who waits says so again after this long.
REMINDER_S = 600.0

# When a checkpoint's folder got its last file, in ns: another checkpoint of the same number has another.
Mark = int


class Turn(NamedTuple):
    """What is next; the rest is said where it is a checkpoint."""

    what: Literal["evaluate", "wait", "end"]
    step: int = 0
    is_last: bool = False
    """Whether it is the state after the run's last update."""
    rolled_back: float | None = None
    """When the run had last gone back, by its own clock."""


@dataclasses.dataclass
class Seen:
    """A checkpoint of which there was a sign."""

    mark: Mark
    kind: Kind
    rolled_back: float | None
    there: bool = True
    passed_over: bool = False
    """It is there, and cannot be evaluated."""


@dataclasses.dataclass
class Agenda:
    """What is asked of a run's checkpoints, and what process 0 has seen of them in this life."""

    run_dir: Path
    split: str
    tasks: frozenset[str]
    seen: dict[int, Seen] = dataclasses.field(default_factory=dict)
    missed: list[int] = dataclasses.field(default_factory=list)
    looked: float = -math.inf
    said: str = ""
    """What it waits for, as last told."""
    said_at: float = -math.inf


def is_there(known: Agenda) -> str:
    """The run's directory; empty, and told, where there is none yet."""
    if known.run_dir.is_dir():
        return str(known.run_dir)
    _say(known, f"waiting for {known.run_dir}, which is not there yet")
    return ""


def look(known: Agenda, *, at_least_s: float = LOOK_S) -> None:
    """Notes which checkpoints are there; not again within at_least_s."""
    if time.monotonic() - known.looked < at_least_s:
        return
    known.looked = time.monotonic()
    while True:
        # What goes back removes checkpoints, then says so: seen between two equal answers, they belong to that one.
        before = _rollbacks(known)
        there = _there(known)
        if before == _rollbacks(known):
            break
    for step, (mark, kind) in there.items():
        if step not in known.seen or known.seen[step].mark != mark:
            known.seen[step] = Seen(mark, kind, last_rollback(before))
    for step, seen in known.seen.items():
        seen.there = step in there


def decide(known: Agenda) -> Turn:
    """The next checkpoint to evaluate, if there is one; where the last has been, the end. Keeps best.json, and tells.

    Raises DiskError.
    """
    look(known, at_least_s=0)
    keep_best(known)
    done = {row["step"] for row in _rows(known) if row["split"] == known.split and known.tasks <= _tasks(row)}
    rollbacks = _rollbacks(known)
    for step in [step for step, seen in known.seen.items() if not seen.there]:
        seen = known.seen.pop(step)
        if seen.kind != "temporary" and step not in done and not abandoned(step, seen.rolled_back, rollbacks):
            known.missed.append(step)
            _print(f"checkpoint {step} of {known.run_dir} was removed before it could be evaluated: missed")
    staying = sorted(step for step, seen in known.seen.items() if seen.kind != "temporary")
    for step in staying:
        if step not in done and not known.seen[step].passed_over:
            steps = _updates(known, step)
            return Turn("evaluate", step, steps is not None and step >= steps, known.seen[step].rolled_back)
    if not staying:
        _say(known, f"waiting: {known.run_dir} has no checkpoint to evaluate yet")
        return Turn("wait")
    steps = _updates(known, staying[-1])
    if staying[-1] in done and steps is not None and staying[-1] >= steps:
        _print(_farewell(known, staying[-1]))
        return Turn("end")
    _say(known, f"waiting: the newest checkpoint of {known.run_dir} is {staying[-1]}, the last will be {steps}")
    return Turn("wait")


def pass_over(known: Agenda, step: int, problem: str) -> None:
    """Notes that a checkpoint could not be evaluated: one that is gone was missed, which the next turn says."""
    look(known, at_least_s=0)
    seen = known.seen.get(step)
    if seen is not None and seen.there:
        seen.passed_over = True
        _print(f"{problem}; checkpoint {step} is passed over")


def keep_best(known: Agenda) -> None:
    """Makes best.json say what eval.jsonl says. Raises DiskError."""
    best = best_of(_rows(known), known.split)
    path = known.run_dir / BEST
    with durable.told(path):
        there = path.read_bytes() if path.exists() else None
        wanted = None if best is None else json.dumps(best._asdict()).encode() + b"\n"
        if wanted is not None and wanted != there:
            durable.replace(path, wanted)
        elif wanted is None and there is not None:
            path.unlink()


def in_words(known: Agenda, row: Mapping[str, Any]) -> str:
    """An evaluation in a line."""
    best = best_of(_rows(known), known.split)
    parts = [
        f"{row[name]:{form}}{unit}"
        for name, form, unit in (("bits_per_byte", ".3f", " bits per byte"), ("loss", ".4f", " nats a token"))
        if row[name] is not None
    ]
    parts += [f"accuracy {row['accuracy']:.1%}"] * (row["accuracy"] is not None)
    everything = (row["suite"] or {}).get("all")
    if everything is not None:
        parts.append(f"suite {everything['accuracy']['value']:.3f}")
    standing = "" if best is None else "; the best so far" if best.step == row["step"] else f"; the best is {best.step}"
    return f"step {row['step']}, {known.split} text: {', '.join(parts)}{standing}"


def _farewell(known: Agenda, last: int) -> str:
    best = best_of(_rows(known), known.split)
    parts = [f"{known.run_dir}: checkpoint {last} is the last, and is evaluated"]
    if best is not None:
        parts.append(f"the best is {best.step}, with {best.value:.4f} {best.metric.replace('_', ' ')}")
    if known.missed:
        parts.append(f"{len(known.missed)} missed: {', '.join(map(str, known.missed))}")
    return "; ".join(parts)


def _there(known: Agenda) -> dict[int, tuple[Mark, Kind]]:
    there: dict[int, tuple[Mark, Kind]] = {}
    for step in numbers(known.run_dir / "checkpoints"):
        folder = known.run_dir / "checkpoints" / str(step)
        seen = known.seen.get(step)
        try:
            mark = folder.stat().st_mtime_ns
            there[step] = (mark, seen.kind if seen is not None and seen.mark == mark else _kind(folder))
        except OSError:
            continue  # removed in this moment
    return there


def _kind(folder: Path) -> Kind:
    """How long a checkpoint stays; of a damaged one the evaluation will tell. Raises OSError where it is gone."""
    try:
        return read(folder).kind
    except Damaged:
        folder.stat()
        return "regular"


def _updates(known: Agenda, step: int) -> int | None:
    """How many updates a checkpoint's run makes; None where it does not say."""
    try:
        record = json.loads((known.run_dir / "checkpoints" / str(step) / RECORD).read_bytes())
        return int(record["meta"]["run"]["train"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rollbacks(known: Agenda) -> list[Row]:
    return _lines(*_version(known.run_dir / ROLLBACKS))


def _rows(known: Agenda) -> list[Row]:
    return standing(_lines(*_version(known.run_dir / EVALUATIONS)), _rollbacks(known))


def _version(path: Path) -> tuple[Path, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return path, 0, 0
    return path, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=4)
def _lines(path: Path, mtime_ns: int, size: int) -> list[Row]:
    """A file's lines, read once as long as it does not change."""
    return lines(path)


def _tasks(row: Row) -> frozenset[str]:
    tasks = row.get("tasks")
    return frozenset(tasks) if isinstance(tasks, dict) else frozenset()


def _say(known: Agenda, waiting: str) -> None:
    """What it waits for, once; and again after a while."""
    if waiting != known.said or time.monotonic() - known.said_at > REMINDER_S:
        known.said, known.said_at = waiting, time.monotonic()
        _print(waiting)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
