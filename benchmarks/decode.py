"""Speed of greedy decoding with a cache: python benchmarks/decode.py --rounds 5

8 rows of 128 tokens read, 128 more made for each, by a random model of 8 layers, width 512 and 16384 pieces in float32.
With --peer PYTHON, whose environment has torch and transformers, its `generate` takes turns with ours (decode_peer.py).
One JSON line for each, and one with the ratio; both compute on so many threads as there are cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from llm_jax.data.config import BOS_ID, SPECIAL_PIECES
from llm_jax.eval.generate import Decoder, Prompt, decoding, make_decoder
from llm_jax.eval.restore import for_decoding
from llm_jax.eval.sampling import Sampling
from llm_jax.mesh import make_mesh
from llm_jax.model.backends import resolve
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Transformer, Weights, split
from llm_jax.run import mesh_sizes
from llm_jax.train.config import MeshConfig

MODEL = ModelConfig(
    d_model=512, d_ff=1376, n_layers=8, n_heads=8, n_kv_heads=8, d_head=64, vocab_size=16384, tied_embeddings=False
)
ROWS, PROMPT, NEW = 8, 128, 128
# What decode_peer.py has to know.
SPEC = {
    "d_model": MODEL.d_model,
    "d_ff": MODEL.d_ff,
    "n_layers": MODEL.n_layers,
    "n_heads": MODEL.n_heads,
    "vocab_size": MODEL.vocab_size,
    "rows": ROWS,
    "prompt": PROMPT,
    "new": NEW,
}

# Makes all texts once: wall and CPU seconds.
Turn = Callable[[], tuple[float, float]]


def prompts() -> list[Prompt]:
    """Rows of uniformly drawn tokens."""
    rows_BT = np.random.default_rng(0).integers(len(SPECIAL_PIECES), MODEL.vocab_size, (ROWS, PROMPT))
    return [Prompt([BOS_ID, *ids[1:]], row) for row, ids in enumerate(rows_BT.tolist())]


def ours() -> tuple[Turn, Turn, dict[str, Any]]:
    """All the texts, the prompts' reading and one token alone, and what is to be said about them."""
    mesh = make_mesh(mesh_sizes(MeshConfig(), jax.device_count()))
    device = mesh.devices.flat[0]
    model = resolve(MODEL, device.platform, mesh.shape["expert"])
    with jax.set_mesh(mesh):
        parts = jax.jit(lambda: split(Transformer(model, nnx.Rngs(params=jax.random.key(0)))))()
        with for_decoding((parts.params, parts.balance), model) as (weights, cfg):
            mesh = jax.sharding.get_mesh()
            whole, first = (make_decoder(cfg, PROMPT + NEW, Sampling(max_tokens=n, temperature=0.0)) for n in (NEW, 1))

    def turn(decoder: Decoder, weights: Weights) -> tuple[float, float]:
        with jax.set_mesh(mesh):
            return timed(lambda: made(decoder, weights))

    about = {"of": "llm_jax", "jax": jax.__version__, "device": device.device_kind, "n_devices": mesh.size}
    return lambda: turn(whole, weights), lambda: turn(first, weights), about


def made(decoder: Decoder, weights: Weights) -> None:
    """Makes every token that was asked for; asserts that no text ended before."""
    pieces = zip(*decoding(decoder, weights, prompts()), strict=True)
    lengths = {sum(len(piece.ids) for piece in text) for text in pieces}
    assert lengths == {decoder.sampling.max_tokens}, "a text ended early: choose another seed"


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds of this process."""
    begun, cpu_begun = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - cpu_begun


@contextmanager
def peer(python: str) -> Iterator[tuple[Turn, dict[str, Any]]]:
    """transformers in a process of its own, which sleeps between its turns."""
    # Threads of OpenMP that spin while they wait would take the cores from ours.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(os.cpu_count())}
    environment.pop("PYTHONPATH", None)
    program = [python, str(Path(__file__).with_name("decode_peer.py")), json.dumps(SPEC)]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        asked, answered = process.stdin, process.stdout

        def answer() -> Any:
            line = answered.readline()
            if not line:
                sys.exit(f"{python} gave no answer: exit code {process.wait()}")
            return json.loads(line)

        def turn() -> tuple[float, float]:
            print("go", file=asked)
            seconds, cpu_seconds = answer()
            return seconds, cpu_seconds

        yield turn, answer()
        asked.close()


def summary(turns: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians and spread of whole turns."""
    seconds = sorted(wall for wall, _ in turns)
    return {
        "seconds_median": round(statistics.median(seconds), 3),
        "seconds_best": round(seconds[0], 3),
        "seconds_worst": round(seconds[-1], 3),
        "cpu_seconds_median": round(statistics.median(cpu for _, cpu in turns), 3),
        "new_tokens_per_s": round(ROWS * NEW / statistics.median(seconds), 1),
    }


def main() -> None:
    """Prints JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each, after one to warm up (default 5)")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has torch and transformers")
    arguments = parser.parse_args()
    turn, first_turn, about = ours()
    begun = time.perf_counter()
    turn()
    first_turn()
    about["warm_up_s"] = round(time.perf_counter() - begun, 2)
    if arguments.peer is None:
        turns = [turn() for _ in range(arguments.rounds)]
        firsts = [first_turn() for _ in range(arguments.rounds)]
        print(json.dumps(about | summary(turns) | {"prompts_median": statistics.median(s for s, _ in firsts)}))
        return
    with peer(arguments.peer) as (their_turn, about_them):
        their_turn()
        pairs = [(turn(), their_turn()) for _ in range(arguments.rounds)]
    mine, theirs = map(list, zip(*pairs, strict=True))
    print(json.dumps(about | summary(mine)))
    print(json.dumps(about_them | summary(theirs)))
    ratios = sorted(their_s / our_s for (our_s, _), (their_s, _) in pairs)
    cpu_ratios = sorted(their_cpu / our_cpu for (_, our_cpu), (_, their_cpu) in pairs)
    print(
        json.dumps(
            {
                "faster_by_median": round(statistics.median(ratios), 3),
                "faster_by_worst": round(ratios[0], 3),
                "faster_by_best": round(ratios[-1], 3),
                "cpu_less_by_median": round(statistics.median(cpu_ratios), 3),
                "rounds": arguments.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
