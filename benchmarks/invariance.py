"""How far each setting is from one device: python benchmarks/invariance.py [--write]

One JSON line a row of the matrix, of which tests/test_invariance.py proves a part; --write makes docs/invariance.md of
them. It runs on a CPU with eight emulated devices, and takes some minutes.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tests.conftest  # noqa: E402, F401  comes before JAX, which it sets up

import jax  # noqa: E402  isort: skip

from tests.invariance import TOLERANCE, Difference, Setting, difference, matrix, one_device, outcome  # noqa: E402

HEAD = """# The invariance matrix

Parallelism, accumulation and rematerialisation must not change what is computed. Each row is one setting of model,
objective, mesh, microbatches and remat, held against the same batch on one device in one microbatch with nothing
recomputed: tokens that chose other experts, the worst difference of all reported means, and the worst gradient leaf, as
a share of its largest value (or of a thousandth of the largest leaf's, if that is more). Everything is float32; the
bound is {tolerance:g}. Every pair of settings occurs. `tests/test_invariance.py` proves a part of these rows in which
every pair occurs too, and that planted mistakes turn them red.

Written by `python benchmarks/invariance.py --write` on {date}, commit {commit}, {machine}, JAX {jax}.

| model | objective | mesh | microbatches | remat | other experts | loss | worst gradient leaf |
|---|---|---|---|---|---|---|---|
"""


def row(setting: Setting, apart: Difference) -> str:
    """A line of the table."""
    cells = [*map(str, setting), str(apart.experts), f"{apart.loss:.1e}", f"{apart.gradient:.1e}"]
    return f"| {' | '.join(cells)} |\n"


def head() -> str:
    """What comes before the rows."""
    described = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return HEAD.format(
        tolerance=TOLERANCE,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=described.stdout.strip() or "unknown",
        machine=f"{os.cpu_count()} cores of {platform.machine()}",
        jax=jax.__version__,
    )


def main() -> int:
    """Prints the lines; returns 1 where a row is over the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make docs/invariance.md of the figures")
    arguments = parser.parse_args()
    text, worst = head(), 0.0
    for setting in matrix():
        started = time.monotonic()
        apart = difference(outcome(setting), one_device(setting.model, setting.objective))
        worst = max(worst, apart.loss, apart.gradient, float(apart.experts))
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({**setting._asdict(), **apart._asdict(), "seconds": seconds}), flush=True)
        text += row(setting, apart)
    if arguments.write:
        (ROOT / "docs" / "invariance.md").write_text(text, encoding="utf-8")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
