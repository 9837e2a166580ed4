"""Speed of the loader, from prepared rows: python benchmarks/loader.py [CONFIG] [path=value ...]

CONFIG (configs/quickstart.py by default) says which text; it is prepared first where it is not. One JSON line: tokens a
second and a core of batches read one after the other, tokens a second with a thread that reads ahead, and the seconds
until the first batch after a resume at update 1,000,000, the opening of the rows included.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
from turns import About, spread, timed  # noqa: E402

from llm_jax.data.loader import Rows, open_rows, stream  # noqa: E402
from llm_jax.data.prepare import open_prepared, prepare  # noqa: E402
from llm_jax.mesh import acts, make_mesh  # noqa: E402
from llm_jax.run import Run, from_command_line, mesh_sizes  # noqa: E402

LATE = 1_000_000


def measure(run: Run, batches: int, rounds: int) -> About:
    """The figures of one line; each round reads so many batches."""
    wanted = (run.data, run.tokenizer, run.model.vocab_size, run.seed)
    prepare(*wanted, report=lambda line: print(line, file=sys.stderr), stop=lambda: False)
    prepared = open_prepared(*wanted)
    mesh = make_mesh(mesh_sizes(run.mesh, jax.device_count()))
    sharding = jax.NamedSharding(mesh, acts("ABU"))

    def read(rows: Rows, start: int, count: int, prefetch: int) -> None:
        into = {"batch_rows": run.train.batch_rows, "accumulation": run.train.accumulation, "sharding": sharding}
        fetching = stream(rows, start=start, prefetch=prefetch, **into)
        for fetched in itertools.islice(fetching, count):
            fetched.rows_ABU.block_until_ready()
        fetching.close()

    def first_of(start: int) -> float:
        begun = time.perf_counter()
        read(open_rows(prepared, "train", run.seed), start, 1, prefetch=0)
        return time.perf_counter() - begun

    rows = open_rows(prepared, "train", run.seed)
    tokens = batches * run.tokens_per_step
    read(rows, 0, batches, 0)
    alone = timed(lambda: read(rows, 0, batches, 0), rounds)
    ahead = timed(lambda: read(rows, 0, batches, 2), rounds)
    return {
        "config": run.name,
        "rows": len(rows),
        "tokens_per_batch": run.tokens_per_step,
        "tokens_per_cpu_s": round(tokens / alone.cpu_each),
        "tokens_per_s": spread([tokens / each for each in alone.seconds], 0),
        "tokens_per_s_ahead": spread([tokens / each for each in ahead.seconds], 0),
        "first_batch_s": spread([first_of(0) for _ in range(rounds)], 4),
        "first_batch_late_s": spread([first_of(LATE) for _ in range(rounds)], 4),
        "others_cores": alone.others,
        "jax": jax.__version__,
    }


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / "quickstart.py"), metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="change a field of the config")
    parser.add_argument("--batches", type=int, default=100, help="batches of a round (default 100)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    arguments = parser.parse_intermixed_args()
    run = from_command_line(arguments.config, arguments.overrides)
    print(json.dumps(measure(run, arguments.batches, arguments.rounds)))


if __name__ == "__main__":
    main()
