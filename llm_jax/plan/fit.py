"""What to change where a plan does not fit: the cheapest first, estimated, then compiled."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llm_jax.alphabet import ACT_AXES
from llm_jax.config import ConfigError, override
from llm_jax.plan.account import leaves
from llm_jax.plan.compile import Impossible
from llm_jax.plan.memory import estimate
from llm_jax.plan.plan import Plan, fit_mesh, make_plan
from llm_jax.run import check

# Changes that are compiled before the next is left to an estimate.
TRIES = 2


class Change(NamedTuple):
    """Overrides that make a plan fit."""

    overrides: tuple[str, ...]
    needs: float
    """Bytes of a device's memory at the peak."""
    confirmed: bool
    """Compiled; else estimated."""


def cheapest_change(plan: Plan, report: Callable[[str], None]) -> Change | None:
    """The first change that fits, by a compile; by estimate alone where the first few compiles said otherwise.

    None where none is estimated to fit.
    """
    before = estimate(plan.run, plan.axes, plan.state)
    # Of what the compiler refused without a figure only this is known: it is more than there is.
    scale = (plan.compiled.needs or plan.has) / before
    promising: list[Change] = []
    for overrides in changes(plan):
        try:
            needs = scale * estimate_of(plan, overrides)
        except ConfigError:
            continue
        if needs <= plan.has:
            promising.append(Change(overrides, needs, confirmed=False))
    for change in promising[:TRIES]:
        report(f"estimated to fit: {' '.join(change.overrides)}")
        try:
            changed = make_plan(override(plan.run, change.overrides), plan.topology, report)
        except Impossible:
            continue
        if changed.fits and changed.compiled.needs is not None:
            return Change(change.overrides, changed.compiled.needs, confirmed=True)
    return promising[TRIES] if len(promising) > TRIES else None


def estimate_of(plan: Plan, overrides: tuple[str, ...]) -> int:
    """The estimate for the run with other values. Raises ConfigError where it cannot be run like that."""
    run = override(plan.run, overrides)
    check(run)
    axes = fit_mesh(run, plan.topology)
    return estimate(run, axes, leaves(run, axes))


def changes(plan: Plan) -> Iterator[tuple[str, ...]]:
    """What may be changed without changing what is computed, from what costs least to what costs most.

    Weights over more devices, recomputation, smaller microbatches, attention in blocks of queries; alone, then
    together.
    """
    run = plan.run
    wider = [(f"mesh.fsdp={size}", "mesh.data=-1") for size in _doublings(plan.axes["fsdp"], plan.axes["data"])]
    again = [("model.remat=full",)] if run.model.remat != "full" else []
    rows = run.train.batch_rows // run.train.accumulation
    most = rows // math.prod(plan.axes[axis] for axis in ACT_AXES["B"])
    smaller = [(f"train.accumulation={n}",) for n in _doublings(run.train.accumulation, most)]
    blocks = [("model.attention=chunked",)] if run.model.attention != "chunked" else []
    yield from (*wider, *again, *smaller, *blocks)
    together: tuple[str, ...] = ()
    for change in (*again, *smaller[-1:], *blocks, *wider[-1:]):
        together += change
        if together != change:
            yield together


def _doublings(size: int, room: int) -> list[int]:
    """The size times 2, 4, ..., while the factor divides the room."""
    factors = []
    factor = 2
    while factor <= room and room % factor == 0:
        factors.append(size * factor)
        factor *= 2
    return factors
