"""When a checkpoint is due: by the number of updates, and by process 0's clock."""

import time
from collections.abc import Callable

from llm_jax.manifest import Kind
from llm_jax.processes import settle
from llm_jax.train.config import CheckpointConfig

# The longest-lived last.
KINDS: tuple[Kind, ...] = ("temporary", "regular", "permanent")


def by_number(config: CheckpointConfig, done: int, steps: int) -> Kind | None:
    """The kind of checkpoint that is due after `done` of `steps` updates whatever the clock says, if one is."""
    if config.permanent_every is not None and done % config.permanent_every == 0:
        return "permanent"
    return "regular" if done % config.every == 0 or done == steps else None


def longer_lived(one: Kind | None, other: Kind | None) -> Kind | None:
    """Of two kinds that are due, the one that is kept longer."""
    return next((kind for kind in reversed(KINDS) if kind in (one, other)), None)


def make_due(
    config: CheckpointConfig, steps: int, done: int, clock: Callable[[], float] = time.monotonic
) -> Callable[[int], Kind | None]:
    """The function from updates made, one more at every call, to the kind of checkpoint that is due then.

    All processes get the same answers: the clock, in seconds, is process 0's. It is asked seldom, and ever more often
    as the time comes near: after half of the updates that are expected until then, each time.
    """
    saved_at, saved_after, ask_after = clock(), done, done + 1

    def judge(done: int) -> str:
        """Updates until the next question; 0: now."""
        assert config.minutes is not None
        passed = clock() - saved_at
        left = config.minutes * 60 - passed
        each = passed / (done - saved_after)
        return "0" if left <= 0 else str(max(1, int(min(left / max(each, 1e-9), 2**31) / 2)))

    def due(done: int) -> Kind | None:
        nonlocal saved_at, saved_after, ask_after
        kind = by_number(config, done, steps)
        if kind is None and config.minutes is not None and done >= ask_after:
            wait = int(settle("temporary checkpoint", "", lambda _: judge(done)))
            ask_after = done + wait
            kind = "temporary" if wait == 0 else None
        if kind is not None:
            saved_at, saved_after, ask_after = clock(), done, done + 1
        return kind

    return due
