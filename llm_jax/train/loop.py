"""The loop: evaluate if due, look at the guards, next batch, step, settle the step before, save if due."""

import contextlib
from collections.abc import Callable

from jax import NamedSharding

from llm_jax import exit_codes
from llm_jax.data.loader import open_rows, stream
from llm_jax.mesh import acts
from llm_jax.run import Run
from llm_jax.guards import Guards
from llm_jax.train.ledger import Ledger
from llm_jax.train.profiler import profiled
from llm_jax.train.start import Session
from llm_jax.train.state import TrainState

Act = Callable[[int, TrainState], None]


def train(session: Session, guards: Guards, ledger: Ledger, *, save: Act, validate: Act, validated: int) -> int:
    """Makes updates until train.steps or a signal, saves the last state, and returns the exit code.

    save and validate act on (updates made, state); validated is the last step that was validated before, or -1.
    """
    run, state, done = session.run, session.state, session.done
    rows = open_rows(session.prepared, "train", seed=run.seed)
    batches = stream(
        rows,
        start=int(state.batch_index),
        batch_rows=run.train.batch_rows,
        accumulation=run.train.accumulation,
        sharding=NamedSharding(session.mesh, acts("ABU")),
        prefetch=run.data.prefetch,
    )
    saved, save_due = done, False
    with contextlib.closing(batches), profiled(run.logging, run.run_dir) as profile:
        while True:
            if is_due(run.eval.every, done, run) and done > validated:
                with ledger.pause(saving=False):
                    validate(done, state)
            if done == run.train.steps or guards.stop():
                break
            fetched = next(batches)
            with profile(done + 1):
                state, metrics = session.step(state, fetched.rows_ABU)
            done += 1
            ledger.post(done, metrics, fetched.wait_seconds)
            save_due |= is_due(run.checkpoint.every, done, run)
            if save_due:
                ledger.settle()
            # A checkpoint that was due on a skipped update waits for the next healthy one.
            if save_due and ledger.healthy:
                with ledger.pause(saving=True):
                    save(done, state)
                saved, save_due = done, False
        ledger.settle()
    if saved < done:
        save(done, state)
    session.checkpoints.wait()
    return exit_codes.DONE if done == run.train.steps else guards.exit_code


def is_due(every: int, done: int, run: Run) -> bool:
    """Whether something done every so many updates (0: never) is due after `done` of them; at the end it always is."""
    return every > 0 and (done % every == 0 or done == run.train.steps)
