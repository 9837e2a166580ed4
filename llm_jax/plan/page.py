"""A plan for people, as tables; and as JSON."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from llm_jax.plan.account import by_kind, replicated_share
from llm_jax.plan.chips import GIB
from llm_jax.plan.compile import versions
from llm_jax.plan.fit import Change
from llm_jax.plan.plan import Plan
from llm_jax.plan.roofline import Roofline
from llm_jax.train.flops import CONVENTION, FlopsPerToken, active_parameters, flops_per_token, parameters, peak_flops

N_LARGEST = 6


def show(plan: Plan, console: Console) -> None:
    """Prints what is in the plan, and then whether it fits."""
    head = f"{plan.run.name} on {plan.topology.text}: {plan.topology.n_devices} x {plan.topology.chip.kind}"
    console.print(f"{head}, {mesh_told(plan.axes)}", highlight=False)
    told = f"attention {plan.run.model.attention}, remat {plan.run.model.remat}, {plan.run.model.compute_dtype}"
    rows = f"{plan.run.train.batch_rows} rows of {plan.run.data.seq_len} tokens in {plan.run.train.accumulation} part"
    console.print(f"{told}; {rows}{'s' if plan.run.train.accumulation > 1 else ''} an update", highlight=False)
    console.print(state_table(plan))
    console.print(memory_table(plan))
    if plan.compiled.refused:
        console.print(largest_table(plan))
        return
    console.print(collectives_table(plan))
    console.print(speed_table(plan))
    if plan.compiled.unknown_loops:
        loops = f"{plan.compiled.unknown_loops} loops whose turns the program does not tell count once"
        console.print(f"{loops}: collectives and traffic are more than this", highlight=False)
    if not plan.fits:
        console.print(largest_table(plan))


def state_table(plan: Plan) -> Table:
    """Bytes by kind, of all devices' one copy and on a device."""
    model = plan.run.model
    table = _table("training state", "bytes", "on a device")
    for kind, (whole, part) in by_kind(plan.state).items():
        if whole >= 1024:
            table.add_row(kind, size(whole), size(part))
    table.add_row("all", size(sum(x.bytes for x in plan.state)), size(sum(x.on_a_device for x in plan.state)))
    active = active_parameters(model)
    of_them = f", {active:,} for each token" if active != parameters(model) else ""
    table.caption = f"{parameters(model):,} parameters{of_them}; divided over neither fsdp nor tensor"
    if plan.axes["fsdp"] * plan.axes["tensor"] > 1:
        share = replicated_share(plan.state, plan.axes)
        table.caption = f"{parameters(model):,} parameters{of_them}; {share:.2%} of their bytes are on every device"
        table.caption += " of fsdp x tensor"
    return table


def memory_table(plan: Plan) -> Table:
    """A device's memory as the compiler counts it, against what there is."""
    table = _table("memory of a device, compiled", "bytes", "of what it has")
    parts = {name: value or 0 for name, value in plan.compiled.memory.items()}
    table.add_row("arguments: state and batch", size(parts["arguments"]), "")
    if not plan.compiled.refused:
        table.add_row("outputs that are no argument's", size(parts["outputs"] - parts["aliased"]), "")
    told = plan.compiled.memory["temporaries"]
    table.add_row("temporaries", "not said" if told is None else size(told), "")
    if not plan.compiled.refused:
        table.add_row("code", size(parts["code"]), "")
    needs = plan.compiled.needs
    table.add_row(
        "peak", "not said" if needs is None else size(needs), "" if needs is None else f"{needs / plan.has:.0%}"
    )
    table.add_row("it has", size(plan.has), "")
    if plan.topology.chip.platform == "gpu":
        table.caption = "what JAX takes: three quarters, if XLA_PYTHON_CLIENT_MEM_FRACTION says nothing else"
    return table


def collectives_table(plan: Plan) -> Table:
    """What is communicated in a step."""
    table = _table("collectives of a step", "over", "devices", "count", "arrays", "a device sends", left=2)
    for one in plan.compiled.collectives:
        over = " x ".join(one.axes) + (", slow network" if one.slow else "")
        table.add_row(one.kind, over, str(one.devices), f"{one.runs:,}", size(one.payload), size(one.sent))
    if not plan.compiled.collectives:
        table.add_row("none", "", "", "", "", "")
    return table


def speed_table(plan: Plan) -> Table:
    """The roofline of a step."""
    table = _table("a step, at data-sheet speeds", "amount", "seconds")
    per_token = per_token_of(plan)
    formula, n = per_token.full * plan.run.tokens_per_step, plan.topology.n_devices
    table.add_row("FLOPs by formula, all devices", f"{formula:.4g}", "")
    table.add_row("  as compiled: with recomputation and masked scores", f"{plan.compiled.flops:.4g}", "")
    if plan.compiled.xla_flops is not None:
        table.add_row("  as XLA counts, each loop once", f"{plan.compiled.xla_flops * n:.4g}", "")
    line = plan.roofline
    if line is None:
        table.caption = f"no peak is known for {plan.topology.chip.kind}, so no times"
        return table
    sent = {slow: sum(c.sent for c in plan.compiled.collectives if c.slow == slow) for slow in (False, True)}
    table.add_row("compute", f"{plan.compiled.flops / n:.4g} FLOPs a device", seconds(line.compute))
    table.add_row("memory", f"{size(plan.compiled.moved_bytes)} a device", seconds(line.memory))
    table.add_row("network", f"{size(sent[False])} a device", seconds(line.network))
    if sent[True]:
        table.add_row("slow network", f"{size(sent[True])} a device", seconds(line.slow_network))
    for told, step, share in (
        ("everything overlaps", line.best, line.best_mfu),
        ("nothing does", line.worst, line.worst_mfu),
    ):
        table.add_row(f"if {told}", f"{line.tokens / step:,.0f} tokens/s, MFU {share:.0%}", seconds(step))
    peak = peak_flops(plan.topology.chip.kind, plan.run.model.compute_dtype) or 0
    table.caption = f"bound by {line.bound}; MFU of {peak / 1e12:.0f} TFLOP/s by {CONVENTION}"
    return table


def largest_table(plan: Plan) -> Table:
    """The largest arrays of a device: of the state, and of what the program makes on its way."""
    table = _table("largest arrays of a device", "bytes")
    for leaf in plan.state[:N_LARGEST]:
        dims = ",".join(str(n) for n in leaf.shape)
        over = f" over {' x '.join(leaf.axes)}" if leaf.axes else ""
        table.add_row(f"{leaf.path} {leaf.dtype}[{dims}]{over}", size(leaf.on_a_device))
    for each in plan.compiled.temporaries[:N_LARGEST]:
        table.add_row(each.what, size(each.bytes))
    return table


def verdict(plan: Plan, change: Change | None) -> str:
    """One line: it fits, or how much is missing and what would help."""
    name = f"{plan.run.name} on {plan.topology.text} ({mesh_told(plan.axes)})"
    if plan.fits:
        needs = plan.compiled.needs or 0
        return f"{name} fits: {size(needs)} of {size(plan.has)}"
    if plan.compiled.needs is None:
        lacks = f"needs more than the {size(plan.has)} of a device"
    else:
        lacks = f"needs {size(plan.compiled.needs)} of {size(plan.has)}: {size(plan.missing or 0)} are missing"
    if change is None:
        return f"{name} does not fit: it {lacks}; nothing that was tried makes it fit: take more devices"
    how = "compiled" if change.confirmed else "an estimate, not compiled"
    return f"{name} does not fit: it {lacks}; {' '.join(change.overrides)} fits with {size(change.needs)} ({how})"


def as_json(plan: Plan, change: Change | None) -> dict[str, Any]:
    """Everything on the page, as JSON values; bytes and seconds, unrounded."""
    run, per_token = plan.run, per_token_of(plan)
    return {
        "run": run.name,
        "topology": plan.topology.text,
        "device": plan.topology.chip.kind,
        "devices": plan.topology.n_devices,
        "mesh": plan.axes,
        "parameters": parameters(run.model),
        "active_parameters": active_parameters(run.model),
        "state": {kind: {"bytes": whole, "on_a_device": part} for kind, (whole, part) in by_kind(plan.state).items()},
        "replicated_share": replicated_share(plan.state, plan.axes),
        "fits": plan.fits,
        "memory": {"has": plan.has, "needs": plan.compiled.needs, "missing": plan.missing, **plan.compiled.memory},
        "largest_state": [[leaf.path, leaf.on_a_device] for leaf in plan.state[:N_LARGEST]],
        "largest_temporaries": [[each.what, each.bytes] for each in plan.compiled.temporaries],
        "collectives": [one._asdict() for one in plan.compiled.collectives],
        "unknown_loops": plan.compiled.unknown_loops,
        "flops": {
            "formula": per_token.full * run.tokens_per_step,
            "compiled": plan.compiled.flops,
            "xla_on_a_device": plan.compiled.xla_flops,
        },
        "moved_bytes": plan.compiled.moved_bytes,
        "step": step_json(plan.roofline),
        "change": None if change is None else change._asdict(),
        "compile_seconds": plan.compiled.seconds,
        "versions": versions(),
    }


def step_json(line: Roofline | None) -> dict[str, Any] | None:
    """A roofline as JSON values."""
    if line is None:
        return None
    return {
        "seconds": line.parts,
        "best": {"seconds": line.best, "tokens_per_s": line.tokens / line.best, "mfu": line.best_mfu},
        "worst": {"seconds": line.worst, "tokens_per_s": line.tokens / line.worst, "mfu": line.worst_mfu},
        "bound": line.bound,
        "mfu_convention": CONVENTION,
    }


def per_token_of(plan: Plan) -> FlopsPerToken:
    """The formula's FLOPs of a token."""
    return flops_per_token(plan.run.model, plan.run.data.seq_len, plan.run.objective)


def mesh_told(axes: Mapping[str, int]) -> str:
    """The mesh's axes that are on."""
    return " x ".join(f"{axis} {n}" for axis, n in axes.items() if n > 1) or "one device"


def size(n: float) -> str:
    """Bytes with three figures or more, in binary units."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:,.{max(0, 3 - len(str(int(n / scale))))}f} {unit}"
    return f"{n:.0f} B"


def seconds(s: float) -> str:
    """Seconds with three figures."""
    return f"{s:.3g}" if s < 100 else f"{s:.0f}"


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(*columns, caption_justify="left")
    for column in table.columns[left:]:
        column.justify = "right"
    for column in table.columns[1:left]:
        column.justify = "left"
    return table
