"""From a Run to everything the loop needs: mesh, data, compiled step, and the state, new or restored."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, NamedSharding
from jax.sharding import Mesh
from jax.stages import Traced

from llm_jax import config
from llm_jax.checkpoint import Checkpoints
from llm_jax.config import ConfigError
from llm_jax.data.prepare import Prepared, Stopped, open_prepared, prepare
from llm_jax.mesh import acts, compiled_for_one_call, make_mesh
from llm_jax.model.backends import resolve
from llm_jax.model.paths import from_tree, placed, to_tree
from llm_jax.model.transformer import abstract_model
from llm_jax.processes import settle
from llm_jax.run import FREE_TO_CHANGE, Run, check_mesh, mesh_sizes
from llm_jax.run_directory import Refused
from llm_jax.train.metrics import VALIDATION, last_step
from llm_jax.train.replay import Checksums, make_checksums
from llm_jax.train.state import TrainState, abstract_state, init_state, with_weights
from llm_jax.train.step import Metrics, make_gradient, make_step

FORMAT = 1

# What depends on platform and mesh is settled anew at every start.
PLATFORM = ("model.attention", "model.logit_chunk", "model.moe.exchange", "model.moe.grouped_matmul")

Step = Callable[[TrainState, Array], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Session:
    """Where a run stands; `done` is the number of updates that `state` has seen."""

    run: Run
    mesh: Mesh
    prepared: Prepared
    checkpoints: Checkpoints
    state: TrainState
    done: int


class Programs(NamedTuple):
    """What was compiled; checksums are of the gradient alone, where it is to be replayed."""

    step: Step
    checksums: Callable[[TrainState, Array], Checksums] | None


def mesh_of(run: Run) -> Mesh:
    """The run's mesh on the job's devices. Raises ConfigError where it does not fit them, or the run it."""
    sizes = mesh_sizes(run.mesh, jax.device_count())
    check_mesh(run, sizes)
    used = math.prod(sizes.values())
    if used < jax.device_count():
        if jax.process_count() > 1:
            raise ConfigError(
                f"the mesh uses {used} of {jax.device_count()} devices; with several processes it uses all"
            )
        print(f"the mesh uses {used} of {jax.device_count()} devices")
    return make_mesh(sizes, slices=run.mesh.slices)


def data_of(run: Run, report: Callable[[str], None], stop: Callable[[], bool]) -> Prepared | None:
    """The run's prepared data; what is missing is made first, by process 0. None where stop, asked by it, said so."""
    wanted = (run.data, run.tokenizer, run.model.vocab_size, run.seed)

    def make(_: list[str]) -> str:
        try:
            prepare(*wanted, report=report, stop=stop)
        except Stopped:
            return "stopped"
        return ""

    # Tokenising a large corpus takes process 0 hours, and the others have nothing else to do.
    outcome = settle("data", "", make, timeout_s=7 * 24 * 3600)
    return open_prepared(*wanted) if outcome == "" else None


def begin(
    run: Run,
    mesh: Mesh,
    prepared: Prepared,
    checkpoints: Checkpoints,
    *,
    allow_drift: bool,
    report: Callable[[str], None],
) -> Session | None:
    """Restores the newest checkpoint, or makes the first state; None for a finished run. Needs the mesh set.

    Raises Refused where a checkpoint was made by another config (unless allowed), weights or tokenizer.
    """
    platform = mesh.devices.flat[0].platform
    run = run.model_copy(update={"model": resolve(run.model, platform, mesh.shape["expert"])})
    newest = checkpoints.newest_intact()
    if newest is not None:
        refuse_drift(checkpoints.meta(newest), run, prepared, allow_drift, report)
        if newest == run.train.steps and is_looked_at(run):
            return None
    state = state_at(newest, run, mesh, prepared, checkpoints, report)
    return Session(run, mesh, prepared, checkpoints, state, done=newest or 0)


def is_looked_at(run: Run) -> bool:
    """Whether the last look at held-out rows, if there is to be one, was written down: it may come after the last save.

    By what process 0 finds.
    """
    if not run.eval.every:
        return True
    last = settle("last look", "", lambda _: str(last_step(Path(run.run_dir, VALIDATION))))
    return int(last) >= run.train.steps


def state_at(
    step: int | None,
    run: Run,
    mesh: Mesh,
    prepared: Prepared,
    checkpoints: Checkpoints,
    report: Callable[[str], None],
) -> TrainState:
    """The state of a checkpoint; for None the first one, from the seed or with another run's weights."""
    abstract = abstract_state(run.model, run.optim, run.spikes)
    if step is not None:
        tree = checkpoints.restore(step, placed(jax.eval_shape(to_tree, abstract), mesh))
        state = jax.jit(lambda tree: from_tree(tree, abstract), compiler_options=compiled_for_one_call())(tree)
        report(f"resumed from {checkpoints.directory / str(step)}")
        return state
    if run.train.init_from is not None:
        return start_from(run.train.init_from, run, prepared, abstract, mesh, report)
    first = jax.jit(
        lambda: init_state(run.model, run.optim, run.seed, run.spikes), compiler_options=compiled_for_one_call()
    )
    return first()


def compile_programs(run: Run, mesh: Mesh, word_starts_V: np.ndarray, report: Callable[[str], None]) -> Programs:
    """The run's update, compiled once for its shapes and mesh: a call with others is an error, not a recompile."""
    started = time.monotonic()
    compiled = trace_step(run, mesh, word_starts_V).lower().compile()
    checksums = None
    if run.train.replay_every is not None:
        gradient_of = make_gradient(
            run.model,
            run.objective,
            cross_documents=run.data.cross_documents,
            seed=run.seed,
            word_starts_V=word_starts_V,
        )
        checksums = jax.jit(make_checksums(gradient_of)).lower(*abstract_inputs(run, mesh)).compile()
    report(f"compiled the step in {time.monotonic() - started:.1f} s")
    return Programs(compiled, checksums)


def trace_step(run: Run, mesh: Mesh, word_starts_V: np.ndarray) -> Traced:
    """The run's update as it is compiled for training, traced; needs the mesh set, allocates nothing.

    run: its model resolved for the mesh's platform.
    """
    step = make_step(
        run.model,
        run.objective,
        run.optim,
        steps=run.train.steps,
        cross_documents=run.data.cross_documents,
        seed=run.seed,
        word_starts_V=word_starts_V,
        spikes=run.spikes,
    )
    return jax.jit(step, donate_argnums=0).trace(*abstract_inputs(run, mesh))


def abstract_inputs(run: Run, mesh: Mesh) -> tuple[TrainState, jax.ShapeDtypeStruct]:
    """Shapes and shardings of what the update takes: the state, and a batch's rows_ABU."""
    A = run.train.accumulation
    shape = (A, run.train.batch_rows // A, run.data.seq_len + 1)
    rows_ABU = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, acts("ABU")))
    return placed(abstract_state(run.model, run.optim, run.spikes), mesh), rows_ABU


def start_from(
    other: str, run: Run, prepared: Prepared, abstract: TrainState, mesh: Mesh, report: Callable[[str], None]
) -> TrainState:
    """Step 0 with the newest weights of another run; its tokenizer must be this run's."""
    checkpoints = Checkpoints(Path(other, "checkpoints"), read_only=True)
    newest = checkpoints.newest_intact()
    if newest is None:
        raise Refused(f"train.init_from = {other!r}: no checkpoint there")
    if checkpoints.meta(newest)["tokenizer"] != prepared.tokenizer.fingerprint:
        raise Refused(f"train.init_from = {other!r}: its tokenizer is another one")
    wanted = {"params": abstract.params, "balance": abstract.balance}
    tree = checkpoints.restore(newest, placed(jax.eval_shape(to_tree, wanted), mesh))
    report(f"weights from {checkpoints.directory / str(newest)}")

    @jax.jit
    def start(tree: Any) -> TrainState:
        weights = from_tree(tree, wanted)
        return with_weights(weights["params"], weights["balance"], run.optim, run.spikes)

    return start(tree)


def checkpoint_meta(run: Run, prepared: Prepared, versions: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint says of itself, beside its arrays."""
    return {
        "format": FORMAT,
        "run": config.tree(run),
        "tokenizer": prepared.tokenizer.fingerprint,
        "data": prepared.fingerprint,
        "versions": versions,
    }


def refuse_drift(
    meta: dict[str, Any], run: Run, prepared: Prepared, allow_drift: bool, report: Callable[[str], None]
) -> None:
    """Raises Refused, with the differences, where going on would not be the run that was begun."""
    if meta["tokenizer"] != prepared.tokenizer.fingerprint:
        raise Refused(f"{run.run_dir} was trained with another tokenizer; choose another run_dir")
    then = config.from_json(Run, json.dumps(meta["run"]))
    if shapes_of(then) != shapes_of(run):
        raise Refused(
            f"{run.run_dir} holds weights of other shapes; choose another run_dir\n{_lines(meta['run'], run)}"
        )
    drift = [d for d in config.diff(meta["run"], config.tree(run)) if not _is_free(d.path)]
    lines = [f"  {d.path}: {d.old!r} -> {d.new!r}" for d in drift]
    if meta["data"] != prepared.fingerprint:
        lines.append("  the prepared data: its text has changed since")
    if lines and not allow_drift:
        raise Refused(
            f"{run.run_dir} was begun with another config; go on with the old values, choose another run_dir, "
            "or pass --allow-drift:\n" + "\n".join(lines)
        )
    for line in lines:
        report(f"allowed drift: {line.strip()}")


def shapes_of(run: Run) -> Any:
    """Shape and type of every weight, by its checkpoint path."""
    _, params, balance = abstract_model(run.model)
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), jax.eval_shape(to_tree, (params, balance)))


def _lines(old: dict[str, Any], run: Run) -> str:
    differences = config.diff(old, config.tree(run))
    return "\n".join(f"  {d.path}: {d.old!r} -> {d.new!r}" for d in differences if not _is_free(d.path))


def _is_free(path: str) -> bool:
    return path in PLATFORM or any(path == free or path.startswith(f"{free}.") for free in FREE_TO_CHANGE)
