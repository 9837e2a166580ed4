"""Going back: to the checkpoint before the updates that were skipped, and on from there with the batches after them."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import durable, exit_codes
from llm_jax.checkpoint import Checkpoints
from llm_jax.eval.history import ROLLBACKS
from llm_jax.train.ledger import Wish
from llm_jax.train.state import TrainState


class GivenUp(exit_codes.Failure):
    """Going back has not helped."""

    exit_code = exit_codes.NON_FINITE


def check(wish: Wish, rollbacks: int, window: int) -> None:
    """Raises GivenUp where the run has gone back as often as it may."""
    if wish.rollbacks >= rollbacks:
        often = {0: "", 1: ", after going back once"}.get(rollbacks, f", after going back {rollbacks} times")
        raise GivenUp(
            f"{wish.skips} of the last {window} updates were skipped, up to step {wish.step}: not finite, or spikes"
            f"{often}; given up"
        )


def target(checkpoints: Checkpoints, wish: Wish) -> int | None:
    """The newest intact checkpoint before the first skipped update; else the oldest there is; None without any."""
    before = checkpoints.newest_intact(before=wish.first_skip)
    return before if before is not None else min(checkpoints.steps(), default=None)


def moved_on(state: TrainState, wish: Wish) -> TrainState:
    """A restored state that goes on with the batch after the wish's, and counts one rollback more."""
    batch_index, rollbacks = wish.batch_index + 1, wish.rollbacks + 1

    @jax.jit
    def move(state: TrainState) -> TrainState:
        return dataclasses.replace(state, batch_index=jnp.int32(batch_index), rollbacks=jnp.int32(rollbacks))

    return move(state)


def line(wish: Wish, step: int) -> dict[str, Any]:
    """What rollbacks.jsonl says of it."""
    return {
        "rollback": wish.rollbacks + 1,
        "from_step": wish.step,
        "first_skipped": wish.first_skip,
        "skipped": wish.skips,
        "to_step": step,
        "next_batch": wish.batch_index + 1,
        "time": round(time.time(), 3),
    }


def tell(wish: Wish, step: int) -> str:
    """The line for people."""
    return (
        f"{wish.skips} of the recent updates were skipped, from step {wish.first_skip} to {wish.step}: "
        f"going back to step {step}, and on with batch {wish.batch_index + 1}"
    )


def record(run_dir: str | os.PathLike[str], line: dict[str, Any]) -> None:
    """Adds a rollback to the run's list; one of the same number, of a life that was killed, gives way."""
    path = Path(run_dir, ROLLBACKS)
    known = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    kept = [other for other in known if other["rollback"] < line["rollback"]]
    with durable.told(path):
        durable.replace(path, "".join(json.dumps(entry) + "\n" for entry in [*kept, line]).encode())
