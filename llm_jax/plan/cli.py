"""`llm-jax plan`: compiles a run's step for hardware that is not here, and tells what it needs and could reach."""

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from llm_jax import command_line, exit_codes
from llm_jax.plan.chips import Topology, parse
from llm_jax.run import Run, from_command_line

_DESCRIPTION = """\
Compile the very step that `llm-jax train` runs, for devices that are not here, and tell: does it fit into their memory,
what do they send to each other and over which mesh axis, and how long would a step take at the speeds of their data
sheets. No device is touched. Where it does not fit the exit code is 3, and a change that fits is looked for.
Compiling takes a minute or a few; answers are kept below ~/.cache/llm_jax/plans.
With --search other layouts of the same update are looked at: all meshes that the sizes are divisible by, what the
backward pass recomputes, and microbatches. All are estimated, the best few are compiled, and what was is ranked."""

_EXAMPLES = """\
  llm-jax plan configs/llama3_8b.py --topology v5p:4x4x4          64 chips of a TPU v5p (needs the extra tpu)
  llm-jax plan configs/olmoe_1b_7b.py --topology v6e:16x16
  llm-jax plan configs/gpt2_124m.py --topology h100:8             8 GPUs (needs the extra cuda-plan)
  llm-jax plan configs/tiny_causal.py --topology cpu:8 mesh.fsdp=4 mesh.tensor=2
  llm-jax plan configs/llama3_8b.py --topology v5p:4x4x4 --search

kinds of devices: v5e, v5p, v6e (as slices come: v5p:4x4x8, v6e:16x16), h100, h200 (more than 8 are hosts of 8), cpu"""


class DoesNotFit(exit_codes.Failure):
    """The step needs more memory than a device has."""

    exit_code = exit_codes.NO


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code. Raises Failure for what is foreseen, DoesNotFit where the answer is no."""
    parser = command_line.Parser("plan", _DESCRIPTION, _EXAMPLES)
    command_line.add_run_arguments(parser)
    parser.add_argument(
        "--topology", required=True, metavar="KIND:SIZE", help="such as v5p:4x4x4, v6e:16x16, h100:8, cpu:8"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, everything unrounded, instead of the page")
    parser.add_argument("--search", action="store_true", help="rank other layouts too; compiles a few: minutes each")
    arguments = parser.read(argv)
    topology = parse(arguments.topology)
    run = from_command_line(arguments.config, arguments.overrides)
    # Shapes alone are needed here: an accelerator of this machine is left alone. The compiler has a process of its own.
    import jax

    jax.config.update("jax_platforms", "cpu")
    if arguments.search:
        return _search(run, topology, arguments.json)
    return _plan(run, topology, arguments.json)


def _plan(run: Run, topology: Topology, json_wanted: bool) -> int:
    from llm_jax.plan import page
    from llm_jax.plan.fit import cheapest_change
    from llm_jax.plan.plan import make_plan

    plan = make_plan(run, topology, _report)
    console = _console()
    if not json_wanted:
        page.show(plan, console)
    change = None if plan.fits else cheapest_change(plan, _report)
    told = page.verdict(plan, change)
    if json_wanted:
        print(json.dumps(page.as_json(plan, change), indent=2))
    if not plan.fits:
        raise DoesNotFit(told)
    if not json_wanted:
        console.print(told, highlight=False, soft_wrap=True)
    return exit_codes.DONE


def _search(run: Run, topology: Topology, json_wanted: bool) -> int:
    from llm_jax.plan import search_page
    from llm_jax.plan.search import search

    found = search(run, topology, _report)
    if json_wanted:
        print(json.dumps(search_page.as_json(found), indent=2))
    else:
        search_page.show(found, _console())
    if found.best is None:
        raise DoesNotFit(search_page.verdict(found))
    if not json_wanted:
        _console().print(search_page.verdict(found), highlight=False, soft_wrap=True)
    return exit_codes.DONE


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
