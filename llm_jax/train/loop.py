"""The loop: evaluate if due, look at the guards, next batch, step, settle the step before, save if due."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from jax import Array, NamedSharding

from llm_jax import exit_codes
from llm_jax.data.loader import open_rows, stream
from llm_jax.guards import Guards
from llm_jax.manifest import Kind
from llm_jax.mesh import acts as placement
from llm_jax.run import Run
from llm_jax.train.ledger import Ledger
from llm_jax.train.profiler import profiled
from llm_jax.train.recompiles import watched
from llm_jax.train.saving import longer_lived, make_due
from llm_jax.train.start import Session, Step
from llm_jax.train.state import TrainState
from llm_jax.train.watchdog import Watchdog


class Acts(NamedTuple):
    """What the loop does beside updates.

    save: with a checkpoint's kind, and validate: on (updates made, state); replay: on the next update's number, state
    and batch, with what is to be noted beside its metrics.
    """

    save: Callable[[int, TrainState, Kind], None]
    validate: Callable[[int, TrainState], None]
    replay: Callable[[int, TrainState, Array], dict[str, int]]


def train(
    session: Session, step: Step, guards: Guards, watch: Watchdog, ledger: Ledger, acts: Acts, *, validated: int
) -> int:
    """Makes updates until train.steps or a signal, saves the last state, and returns the exit code.

    validated is the last step that was validated before, or -1. Raises GoBack where too many updates were skipped.
    """
    run, state, done = session.run, session.state, session.done
    rows = open_rows(session.prepared, "train", seed=run.seed)
    batches = stream(
        rows,
        start=int(state.batch_index),
        batch_rows=run.train.batch_rows,
        accumulation=run.train.accumulation,
        sharding=NamedSharding(session.mesh, placement("ABU")),
        prefetch=run.data.prefetch,
    )
    due = make_due(run.checkpoint, run.train.steps, done)
    saved: int = done
    save_due: Kind | None = None
    with contextlib.closing(batches), profiled(run.logging, run.run_dir) as profile, watched() as recompiles:
        while True:
            if is_due(run.eval.every, done, run) and done > validated:
                watch.at("evaluation", done)
                with ledger.pause(saving=False):
                    acts.validate(done, state)
                recompiles.over("evaluation")
            if done == run.train.steps or guards.stop():
                break
            watch.at("data", done)
            fetched = next(batches)
            watch.at("step", done)
            noted = acts.replay(done + 1, state, fetched.rows_ABU)
            with profile(done + 1):
                state, metrics = step(state, fetched.rows_ABU)
            done += 1
            recompiles.over("step")
            ledger.post(done, {**metrics, **noted, **recompiles.noted()}, fetched.wait_seconds)
            save_due = longer_lived(save_due, due(done))
            if save_due:
                ledger.settle()
            # A checkpoint that was due on a skipped update waits for the next healthy one.
            if save_due and ledger.healthy:
                watch.at("checkpoint", done)
                with ledger.pause(saving=True):
                    acts.save(done, state, save_due)
                recompiles.over("checkpoint")
                saved, save_due = done, None
        ledger.settle()
    watch.at("checkpoint", done)
    if saved < done:
        acts.save(done, state, save_due or "temporary")
    session.checkpoints.wait()
    return exit_codes.DONE if done == run.train.steps else guards.exit_code


def is_due(every: int, done: int, run: Run) -> bool:
    """Whether something done every so many updates (0: never) is due after `done` of them; at the end it always is."""
    return every > 0 and (done % every == 0 or done == run.train.steps)
