"""Speed of greedy decoding with a cache: python benchmarks/decode.py --rounds 5

8 rows of 128 tokens read, 128 more made for each, by a random model of 8 layers, width 512 and 16384 pieces in float32.
With --peer PYTHON, whose environment has torch and transformers, its `generate` takes turns with ours (decode_peer.py).
One JSON line for each, ours with how many times faster it was; both compute on so many threads as there are cores.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from flax import nnx
from turns import About, Turn, in_turns, ratios, spread, timed, worker

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


def prompts() -> list[Prompt]:
    """Rows of uniformly drawn tokens."""
    rows_BT = np.random.default_rng(0).integers(len(SPECIAL_PIECES), MODEL.vocab_size, (ROWS, PROMPT))
    return [Prompt([BOS_ID, *ids[1:]], row) for row, ids in enumerate(rows_BT.tolist())]


def ours() -> tuple[Callable[[], None], Callable[[], None], About]:
    """All the texts, the prompts' reading and one token alone, and what is to be said about them."""
    mesh = make_mesh(mesh_sizes(MeshConfig(), jax.device_count()))
    device = mesh.devices.flat[0]
    model = resolve(MODEL, device.platform, mesh.shape["expert"])
    with jax.set_mesh(mesh):
        parts = jax.jit(lambda: split(Transformer(model, nnx.Rngs(params=jax.random.key(0)))))()
        with for_decoding((parts.params, parts.balance), model) as (weights, cfg):
            mesh = jax.sharding.get_mesh()
            whole, first = (make_decoder(cfg, PROMPT + NEW, Sampling(max_tokens=n, temperature=0.0)) for n in (NEW, 1))

    def texts(decoder: Decoder) -> None:
        with jax.set_mesh(mesh):
            made(decoder, weights)

    about: About = {"of": "llm_jax", "jax": jax.__version__, "device": device.device_kind, "n_devices": mesh.size}
    return lambda: texts(whole), lambda: texts(first), about


def made(decoder: Decoder, weights: Weights) -> None:
    """Makes every token that was asked for; asserts that no text ended before."""
    pieces = zip(*decoding(decoder, weights, prompts()), strict=True)
    lengths = {sum(len(piece.ids) for piece in text) for text in pieces}
    assert lengths == {decoder.sampling.max_tokens}, "a text ended early: choose another seed"


def told(about: About, turns: Sequence[Turn]) -> About:
    """A line of medians and spread of whole turns."""
    seconds = [each for turn in turns for each in turn.seconds]
    return about | {
        "seconds": spread(seconds),
        "cpu_seconds": round(statistics.median(turn.cpu_each for turn in turns), 3),
        "new_tokens_per_s": round(ROWS * NEW / statistics.median(seconds), 1),
    }


def main() -> None:
    """Prints JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each, after one to warm up (default 5)")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has torch and transformers")
    arguments = parser.parse_args()
    texts, first_tokens, about = ours()
    begun = time.perf_counter()
    texts()
    first_tokens()
    about["warm_up_s"] = round(time.perf_counter() - begun, 2)
    about["prompts_s"] = spread(timed(first_tokens, arguments.rounds).seconds)
    if arguments.peer is None:
        print(json.dumps(told(about, [timed(texts, arguments.rounds)])))
        return
    command = [arguments.peer, str(Path(__file__).with_name("decode_peer.py")), json.dumps(SPEC)]
    with worker(command, sys.stderr.fileno()) as (about_them, their_take):
        takes = {"transformers": their_take, "llm_jax": lambda n: timed(texts, n)}
        turns = in_turns(takes, arguments.rounds, 1, skip=0)
    walls, cpus = ratios(turns["transformers"], turns["llm_jax"])
    print(json.dumps(told(about_them, turns["transformers"])))
    print(json.dumps(told(about, turns["llm_jax"]) | {"faster": spread(walls), "less_cpu": spread(cpus)}))


if __name__ == "__main__":
    main()
