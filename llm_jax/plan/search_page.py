"""What a search found, as a table for people; and as JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table

from llm_jax.plan import page
from llm_jax.plan.compile import versions
from llm_jax.plan.plan import memory_of
from llm_jax.plan.search import Layout, Search, fits, told
from llm_jax.train.flops import CONVENTION

# Layouts that are shown though they were only estimated.
N_ESTIMATED = 5
COLUMNS = ("mesh", "remat", "accumulation", "", "memory")
TIMES = ("a step, s", "tokens/s", "MFU", "bound by")


def show(found: Search, console: Console) -> None:
    """Prints the compiled layouts, best first, and the best of those that were only estimated."""
    topology = found.topology
    head = f"{found.run.name} on {topology.text}: {topology.n_devices} x {topology.chip.kind}"
    console.print(f"{head}, {page.size(memory_of(topology))} each; {ranked_by(found)}", highlight=False)
    shown = (*found.compiled, *found.estimated[:N_ESTIMATED])
    timed = any(layout.step for layout in shown)
    table = Table(*COLUMNS, *(TIMES if timed else ()))
    for layout in shown:
        table.add_row(*row(layout), *(times(layout) if timed else ()))
    console.print(table)
    if timed:
        console.print(f"a step: if everything overlaps, and if nothing does; MFU by {CONVENTION}", highlight=False)


def ranked_by(found: Search) -> str:
    """What is best."""
    if any(layout.step for layout in (*found.compiled, *found.estimated)):
        return "ranked by a step's seconds if nothing overlaps"
    return f"ranked by memory, since no peak is known for {found.topology.chip.kind}"


def row(layout: Layout) -> list[str]:
    """What a layout is, how it is known, and its memory."""
    remat = layout.run.model.remat
    how = "estimated" if layout.plan is None else "compiled" if fits(layout) else "compiled: does not fit"
    return [
        page.mesh_told(layout.axes),
        remat if isinstance(remat, str) else ", ".join(remat),
        str(layout.run.train.accumulation),
        how if layout.overrides else f"{how}, as given",
        "not said" if layout.needs is None else page.size(layout.needs),
    ]


def times(layout: Layout) -> list[str]:
    """Its roofline; nothing of what does not fit."""
    line = layout.step
    if line is None:
        return ["" for _ in TIMES]
    return [
        f"{page.seconds(line.best)} to {page.seconds(line.worst)}",
        f"{line.tokens / line.best:,.0f} to {line.tokens / line.worst:,.0f}",
        f"{line.best_mfu:.0%} to {line.worst_mfu:.0%}",
        line.bound,
    ]


def verdict(found: Search) -> str:
    """One line: the best layout that was compiled and fits, beside the run as given."""
    name = f"{found.run.name} on {found.topology.text}"
    looked = f"of {found.considered:,} layouts {len(found.compiled)} were compiled, the others estimated"
    best = found.best
    if best is None:
        return f"{name}: none that was compiled fits; {looked}: take more devices"
    given = next((layout for layout in found.compiled if not layout.overrides), None)
    beside = ""
    if best.overrides and given is not None:
        beside = f", as given {_short(given)}" if fits(given) else ", which does not fit as given"
    return f"{name}, best {told(best)}: {_short(best)}{beside} ({looked})"


def as_json(found: Search) -> dict[str, Any]:
    """Every compiled layout and the best estimated ones, as JSON values; bytes and seconds, unrounded."""
    best = found.best
    return {
        "run": found.run.name,
        "topology": found.topology.text,
        "device": found.topology.chip.kind,
        "devices": found.topology.n_devices,
        "memory": memory_of(found.topology),
        "considered": found.considered,
        "best": None if best is None else list(best.overrides),
        "layouts": [_layout(layout) for layout in (*found.compiled, *found.estimated[:N_ESTIMATED])],
        "versions": versions(),
    }


def _layout(layout: Layout) -> dict[str, Any]:
    return {
        "overrides": list(layout.overrides),
        "mesh": dict(layout.axes),
        "remat": layout.run.model.remat,
        "accumulation": layout.run.train.accumulation,
        "compiled": layout.plan is not None,
        "fits": fits(layout) if layout.plan is not None else None,
        "needs": layout.needs,
        "step": page.step_json(layout.step),
    }


def _short(layout: Layout) -> str:
    memory = page.size(layout.needs or 0)
    if layout.step is None:
        return memory
    return f"{page.seconds(layout.step.best)} to {page.seconds(layout.step.worst)} s a step, {memory}"
