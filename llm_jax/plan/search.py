"""Other layouts of a run on a topology: all of them estimated, then the best few compiled."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from llm_jax.alphabet import ACT_AXES, MESH_AXES, over_slices
from llm_jax.config import ConfigError, override
from llm_jax.model.backends import resolve
from llm_jax.plan.account import Leaf, leaves
from llm_jax.plan.chips import GPUS_OF_A_HOST, Topology
from llm_jax.plan.compile import Impossible
from llm_jax.plan.expected import expected
from llm_jax.plan.memory import estimate
from llm_jax.plan.page import seconds, size
from llm_jax.plan.plan import Plan, make_plan, memory_of
from llm_jax.plan.roofline import Roofline, roofline
from llm_jax.run import Run, check, check_mesh

# Layouts that are compiled beside the run as given.
TRIES = 3
# What the backward pass recomputes, from nothing to all of a layer.
POLICIES = ("none", "elementwise", "dots", ("q", "k", "v", "attention_out"), "full")


class Scales(NamedTuple):
    """What a compile said of the run as given, over what was estimated of it."""

    needs: float = 1.0
    flops: float = 1.0
    moved: float = 1.0
    sent: float = 1.0


class Layout(NamedTuple):
    """A mesh, what is recomputed, and the microbatches of an update."""

    overrides: tuple[str, ...]
    """What makes it of the run as given; nothing for that itself."""
    axes: Mapping[str, int]
    run: Run
    """With these."""
    needs: float | None
    """Bytes of a device's memory at the peak; None where the compiler refused and did not say."""
    step: Roofline | None
    """None where no peak is known, or the compiler refused."""
    plan: Plan | None
    """What a compile told; None: needs and step are estimates."""

    @property
    def cost(self) -> float:
        """What layouts are ranked by: seconds of a step if nothing overlaps; where there are none, memory."""
        return self.step.worst if self.step else self.needs or math.inf


class Search(NamedTuple):
    """What was looked at."""

    run: Run
    topology: Topology
    compiled: list[Layout]
    """Those that fit, best first, then those that do not."""
    estimated: list[Layout]
    """The others that should fit by an estimate, best first."""
    considered: int
    """Layouts that the rules of divisibility allow."""

    @property
    def best(self) -> Layout | None:
        """The best that fits, by a compile."""
        return next((layout for layout in self.compiled if fits(layout)), None)


def fits(layout: Layout) -> bool:
    """Whether a compile said that it fits."""
    return layout.plan is not None and layout.plan.fits


def search(run: Run, topology: Topology, report: Callable[[str], None]) -> Search:
    """The run as given and the layouts that promise most, compiled and ranked."""
    given = _compiled((), run, topology, report)
    candidates = list(layouts(run, topology, _scales(given)))
    has = memory_of(topology)
    tried = [given] if given else []
    room = sum(one.needs <= has for one in candidates if one.needs is not None)
    report(f"{len(candidates)} layouts estimated: {room} should fit")
    for turn in range(TRIES):
        one = _next(candidates, tried, has)
        if one is None:
            break
        report(f"{turn + 1} of {TRIES}: {told(one)}: estimated {_figures(one)}")
        candidates.remove(one)
        made = _compiled(one.overrides, run, topology, report)
        if made is not None:
            report(f"compiled {_figures(made)}{'' if fits(made) else ': does not fit'}")
            tried.append(made)
            candidates = _corrected(candidates, one, made)
    tried.sort(key=lambda one: (not fits(one), one.cost))
    promising = [one for one in candidates if one.needs is not None and one.needs <= has]
    return Search(run, topology, tried, sorted(promising, key=lambda one: one.cost), len(candidates) + len(tried))


def told(layout: Layout) -> str:
    """The overrides as a shell takes them."""
    quoted = (f"'{change}'" if "[" in change else change for change in layout.overrides)
    return " ".join(quoted) or "as given"


def layouts(run: Run, topology: Topology, scales: Scales) -> Iterator[Layout]:
    """Every layout that a run can have but its own, estimated; in no order."""
    shapes = list(meshes(run, topology))
    if not shapes:
        return
    # Which axes divide a leaf is the same on every mesh that has them.
    on = {axis: min((axes[axis] for axes in shapes if axes[axis] > 1), default=1) for axis in MESH_AXES}
    state = leaves(run.model_copy(update={"model": resolve(run.model, topology.chip.platform, on["expert"])}), on)
    for axes in shapes:
        rows = run.train.batch_rows // _ways(axes)
        held = [_on(leaf, axes) for leaf in state]
        for accumulation, remat in itertools.product(_divisors(rows), {*POLICIES, run.model.remat}):
            changes = _changes(run, axes, remat, accumulation)
            if changes:
                yield _estimated(override(run, changes), changes, axes, held, topology, scales)


def meshes(run: Run, topology: Topology) -> Iterator[dict[str, int]]:
    """Every mesh of all of the topology's devices that the run's sizes are divisible by."""
    n = topology.n_devices
    for sizes in itertools.product(_divisors(n), repeat=len(MESH_AXES)):
        axes: dict[str, int] = dict(zip(MESH_AXES, sizes, strict=True))
        if math.prod(sizes) != n or run.train.batch_rows % _ways(axes) or (axes["expert"] > 1 and not run.model.moe):
            continue
        try:
            # One row at a time on each of those that divide them; what is looked at in between follows the mesh.
            smallest = override(run, (f"train.accumulation={run.train.batch_rows // _ways(axes)}", *_looks(run, axes)))
            check_mesh(smallest, axes)
            slow_axes(run, axes, topology)
        except ConfigError:
            continue
        yield axes


def slow_axes(run: Run, axes: Mapping[str, int], topology: Topology) -> frozenset[str]:
    """The axes that cross the network between slices or hosts. Raises ConfigError where others would have to."""
    hosts = topology.n_devices // GPUS_OF_A_HOST if topology.chip.platform == "gpu" else 1
    parts = over_slices(axes, run.mesh.slices or max(hosts, 1))
    return frozenset(axis for axis, n in parts.items() if n > 1)


def _ways(axes: Mapping[str, int]) -> int:
    return math.prod(axes[axis] for axis in ACT_AXES["B"])


def _looks(run: Run, axes: Mapping[str, int]) -> tuple[str, ...]:
    """Held-out rows have to be divisible too."""
    ways = _ways(axes)
    return (f"eval.batch_rows={ways}",) if run.eval.batch_rows % ways else ()


def _changes(run: Run, axes: Mapping[str, int], remat: str | tuple[str, ...], accumulation: int) -> tuple[str, ...]:
    """The overrides that make the layout of the run; an axis of -1 follows from the others."""
    of_mesh = [f"mesh.{axis}={n}" for axis, n in axes.items() if getattr(run.mesh, axis) not in (-1, n)]
    named = remat if isinstance(remat, str) else json.dumps(remat, separators=(",", ":"))
    of_model = [f"model.remat={named}"] if remat != run.model.remat else []
    of_train = [f"train.accumulation={accumulation}"] if accumulation != run.train.accumulation else []
    return (*of_mesh, *of_model, *of_train, *_looks(run, axes))


def _on(leaf: Leaf, axes: Mapping[str, int]) -> Leaf:
    """The leaf on another mesh; its axes are those that it would be divided over if they were on."""
    return leaf._replace(on_a_device=leaf.bytes // math.prod(axes[axis] for axis in leaf.axes))


def _estimated(
    run: Run, overrides: tuple[str, ...], axes: Mapping[str, int], state: list[Leaf], topology: Topology, scales: Scales
) -> Layout:
    run = run.model_copy(update={"model": resolve(run.model, topology.chip.platform, axes["expert"])})
    weights = [leaf for leaf in state if leaf.kind == "weights"]
    amounts = expected(run, axes, weights, slow_axes(run, axes, topology))
    sent = [one._replace(sent=round(one.sent * scales.sent)) for one in amounts.collectives]
    step = roofline(run, topology, amounts.flops * scales.flops, amounts.moved_bytes * scales.moved, sent)
    return Layout(overrides, axes, run, estimate(run, axes, state) * scales.needs, step, None)


def _compiled(overrides: tuple[str, ...], run: Run, topology: Topology, report: Callable[[str], None]) -> Layout | None:
    """The layout with what a compile tells; None, and a line, where it cannot be compiled."""
    try:
        changed = override(run, overrides)
        check(changed)
        plan = make_plan(changed, topology, report)
    except (ConfigError, Impossible) as error:
        report(f"{' '.join(overrides) or 'as given'}: {error}")
        return None
    return Layout(overrides, plan.axes, plan.run, plan.compiled.needs, plan.roofline, plan)


def _scales(given: Layout | None) -> Scales:
    """How far estimates are off, by the run as given; not at all where nothing was compiled."""
    if given is None or given.plan is None:
        return Scales()
    plan = given.plan
    weights = [leaf for leaf in plan.state if leaf.kind == "weights"]
    amounts = expected(plan.run, plan.axes, weights, slow_axes(plan.run, plan.axes, plan.topology))
    sent = sum(one.sent for one in amounts.collectives)
    told = plan.compiled
    return Scales(
        needs=(told.needs or plan.has) / estimate(plan.run, plan.axes, plan.state),
        flops=told.flops / amounts.flops,
        moved=1.0 if told.refused else told.moved_bytes / amounts.moved_bytes,
        sent=sum(one.sent for one in told.collectives) / sent if sent and not told.refused else 1.0,
    )


def _next(candidates: list[Layout], tried: list[Layout], has: float) -> Layout | None:
    """The cheapest that should fit, of a mesh that no layout is known to fit on but the one given."""
    known = [one.axes for one in tried if fits(one) and one.overrides]
    left = [one for one in candidates if one.needs is not None and one.needs <= has and one.axes not in known]
    return min(left, key=lambda one: one.cost, default=None)


def _corrected(candidates: list[Layout], estimated: Layout, compiled: Layout) -> list[Layout]:
    """Others that recompute the same need as much more than estimated as the one that was compiled."""
    if compiled.needs is None or not estimated.needs:
        return candidates
    ratio = compiled.needs / estimated.needs
    return [
        one._replace(needs=one.needs * ratio)
        if one.run.model.remat == estimated.run.model.remat and one.needs is not None
        else one
        for one in candidates
    ]


def _divisors(n: int) -> list[int]:
    return [n_parts for n_parts in range(1, n + 1) if n % n_parts == 0]


def _figures(layout: Layout) -> str:
    needs = "memory that is not said" if layout.needs is None else size(layout.needs)
    return needs if layout.step is None else f"{needs}, {seconds(layout.step.worst)} s a step if nothing overlaps"
