"""One attempt at a run: from wherever its directory stands to the end, or to the signal that stops it."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax import Array

from llm_jax import config, durable, exit_codes
from llm_jax.checkpoint import Checkpoints
from llm_jax.data.loader import open_rows
from llm_jax.eval.validation import Validate, make_validation
from llm_jax.guards import Guards
from llm_jax.manifest import Kind
from llm_jax.mesh import compiled_for_one_call, told_slices
from llm_jax.model import backends
from llm_jax.model.paths import to_tree
from llm_jax.model.transformer import Weights
from llm_jax.processes import settle
from llm_jax.run import Run
from llm_jax.run_directory import agree_on_directory, sole_trainer
from llm_jax.train import environment, rollback
from llm_jax.train.flops import CONVENTION, flops_per_token, parameters, peak_flops
from llm_jax.train.ledger import GoBack, Ledger, Wish
from llm_jax.train.loop import Acts, train
from llm_jax.train.metrics import open_log, short
from llm_jax.train.replay import differing, tell_difference
from llm_jax.train.start import (
    Programs,
    Session,
    begin,
    checkpoint_meta,
    compile_programs,
    data_of,
    mesh_of,
    state_at,
)
from llm_jax.train.state import TrainState
from llm_jax.train.watchdog import Watchdog

Report = Callable[[str], None]


def attempt(run: Run, *, allow_drift: bool) -> int:
    """Prepares, resumes or begins, trains; returns the exit code. Needs the job's processes joined."""

    def report(line: str) -> None:
        if jax.process_index() == 0:
            with durable.told("stdout"):
                print(line, flush=True)

    started = time.monotonic()
    mesh = mesh_of(run)
    with Guards() as guards, sole_trainer(run.run_dir), jax.set_mesh(mesh):
        agree_on_directory(run.run_dir)
        with Watchdog(run.run_dir, run.watchdog) as watch:
            watch.at("prepare", 0)
            prepared = data_of(run, report, guards.heard)
            if prepared is None or guards.stop():
                return unsaved(guards, report)
            watch.at("restore", 0)
            with contextlib.closing(Checkpoints(Path(run.run_dir, "checkpoints"), keep=run.checkpoint.keep)) as kept:
                session = begin(run, mesh, prepared, kept, allow_drift=allow_drift, report=report)
                if session is None:
                    report(f"{run.run_dir} is finished after {run.train.steps} steps; next: llm-jax eval {run.run_dir}")
                    return exit_codes.DONE
                if guards.stop():
                    return unsaved(guards, report)
                watch.at("compile", session.done)
                programs = compile_programs(session.run, mesh, prepared.tokenizer.word_starts, report)
                if guards.stop():
                    return unsaved(guards, report)
                describe(session, report)
                report(f"ready for step {session.done + 1} after {time.monotonic() - started:.1f} s")
                return live(session, programs, guards, watch, report)


def live(session: Session, programs: Programs, guards: Guards, watch: Watchdog, report: Report) -> int:
    """The loop; and where too many updates were skipped, back to before them and on, until that has not helped."""
    run = session.run
    while True:
        try:
            code = go(session, programs, guards, watch)
            report(farewell(run, code))
            return code
        except GoBack as too_many:
            wish = too_many.wish
        # Out of the handler, whose traceback keeps the state of the history that is left.
        try:
            rollback.check(wish, run.spikes.rollbacks, run.spikes.window)
        except rollback.GivenUp as given_up:
            # Told and returned, not raised: all processes came to this, and they leave together.
            if jax.process_index() == 0:
                print(given_up, file=sys.stderr)
            return given_up.exit_code
        watch.at("restore", wish.step)
        session = gone_back(session, wish, report)


def gone_back(session: Session, wish: Wish, report: Report) -> Session:
    """The session at the checkpoint before the first skipped update, and past the batches that were skipped."""
    run, checkpoints = session.run, session.checkpoints
    step = rollback.target(checkpoints, wish)
    report(rollback.tell(wish, step or 0))
    state = state_at(step, run, session.mesh, session.prepared, checkpoints, report)
    checkpoints.remove_after(step or 0)
    if jax.process_index() == 0:
        rollback.record(run.run_dir, rollback.line(wish, step or 0))
    return dataclasses.replace(session, state=rollback.moved_on(state, wish), done=step or 0)


def go(session: Session, programs: Programs, guards: Guards, watch: Watchdog) -> int:
    """The loop with all that it writes: log, checkpoints, looks at held-out rows. Raises GoBack."""
    run = session.run
    device = session.mesh.devices.flat[0]
    flops = flops_per_token(run.model, run.data.seq_len, run.objective)
    peak = peak_flops(device.device_kind, run.model.compute_dtype)
    meta = checkpoint_meta(run, session.prepared, environment.versions())
    name_arrays = jax.jit(to_tree, compiler_options=compiled_for_one_call())
    look = make_look(session) if run.eval.every else no_look
    is_first = jax.process_index() == 0
    if is_first:
        with durable.told(run.run_dir):
            write_run(session)

    with open_log(run.run_dir, session.done, run.train.steps, run.logging, writes=is_first) as log:

        def save(done: int, state: TrainState, kind: Kind) -> None:
            # The lines of the updates that a checkpoint contains are on the disk before it is.
            log.sync()
            session.checkpoints.save(done, name_arrays(state), meta, kind=kind)

        def validate(done: int, state: TrainState) -> None:
            def stop() -> bool:
                watch.at("evaluation", done)
                return guards.stop()

            figures = look((state.params, state.balance), stop)
            if figures is not None:
                log.write_validation({"step": done, **figures})

        def replay(number: int, state: TrainState, rows_ABU: Array) -> dict[str, int]:
            if run.train.replay_every is None or programs.checksums is None or number % run.train.replay_every:
                return {}
            names = differing(programs.checksums, state, rows_ABU)
            if names and is_first:
                print(tell_difference(number, names), file=sys.stderr, flush=True)
            return {"replay_differs": len(names)}

        ledger = Ledger(log, flops, run.tokens_per_step, peak, session.mesh.size, run.spikes.skips)
        validated = int(settle("validated", "", lambda _: str(log.validated)))
        acts = Acts(save, validate, replay)
        return train(session, programs.step, guards, watch, ledger, acts, validated=validated)


def make_look(session: Session) -> Validate:
    """The look at held-out rows. Raises DataError where there are none."""
    return make_validation(
        session.run.model,
        session.run.objective,
        session.run.eval,
        open_rows(session.prepared, "validation"),
        session.prepared.tokenizer.piece_bytes,
        session.prepared.tokenizer.word_starts,
        seed=session.run.seed,
        cross_documents=session.run.data.cross_documents,
    )


def no_look(weights: Weights, stop: Callable[[], bool]) -> None:
    """eval.every = 0: nobody looks."""


def write_run(session: Session) -> None:
    """What the run directory says of itself: config.json, the tokenizer, and one more entry in environment.json."""
    run = session.run
    durable.replace(Path(run.run_dir, "config.json"), f"{config.to_json(run)}\n".encode())
    durable.replace(Path(run.run_dir, "tokenizer.model"), session.prepared.tokenizer.model)
    choices = backends.told(run.model)
    environment.record(run.run_dir, session.done, {"backends": choices, "mesh": dict(session.mesh.shape)})


def describe(session: Session, report: Report) -> None:
    """Tells in four lines what is about to run: model, mesh and backends, length, and what MFU is a share of."""
    run, mesh = session.run, session.mesh
    device = mesh.devices.flat[0]
    epochs = run.train.steps * run.train.batch_rows / session.prepared.rows_info["splits"]["train"]["rows"]
    report(
        f"model: {short(parameters(run.model))} parameters, {run.model.n_layers} layers of width {run.model.d_model}"
    )
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    choices = ", ".join(f"{name.replace('_', ' ')} {choice}" for name, choice in backends.told(run.model).items())
    report(f"mesh: {axes} ({mesh.size} {device.device_kind}){told_slices(mesh, run.mesh.slices)}; {choices}")
    report(f"training: {run.train.steps} steps of {run.tokens_per_step} tokens, {epochs:.2f} times through the text")
    peak = peak_flops(device.device_kind, run.model.compute_dtype)
    told = (
        "no peak is known for this device, so no MFU" if peak is None else f"MFU of {short(peak)}FLOP/s by {CONVENTION}"
    )
    report(told)


def farewell(run: Run, code: int) -> str:
    """The last line: how it ended, and what to type next."""
    if code == exit_codes.DONE:
        return f"done: {run.train.steps} steps; next: llm-jax eval {run.run_dir}"
    return f"saved in {run.run_dir}; the same command goes on from there"


def unsaved(guards: Guards, report: Report) -> int:
    """Stopped before the first step: tells so, and returns the exit code."""
    report("stopped before the first step, with nothing new to save; the same command goes on from there")
    return guards.exit_code
