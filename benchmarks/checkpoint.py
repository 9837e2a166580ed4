"""How long saving holds up the loop, and restoring takes: python benchmarks/checkpoint.py --megabytes 500

A state of so many megabytes in float32 arrays like a run's, divided over all devices of this process, is saved while
nothing else runs, and restored. One JSON line: seconds until the arrays may be donated, until every byte is on disk and
its digest taken, of verifying the newest checkpoint, and of restoring it.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from turns import About, spread

from llm_jax.checkpoint import Checkpoints

# Arrays are of layers, 12 million numbers each.
ROWS, COLUMNS = 4096, 3072


def measure(folder: Path, megabytes: int, rounds: int) -> About:
    """The figures of one line."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    divided = jax.NamedSharding(mesh, jax.P("all"))
    count = max(1, round(megabytes * 1e6 / (4 * ROWS * COLUMNS)))

    @jax.jit(out_shardings=divided)
    def drawn(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (ROWS, COLUMNS))

    tree = {f"{i}": drawn(jax.random.key(i)) for i in range(count)}
    jax.block_until_ready(tree)
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=divided) for name, x in tree.items()}
    checkpoints = Checkpoints(folder, keep=1)
    blocked, written, verified, restored = [], [], [], []
    for step in range(1, rounds + 2):
        begun = time.perf_counter()
        checkpoints.save(step, tree, {})
        blocked.append(time.perf_counter() - begun)
        checkpoints.wait()
        written.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        assert checkpoints.newest_intact() == step
        verified.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        back = jax.block_until_ready(checkpoints.restore(step, abstract))
        restored.append(time.perf_counter() - begun)
        assert all(jnp.array_equal(back[name], x) for name, x in tree.items())
    checkpoints.close()
    # The first round makes threads and folders.
    return {
        "megabytes": round(sum(x.nbytes for x in tree.values()) / 1e6, 1),
        "n_devices": jax.device_count(),
        "blocked_s": spread(blocked[1:], 4),
        "written_s": spread(written[1:]),
        "verified_s": spread(verified[1:]),
        "restored_s": spread(restored[1:]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="size of the state (default 500)")
    parser.add_argument("--rounds", type=int, default=5, help="timed saves, after one that is not (default 5)")
    parser.add_argument("--dir", metavar="PATH", help="where to write (default: the system's folder for such)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        print(json.dumps(measure(Path(folder) / "checkpoints", arguments.megabytes, arguments.rounds)))


if __name__ == "__main__":
    main()
