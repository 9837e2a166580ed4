"""Who stands still: how long a phase may take, and the culprit from two looks at every process's heartbeat."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from llm_jax.train.config import WatchdogConfig

Phase = Literal["prepare", "restore", "compile", "data", "step", "checkpoint", "evaluation"]
Ended = Literal["", "done", "failed"]

# A line that names a thousand processes names nobody.
NAMED = 8


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a process is. All processes of a job go through the same sequence, so their numbers can be compared."""

    number: int
    """How many phases it has begun."""
    phase: Phase
    step: int
    """Updates made before."""
    first: bool
    """Whether this is the first time, which may have to compile."""


@dataclasses.dataclass(frozen=True)
class Beat:
    """A heartbeat, as other processes read it."""

    attempt: str
    counter: int
    """Rises by one a second while the process lives; only ever compared with itself."""
    progress: int
    phase: str
    step: int
    host: str
    pid: int
    ended: Ended
    """How the process has left its work, or nothing while it is at it."""


# Process -> its heartbeat, without those that have none.
Look = Mapping[int, Beat]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Who holds the job up."""

    culprit: str
    """In words."""
    absent: tuple[int, ...] = ()
    """The processes that do not live, and that nobody needs to wait for."""


def limit_s(config: WatchdogConfig, progress: Progress, median_step_s: float | None) -> float:
    """Seconds that a process may spend where it is; median_step_s is None before the first measured step."""
    match progress.phase:
        case "prepare":
            limit = config.prepare_s
        case "restore":
            limit = config.restore_s
        case "checkpoint":
            limit = config.checkpoint_s
        case "compile":
            limit = config.compile_s
        case "data" | "step" | "evaluation":
            usual = max(config.factor * (median_step_s or 0.0), config.floor_s)
            limit = max(config.compile_s, usual) if progress.first else usual
    return limit + config.grace_s


def overdue(waited: int, limit: float) -> int:
    """Ticks since the limit was passed, negative before; waited ticks mean that at least as many seconds are over."""
    return waited - math.ceil(limit)


def judge(before: Look, after: Look, processes: int, me: int) -> Verdict:
    """The culprit among so many processes, from two looks of process `me` that lie a few heartbeats apart."""
    if processes == 1:
        return Verdict("the only process makes no progress")
    if me not in before or me not in after or after[me].counter == before[me].counter:
        return Verdict("nobody can be named: heartbeats cannot be written or read")
    failed = [p for p, beat in after.items() if beat.ended == "failed"]
    if failed:
        return Verdict(f"{_named(failed, after)} ended with an error", (*failed, *_still(before, after, processes)))
    still = _still(before, after, processes)
    if still:
        silent = "has no heartbeat" if not any(p in after for p in still) else "stands still"
        return Verdict(f"{_named(still, after)} {silent}", tuple(still))
    working = {p: beat for p, beat in after.items() if not beat.ended}
    least = min(beat.progress for beat in working.values())
    behind = [p for p, beat in working.items() if beat.progress == least]
    if len(behind) == len(working):
        return Verdict(f"nobody is behind ({_place(working[behind[0]])}): a collective or a device hangs")
    return Verdict(f"{_named(behind, after)} is behind the others")


def _still(before: Look, after: Look, processes: int) -> list[int]:
    """The processes without a heartbeat, or with one that did not move; nobody waits for one that has ended."""

    def moves(p: int) -> bool:
        return p in after and (bool(after[p].ended) or p not in before or after[p].counter != before[p].counter)

    return [p for p in range(processes) if not moves(p)]


def _named(processes: Iterable[int], look: Look) -> str:
    """`process 3 (host a, pid 7, last seen in phase data after 5 updates) and process 4`; the first few of many."""
    listed = sorted(processes)
    texts = [f"process {p} ({_who(look[p])})" if p in look else f"process {p}" for p in listed[:NAMED]]
    more = [f"{len(listed) - NAMED} more"] if len(listed) > NAMED else []
    return " and ".join([*texts, *more])


def _who(beat: Beat) -> str:
    return f"host {beat.host}, pid {beat.pid}, last seen {_place(beat)}"


def _place(beat: Beat) -> str:
    return f"in phase {beat.phase} after {beat.step} updates"


def beat_from_json(text: str) -> Beat | None:
    """A heartbeat as it was written, or None for anything else."""
    fields = {field.name for field in dataclasses.fields(Beat)}
    tree = _object(text)
    return Beat(**tree) if tree.keys() == fields else None


@dataclasses.dataclass(frozen=True)
class Alarm:
    """What the alarm's file says: whose attempt this is, and the verdict once there is one."""

    attempt: str
    verdict: Verdict | None


def alarm_to_json(alarm: Alarm) -> str:
    """The alarm's file."""
    return json.dumps(dataclasses.asdict(alarm))


def alarm_from_json(text: str) -> Alarm | None:
    """The alarm as it was written, or None for anything else."""
    match _object(text):
        case {"attempt": str(attempt), "verdict": None}:
            return Alarm(attempt, None)
        case {"attempt": str(attempt), "verdict": {"culprit": str(culprit), "absent": list(absent)}}:
            return Alarm(attempt, Verdict(culprit, tuple(absent)))
    return None


def _object(text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}
