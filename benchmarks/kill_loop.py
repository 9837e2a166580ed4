"""Kills a tiny run again and again: python benchmarks/kill_loop.py --kills 100 [--processes 1 2] [--seed S] [--write]

`llm-jax train` gets SIGKILL at random moments, in mid-save too, and is started again, until it has come to its end and
once after that; then another run begins, until there were so many kills. Each history is held against an uninterrupted
run's: every batch trained once, every line and every bit of the last checkpoint the same. It prints one line of JSON a
kill and a run, and the tallies; the exit code is 1 where anything differs. --write puts them into docs/survival.md.
"""

import argparse
import collections
import datetime
import json
import os
import platform
import random
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.conftest import EMULATED  # noqa: E402  comes before JAX, which it sets up

import jax  # noqa: E402  isort: skip

from llm_jax.train.environment import commit  # noqa: E402
from tests.kills import PHASES, STEPS, Kill, Trial, differences, survived, to_the_end  # noqa: E402

PAGE = ROOT / "docs" / "survival.md"
HEADING = "## The kill loop\n"
SECTION = """
`benchmarks/kill_loop.py` trains a tiny run of {steps} updates, with looks at held-out rows and checkpoints by number
and by the clock, and sends SIGKILL at random moments: to all processes, or to one of two, of which the other then ends
by itself or is killed some seconds later, as by a launcher. Four in ten are aimed at the time before the first update,
as long as it was in a run that nobody stopped, and three in ten at half-written checkpoints; where they fell is below.
After each kill the same command goes on, until the run has come to its end; then a start on the finished run is killed
too, and another run begins. Every history is held against the one of a run that nobody stopped, with as many processes:
updates 1 to {steps} once each, every batch once, every line of `metrics.jsonl` and `validation.jsonl` but the times,
the checkpoints, nothing unfinished beside them, and every bit of the last one's arrays. `tests/test_kill_loop.py` does
this with four kills, and proves that a resume that repeats a batch, a log that keeps what a killed process wrote, and a
checkpoint that is whole before its lines are written are each seen.

Written by `python benchmarks/kill_loop.py {arguments}` on {date}, commit {commit}, {machine}, JAX {jax}:

| | {columns} |
|---|{rules}|
{rows}
"""

Tally = dict[str, int]


def tally(kills: Sequence[Kill], runs: int, differing: int, seconds: float) -> Tally:
    """The kills of so many runs in figures."""
    phases = collections.Counter(kill.phase for kill in kills)
    return {
        "runs": runs,
        "runs whose history differs": differing,
        "kills": len(kills),
        **{f"- {phase}": phases[phase] for phase in PHASES},
        "kills that left a half-written checkpoint": sum(kill.half_written > 0 for kill in kills),
        "kills of one of two processes": sum(kill.others != "" for kill in kills),
        "- the other ended by itself": sum(kill.others.startswith("ended") for kill in kills),
        "starts that found no checkpoint": sum(kill.restored == 0 for kill in kills),
        "updates lost and made again": sum(max(kill.updates - kill.checkpoint, 0) for kill in kills),
        "seconds": round(seconds),
    }


def loop(folder: Path, processes: int, n_kills: int, seed: int) -> Tally:
    """So many kills of runs of so many processes, printed as they come."""
    started, draw = time.monotonic(), random.Random(f"{seed} {processes}")
    uninterrupted = Trial(folder / "uninterrupted", processes, folder / "cache")
    to_the_end(uninterrupted)
    # Once more, now that everything is compiled: for how long its beginning takes, and as a control.
    again = uninterrupted._replace(run_dir=folder / "again")
    beginning_s = to_the_end(again)
    differing = int(differs(again, uninterrupted, 0))
    kills: list[Kill] = []
    runs = 0
    while len(kills) < n_kills:
        runs += 1
        trial = uninterrupted._replace(run_dir=folder / f"run-{runs}")
        for kill in survived(trial, draw, n_kills - len(kills), beginning_s):
            kills.append(kill)
            tell({"kill": len(kills), "processes": processes, "run": runs, **kill._asdict()})
        differing += differs(trial, uninterrupted, runs)
    return tally(kills, runs, differing, time.monotonic() - started)


def differs(trial: Trial, uninterrupted: Trial, number: int) -> bool:
    """Whether a run's history is another than the uninterrupted one's; prints in what."""
    found = differences(trial.run_dir, uninterrupted.run_dir)
    tell({"run": number, "processes": trial.processes, "differences": found})
    return bool(found)


def tell(line: dict[str, object]) -> None:
    """Prints a line of JSON."""
    print(json.dumps(line), flush=True)


def section(tallies: dict[int, Tally], arguments: str) -> str:
    """What the page says of the loop."""
    code = commit(ROOT)
    names = next(iter(tallies.values()))
    return SECTION.format(
        steps=STEPS,
        arguments=arguments,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit="unknown" if code is None else code.commit[:7] + (" with changes" if code.changed else ""),
        machine=f"{os.cpu_count()} cores of {platform.machine()}",
        jax=jax.__version__,
        columns=" | ".join("1 process" if n == 1 else f"{n} processes" for n in tallies),
        rules="|".join("--:" for _ in tallies),
        rows="\n".join(f"| {name} | {' | '.join(str(t[name]) for t in tallies.values())} |" for name in names),
    )


def with_section(page: str, section: str) -> str:
    """The page with this section in the place of the one of its heading, or at its end; the others stay."""
    before, heading, rest = page.partition(HEADING)
    following = re.search(r"^## ", rest, re.MULTILINE)
    after = rest[following.start() :] if following else ""
    return before + ("" if heading else "\n") + HEADING + section + ("\n" if after else "") + after


def main(argv: Sequence[str]) -> int:
    """Prints the lines; returns 1 where a history differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, required=True, metavar="N", help="in all, evenly over --processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="P", help="of a run: 1 2")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="of the moments; drawn if not given")
    parser.add_argument("--write", action="store_true", help="put the tallies into docs/survival.md")
    arguments = parser.parse_args(argv)
    tell({"seed": arguments.seed, "platform": EMULATED["JAX_PLATFORMS"], "jax": jax.__version__})
    tallies = {}
    with tempfile.TemporaryDirectory(prefix="kill-loop-") as folder:
        for i, processes in enumerate(arguments.processes):
            share = (arguments.kills + len(arguments.processes) - 1 - i) // len(arguments.processes)
            own = Path(folder, str(processes))
            own.mkdir()
            tallies[processes] = loop(own, processes, share, arguments.seed)
            tell({"tally": tallies[processes], "processes": processes, "seed": arguments.seed})
    if arguments.write:
        told = (
            f"--kills {arguments.kills} --processes {' '.join(map(str, arguments.processes))} --seed {arguments.seed}"
        )
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), section(tallies, told)), encoding="utf-8")
    return int(any(tally["runs whose history differs"] for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
