"""What eval.jsonl holds: one line an evaluation, whatever was killed; and which of them is the best. Imports no jax."""

import fcntl
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EVALUATIONS = "eval.jsonl"
BEST = "best.json"
ROLLBACKS = "rollbacks.jsonl"

# No run makes so many updates; from here on a float no longer counts.
MOST_STEPS = 2**53

Row = Mapping[str, Any]


class Best(NamedTuple):
    """The evaluation with the lowest figure among those of a split."""

    step: int
    split: str
    metric: str
    """bits_per_byte; of masked models, which have none, loss."""
    value: float


def lines(path: Path) -> list[Row]:
    """The JSON objects among a file's lines; without those that were cut short, and none where there is no file."""
    rows: list[Row] = []
    if not path.exists():
        return rows
    for raw in path.read_bytes().split(b"\n"):
        row = _parsed(raw)
        if row is not None:
            rows.append(row)
    return rows


def add(path: Path, row: Row) -> None:
    """Adds a line that is on the disk when this returns. A line before it that was cut short is taken away.

    Whoever else adds one waits. Raises OSError.
    """
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _mend(file.fileno())
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _mend(descriptor: int) -> None:
    """Ends the last line: what somebody was killed in the middle of writing goes, what lacks only its end gets it."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    content = os.pread(descriptor, size, 0)
    start = content.rfind(b"\n") + 1
    if _parsed(content[start:]) is None:
        os.ftruncate(descriptor, start)
    else:
        os.write(descriptor, b"\n")


def standing(rows: Iterable[Row], rollbacks: Collection[Row]) -> list[Row]:
    """The evaluations of held-out text that stand: the newest of each step and split, in that order.

    What a run went back from is not among them: its checkpoints are gone, and another one may have their number.
    """
    newest: dict[tuple[int, str], Row] = {}
    for row in rows:
        step, split = row.get("step"), row.get("split")
        if not (isinstance(step, int) and 0 <= step < MOST_STEPS and isinstance(split, str)):
            continue  # another harness's figures, or nobody's
        if not abandoned(step, row.get("rolled_back"), rollbacks):
            newest[step, split] = row
    return [newest[key] for key in sorted(newest)]


def last_rollback(rollbacks: Iterable[Row]) -> float | None:
    """When the run last went back, by the trainer's clock; None where it never did. A row's `rolled_back`."""
    return max((_number(back.get("time")) for back in rollbacks), default=None)


def abandoned(step: int, rolled_back: Any, rollbacks: Iterable[Row]) -> bool:
    """Whether the run has left a checkpoint behind that was there when it had last gone back at that time."""
    before = -math.inf if rolled_back is None else _number(rolled_back)
    return any(_number(back.get("time")) > before and _number(back.get("to_step")) < step for back in rollbacks)


def best_of(rows: Sequence[Row], split: str) -> Best | None:
    """The best of standing rows of a split: those with the newest one's stride, since another is another measure."""
    own = [row for row in rows if row["split"] == split]
    if not own:
        return None
    own = [row for row in own if row.get("stride") == own[-1].get("stride")]
    found: list[Best] = []
    for row in own:
        metric = "loss" if row.get("bits_per_byte") is None else "bits_per_byte"
        value = _number(row.get(metric))
        if math.isfinite(value):
            found.append(Best(row["step"], split, metric, value))
    return min(found, key=lambda best: (best.value, best.step), default=None)


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _parsed(raw: bytes) -> Row | None:
    try:
        row = json.loads(raw)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
