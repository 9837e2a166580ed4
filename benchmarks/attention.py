"""Time of attention alone, forward and with gradients: python benchmarks/attention.py --length 2048 --documents 4

One JSON line a backend, each held against the reference in float32. cudnn is JAX's call of that library, which knows no
documents: it runs on a GPU where a row is one. FLOPs are those of pairs that see each other: two products forward, six
with gradients, whatever a backend makes again. --smoke is a size at which a CPU can read kernels aloud.

--tiles tries others of the kernels for GPUs: queries,keys,warps,stages of forward, queries' and keys' gradients.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llm_jax.alphabet import MESH_AXES
from llm_jax.mesh import make_mesh
from llm_jax.model.attention import attention
from llm_jax.model.flash import attend
from llm_jax.model.flash_tiles import How, Kernels, Tiles, tiles_for
from llm_jax.model.intervals import intervals
from llm_jax.model.sight import Places, Sight

SMOKE = {"rows": 1, "length": 128, "heads": 2, "kv_heads": 1, "channels": 16, "rounds": 1}


class Asked(NamedTuple):
    """What is measured."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    channels: int
    documents: int
    window: int | None
    both_ways: bool
    dtype: str

    @property
    def sight(self) -> Sight:
        """Who sees whom."""
        return Sight(not self.both_ways, self.window)


class Inputs(NamedTuple):
    """Queries, keys, values and the gradient of the output; where tokens stand."""

    q_BTHC: Array
    k_BSKC: Array
    v_BSKC: Array
    do_BTHC: Array
    places: Places


Attend = Callable[[Inputs], Array]


def inputs_of(asked: Asked) -> Inputs:
    """Random ones; rows of documents of about the same length."""
    rng = np.random.default_rng(0)
    B, T, C = asked.rows, asked.length, asked.channels
    heads = (asked.heads, asked.kv_heads, asked.kv_heads, asked.heads)
    q, k, v, do = (jnp.asarray(rng.normal(size=(B, T, n, C)), asked.dtype) for n in heads)
    t = np.arange(T)
    segments = t * asked.documents // T
    positions = t - np.searchsorted(segments, segments)
    segments, positions = (jnp.asarray(np.broadcast_to(x, (B, T)), jnp.int32) for x in (segments, positions))
    return Inputs(q, k, v, do, Places(segments, positions))


def backends(asked: Asked, tiles: Kernels, on_gpu: bool) -> Iterator[tuple[str, Attend]]:
    """Those that compute what is asked for on this machine, by name; the reference first."""
    for name in ("xla", "chunked"):

        def backend(x: Inputs, name: str = name) -> Array:
            how: dict[str, Any] = {"sight": asked.sight, "soft_cap": None, "sinks_H": None, "backend": name}
            return attention(x.q_BTHC, x.k_BSKC, x.v_BSKC, x.places, x.places, **how)

        yield name, backend
    yield "flash", functools.partial(flash, asked.sight, How(None, tiles, interpret=not on_gpu))
    if on_gpu and asked.documents == 1 and asked.dtype == "bfloat16":
        yield "cudnn", functools.partial(cudnn, asked.sight)


def flash(sight: Sight, how: How, x: Inputs) -> Array:
    """The kernels with tiles of one's choice; behind a wall, as they have to be."""

    def local(x: Inputs) -> Array:
        return attend(x.q_BTHC, x.k_BSKC, x.v_BSKC, None, intervals(x.places, sight), how)

    return jax.shard_map(local, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)(x)


def cudnn(sight: Sight, x: Inputs) -> Array:
    """JAX's call; of rows that are one document."""
    window = None
    if sight.window is not None:
        window = (sight.window - 1, 0) if sight.causal else (sight.window // 2, sight.window // 2)
    return jax.nn.dot_product_attention(
        x.q_BTHC, x.k_BSKC, x.v_BSKC, is_causal=sight.causal, local_window_size=window, implementation="cudnn"
    )


def with_gradients(attend: Attend, x: Inputs) -> tuple[Array, ...]:
    """The output, and the gradients of queries, keys and values."""
    o_BTHC, pull_back = jax.vjp(lambda q, k, v: attend(Inputs(q, k, v, *x[3:])), *x[:3])
    return o_BTHC, *pull_back(x.do_BTHC)


def milliseconds(function: Callable[[Inputs], Any], x: Inputs, rounds: int) -> list[float]:
    """Of each round after the first, which compiles."""
    jax.block_until_ready(function(x))
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        jax.block_until_ready(function(x))
        taken.append(1e3 * (time.perf_counter() - begun))
    return taken


def pairs_seen(x: Inputs, sight: Sight) -> int:
    """Pairs of a query and a key that it sees, of all rows."""
    low_BT, high_BT = (np.asarray(a, np.int64) for a in intervals(x.places, sight))
    return int(np.sum(high_BT - low_BT))


def measured(asked: Asked, tiles: Kernels, rounds: int) -> Iterator[dict[str, Any]]:
    """A line for each backend."""
    device = jax.devices()[0]
    x = inputs_of(asked)
    flops = 2 * asked.channels * asked.heads * pairs_seen(x, asked.sight)
    right: list[np.ndarray] = []
    for name, backend in backends(asked, tiles, device.platform == "gpu"):
        if not right:
            # Rounded inputs, and nothing else rounded.
            exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype != jnp.int32 else a, x)
            with jax.default_matmul_precision("highest"):
                right = [np.asarray(a) for a in jax.jit(functools.partial(with_gradients, backend))(exact)]
        forward, both = jax.jit(backend), jax.jit(functools.partial(with_gradients, backend))
        got = [np.asarray(a.astype(jnp.float32)) for a in both(x)]
        forward_ms, both_ms = (statistics.median(milliseconds(f, x, rounds)) for f in (forward, both))
        yield {
            "backend": name,
            "forward_ms": round(forward_ms, 3),
            "with_gradients_ms": round(both_ms, 3),
            "forward_tflops": round(2 * flops / forward_ms / 1e9, 2),
            "with_gradients_tflops": round(6 * flops / both_ms / 1e9, 2),
            # Of output and gradients the worst, as a share of the largest value.
            "difference": max(
                float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in zip(got, right, strict=True)
            ),
            **asked._asdict(),
            "tiles": tiles if name == "flash" else None,
            "rounds": rounds,
            "device": device.device_kind,
            "jax": jax.__version__,
        }


def main() -> None:
    """Prints one JSON line a backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rows": 4, "length": 2048, "heads": 16, "kv-heads": 16, "channels": 64, "documents": 1, "rounds": 20}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--window", type=int, help="positions that a query sees")
    parser.add_argument("--both-ways", action="store_true", help="no causal mask")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default bfloat16")
    parser.add_argument("--tiles", nargs=3, metavar="Q,K,W,S", help="see above")
    parser.add_argument("--smoke", action="store_true", help="one small shape, once")
    chosen = vars(parser.parse_args())
    chosen |= SMOKE if chosen["smoke"] else {}
    asked = Asked(**{name: chosen[name] for name in Asked._fields})
    tiles = tiles_for(asked.length, asked.length, asked.channels)
    if chosen["tiles"]:
        tiles = Kernels(*(Tiles(*map(int, each.split(","))) for each in chosen["tiles"]))
    with jax.set_mesh(make_mesh(dict.fromkeys(MESH_AXES, 1))):
        for line in measured(asked, tiles, chosen["rounds"]):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
