"""Plans of shipped configs on the devices they are meant for: `python benchmarks/plans.py --write` makes docs/plans.md.

Compiles what is not in the cache, one after the other: minutes each. Names choose some: `python benchmarks/plans.py
llama3_8b`; with --write the page is of those. JSON lines on stdout, a plan each. Needs the extra tpu.
"""

import argparse
import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")  # shapes alone are needed here

from llm_jax.config import load  # noqa: E402
from llm_jax.plan import page, search_page  # noqa: E402
from llm_jax.plan.account import replicated_share  # noqa: E402
from llm_jax.plan.chips import parse  # noqa: E402
from llm_jax.plan.compile import versions  # noqa: E402
from llm_jax.plan.fit import Change, cheapest_change  # noqa: E402
from llm_jax.plan.plan import Plan, make_plan  # noqa: E402
from llm_jax.plan.search import Search, search  # noqa: E402
from llm_jax.run import Run  # noqa: E402
from llm_jax.train.environment import commit  # noqa: E402
from llm_jax.train.flops import CONVENTION  # noqa: E402

ROOT = Path(__file__).parents[1]
STATED = {
    "gpt2_124m": "v6e:2x4",
    "bert_base": "v6e:2x4",
    "modernbert_base": "v6e:2x4",
    "llama3_8b": "v5p:4x4x4",
    "llama3_70b": "v5p:4x4x8",
    "mixtral_8x7b": "v5p:4x4x4",
    "olmoe_1b_7b": "v5p:4x8x8",
    "deepseek_v3_experts": "v5p:8x8x16",
}
SEARCHED = "llama3_8b"

TEXT = """\
# Plans

`python benchmarks/plans.py --write` makes this page: `llm-jax plan` for every shipped config of a published model, on a
slice of TPUs of the size that it is written for, with its mesh as it stands. No TPU was there.

**Compiled**, by the TPU's own compiler, from the very step that `llm-jax train` runs: the memory of a device, and the
collectives, found in the optimised program with those in loops counted as often as they run; the largest array that one
gather brings together. **Added up from shapes**: parameters and state; which part of the parameters' bytes is whole on
every device of fsdp x tensor. **Estimated**: times. Each part of the machine works at its data sheet's speed: products
of matrices as counted in the step (recomputation and masked scores included) at the peak; the program's reads and
writes of main memory, each instruction's operands and results once, at its bandwidth; what is sent, by a ring, over one
dimension of the torus. A step takes as long as the slowest part if everything overlaps (the first figure), and their
sum if nothing does (the second); a real one lies between, or above, since kernels do not reach data sheets. MFU is
{convention}. A plan knows nothing of the host, of input, or of checkpoints.

Experts on several devices (`mesh.expert`) have buffers with room for the worst routing, since nothing is dropped.
Products count the rows that even routing fills, and memory's reads and writes all of them.

Made at commit {commit} with {versions}.

"""


def main() -> None:
    """Prints a plan a line, and writes the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="config", help=f"of {', '.join(STATED)}; all if none is given")
    parser.add_argument("--write", action="store_true", help="write docs/plans.md")
    arguments = parser.parse_args()
    made = []
    for name in arguments.names or STATED:
        plan = make_plan(load(ROOT / "configs" / f"{name}.py", Run), parse(STATED[name]), report)
        change = None if plan.fits else cheapest_change(plan, report)
        print(json.dumps(page.as_json(plan, change)), flush=True)
        made.append((plan, change))
    found = None
    if SEARCHED in (arguments.names or STATED):
        found = search(load(ROOT / "configs" / f"{SEARCHED}.py", Run), parse(STATED[SEARCHED]), report)
        print(json.dumps(search_page.as_json(found)), flush=True)
    if arguments.write:
        told = ", ".join(f"{package} {version}" for package, version in versions().items())
        left_out = [f"`{name}`" for name in STATED if name not in {plan.run.name for plan, _ in made}]
        code = commit(ROOT)
        made_of = "unknown" if code is None else code.commit[:7] + (" with changes" if code.changed else "")
        text = TEXT.format(convention=CONVENTION, versions=told, commit=made_of)
        text += f"Not compiled for this page: {', '.join(left_out)}.\n\n" if left_out else ""
        (ROOT / "docs" / "plans.md").write_text(text + tables(made) + searched(found), encoding="utf-8")


def report(line: str) -> None:
    """Progress, beside the figures."""
    print(line, file=sys.stderr, flush=True)


def tables(made: list[tuple[Plan, Change | None]]) -> str:
    """Memory, then times, then collectives, a row a config."""
    memory = ("config", "devices", "mesh", "parameters", "state", "peak", "of", "fits", "largest gather", "replicated")
    times = ("config", "a step, s", "tokens/s", "MFU", "bound by", "FLOPs, formula", "as compiled")
    sends = ("config", "collective", "over", "devices", "count", "arrays", "a device sends")
    parts = (
        rows(*memory, of=[memory_row(*both) for both in made]),
        rows(*times, of=[time_row(plan) for plan, _ in made if plan.roofline]),
        rows(*sends, of=[row for plan, _ in made for row in collective_rows(plan)]),
    )
    titles = (
        "## Memory of a device",
        "## Time of an update: if everything overlaps, and if nothing does",
        "## Collectives of an update, those of 1% of what is sent or more",
    )
    return "\n".join(f"{title}\n\n{table}" for title, table in zip(titles, parts, strict=True))


def searched(found: Search | None) -> str:
    """What a search found, as a section."""
    if found is None:
        return ""
    shown = (*found.compiled, *found.estimated[: search_page.N_ESTIMATED])
    command = f"llm-jax plan configs/{found.run.name}.py --topology {found.topology.text} --search"
    text = f"\n## A search\n\n`{command}` estimates every layout from\n"
    text += "sizes alone, scaled by what the compile of the run as given said, and compiles the best few. The table\n"
    text += f"is {search_page.ranked_by(found)}. In one line:\n\n> {search_page.verdict(found)}\n\n"
    columns = (*search_page.COLUMNS, *search_page.TIMES)
    return text + rows(*columns, of=[[*search_page.row(one), *search_page.times(one)] for one in shown])


def memory_row(plan: Plan, change: Change | None) -> list[str]:
    """Whether it fits, and what would make it."""
    state = sum(leaf.on_a_device for leaf in plan.state)
    needs, fits = plan.compiled.needs, "yes"
    if not plan.fits:
        lacks = "more than that" if plan.missing is None else f"{page.size(plan.missing)} missing"
        how = "" if change is None or change.confirmed else " by an estimate"
        fits = f"no, {lacks}" + (f"; `{' '.join(change.overrides)}` fits{how}" if change else "")
    return [
        f"`{plan.run.name}`",
        plan.topology.text,
        page.mesh_told(plan.axes),
        f"{page.parameters(plan.run.model):,}",
        page.size(state),
        "not said" if needs is None else f"{page.size(needs)} ({needs / plan.has:.0%})",
        page.size(plan.has),
        fits,
        page.size(max((one.largest_gather for one in plan.compiled.collectives), default=0)),
        f"{replicated_share(plan.state, plan.axes):.3%}" if plan.axes["fsdp"] * plan.axes["tensor"] > 1 else "all",
    ]


def time_row(plan: Plan) -> list[str]:
    """The roofline."""
    line = plan.roofline
    assert line is not None
    return [
        f"`{plan.run.name}`",
        f"{page.seconds(line.best)} to {page.seconds(line.worst)}",
        f"{line.tokens / line.best:,.0f} to {line.tokens / line.worst:,.0f}",
        f"{line.best_mfu:.0%} to {line.worst_mfu:.0%}",
        line.bound,
        f"{page.per_token_of(plan).full * line.tokens:.3g}",
        f"{plan.compiled.flops:.3g}",
    ]


def collective_rows(plan: Plan) -> list[list[str]]:
    """The larger ones."""
    sent = sum(one.sent for one in plan.compiled.collectives)
    larger = [one for one in plan.compiled.collectives if one.sent >= 0.01 * sent]
    return [
        [
            f"`{plan.run.name}`" if i == 0 else "",
            one.kind,
            " x ".join(one.axes),
            str(one.devices),
            f"{one.runs:,}",
            page.size(one.payload),
            page.size(one.sent),
        ]
        for i, one in enumerate(larger)
    ]


def rows(*columns: str, of: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [list(columns), ["---"] * len(columns), *of]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
