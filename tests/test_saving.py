"""Which checkpoints are made, by number and by process 0's clock, and which stay."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest

from llm_jax.manifest import Kind, retired
from llm_jax.train.config import CheckpointConfig
from llm_jax.train.saving import by_number, longer_lived, make_due
from tests.conftest import Start
from tests.training import STEPS, assert_same_history, lines, train


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def kept_of(kinds: Mapping[int, Kind], keep: int) -> list[int]:
    gone = retired(kinds, keep)
    return [number for number in sorted(kinds) if number not in gone]


def test_who_stays() -> None:
    kinds: dict[int, Kind] = {4: "regular", 8: "permanent", 9: "temporary", 12: "regular", 16: "regular"}
    assert kept_of(kinds, 2) == [8, 12, 16]
    assert kept_of({**kinds, 17: "temporary"}, 2) == [8, 12, 16, 17]  # the newest stays, whatever it is
    assert kept_of({**kinds, 17: "temporary", 20: "regular"}, 2) == [8, 16, 20]
    assert kept_of({}, 1) == []
    assert kept_of({3: "temporary"}, 1) == [3]


def test_what_is_due_by_number() -> None:
    config = CheckpointConfig(every=4, permanent_every=6)
    due = {done: by_number(config, done, 13) for done in range(1, 14)}
    assert {done for done, kind in due.items() if kind == "permanent"} == {6, 12}
    assert {done for done, kind in due.items() if kind == "regular"} == {4, 8, 13}
    assert longer_lived("temporary", None) == "temporary"
    for one, other in itertools.product(("temporary", "regular", "permanent"), repeat=2):
        assert longer_lived(one, other) == max(one, other, key=("temporary", "regular", "permanent").index)
    assert longer_lived(None, None) is None


@pytest.mark.parametrize("seconds", [0.5, 7.0, 500.0])
def test_by_the_clock_a_checkpoint_comes_in_time_and_the_clock_is_asked_seldom(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Every 10 minutes, whatever a step takes; at most a step late."""
    from llm_jax.train import saving

    asked = 0

    def counting(topic: str, mine: str, judge: object) -> str:
        nonlocal asked
        asked += 1
        return judge([mine])  # type: ignore[operator]

    monkeypatch.setattr(saving, "settle", counting)
    clock = Clock()
    due = make_due(CheckpointConfig(every=10**9, minutes=10), 10**9, 100, clock)
    saved_at = [0.0]
    for done in range(101, 101 + int(7200 / seconds)):
        clock.seconds += seconds
        if due(done):
            saved_at.append(clock.seconds)
    gaps = [b - a for a, b in itertools.pairwise(saved_at)]
    assert len(gaps) >= 7 and min(gaps) >= 600 and max(gaps) < 600 + 2 * seconds
    assert asked <= 14 * (len(gaps) + 1)


def test_a_run_saved_by_the_clock_is_the_same_run_and_keeps_the_permanent(
    uninterrupted: Path, start: Start, tmp_path: Path
) -> None:
    """With every update longer than the time between saves there are temporary checkpoints, and they go."""
    run_dir = tmp_path / "run"
    wishes = ("checkpoint.every=10", "checkpoint.keep=1", "checkpoint.permanent_every=6", "checkpoint.minutes=1e-6")
    done = start("-c", LISTING, *train(run_dir, *wishes)[2:]).wait()
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(run_dir)] == list(range(1, STEPS + 1))
    assert_same_history(run_dir, uninterrupted)
    assert sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir()) == [6, 12, 18, 20, 24]
    seen = [line.removeprefix("there: ") for line in done.stdout.splitlines() if line.startswith("there: ")]
    assert "6 10 11" in seen and "6 12 18 20 22" in seen
    assert max(len(entry.split()) for entry in seen) <= 6


# Prints what is there after each save has become whole.
LISTING = """
import sys
from llm_jax.checkpoint import Checkpoints
complete = Checkpoints._complete
def listing(self, *args):
    complete(self, *args)
    print("there:", *self._numbers(), flush=True)
Checkpoints._complete = listing
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
