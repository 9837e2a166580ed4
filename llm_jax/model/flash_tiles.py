"""What attention's kernels for GPUs have in common: tiles and how they are read and written, scores, and the way along
a row."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from llm_jax.model.intervals import Intervals, visits

# GPUs have an instruction for powers of two: scores inside of kernels are in units of ln 2.
LOG2_E = math.log2(math.e)
# Terms that a product on tensor cores has at least.
LEAST_TERMS = 16
# Of a head, for which a GPU has room.
MOST_CHANNELS = 128


class Tiles(NamedTuple):
    """Queries and keys of a tile, powers of two, and how a GPU goes about it."""

    queries: int
    keys: int
    warps: int
    """Groups of 32 threads that share a tile."""
    stages: int
    """Tiles that are on their way from memory, the one at hand included."""


class Kernels(NamedTuple):
    """The tiles of each kernel."""

    forward: Tiles
    queries: Tiles
    """That of the queries' gradients."""
    keys: Tiles
    """That of the keys' and values' gradients."""


class Ways(NamedTuple):
    """Where each kernel has to go: who sees whom, and its visits (intervals.Visits)."""

    seen: Intervals
    forward: Array
    queries: Array
    keys: Array


class How(NamedTuple):
    """What kernels are compiled for, beside shapes."""

    soft_cap: float | None
    tiles: Kernels
    interpret: bool


# By practice with Triton on Hopper, not measured here; for heads of up to 64 channels, and for larger ones.
NARROW = Kernels(Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2))
WIDE = Kernels(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2))


def tiles_for(T: int, S: int, C: int) -> Kernels:
    """Those for so many channels, none much longer than the row."""

    def fitted(tiles: Tiles) -> Tiles:
        return tiles._replace(queries=min(tiles.queries, power(T)), keys=min(tiles.keys, power(S)))

    return Kernels(*map(fitted, NARROW if C <= 64 else WIDE))


def ways(seen: Intervals, tiles: Kernels, S: int) -> Ways:
    """Those of queries that see these keys."""
    forward, queries, keys = (visits(seen, each.queries, each.keys, S) for each in tiles)
    return Ways(seen, forward.of_queries, queries.of_queries, keys.of_keys)


def power(n: int) -> int:
    """The least power of two that has room for n, and is large enough for a product."""
    return max(LEAST_TERMS, 1 << (n - 1).bit_length())


def loaded(ref: Any, channels: int) -> Array:
    """A tile [.., C]; channels that were added to make C a power of two are zero."""
    if ref.shape[-1] == channels:
        return triton.load(ref)
    return triton.load(ref, mask=_real(ref, channels), other=0.0)


def stored(ref: Any, tile: Array, channels: int) -> None:
    """Writes a tile [.., C], without channels that were added."""
    mask = None if ref.shape[-1] == channels else _real(ref, channels)
    triton.store(ref, tile.astype(ref.dtype), mask=mask)


def _real(ref: Any, channels: int) -> Array:
    return jnp.broadcast_to((jnp.arange(ref.shape[-1]) < channels)[None], ref.shape)


def scores(a_RC: Array, b_RC: Array, channels: int, soft_cap: float | None) -> tuple[Array, Array | None]:
    """Float32 scores of all pairs of rows, in units of ln 2, and their tanh where they have a cap."""
    products = triton.dot(a_RC, b_RC, trans_b=True)
    scale = 1 / math.sqrt(channels)
    if soft_cap is None:
        return products * (scale * LOG2_E), None
    tanh = jnp.tanh(products * (scale / soft_cap))
    return tanh * (soft_cap * LOG2_E), tanh


def along(span: Any, step: Callable[[Array, Any, bool], Any], carry: Any) -> Any:
    """carry after step(tile's number, carry, whether it needs a mask) for all tiles of a span of intervals.Visits."""
    start, whole, after, stop = (span[i] for i in range(4))
    for first, end, masked in ((start, whole, True), (whole, after, False), (after, stop, True)):
        carry = jax.lax.fori_loop(first, end, lambda i, carry, masked=masked: step(i, carry, masked), carry)
    return carry


def cost(q_BTHC: Array, k_BSKC: Array, products: int) -> pl.CostEstimate:
    """That of so many products of all queries and keys, those that are not made included."""
    B, T, H, C = q_BTHC.shape
    S = k_BSKC.shape[1]
    return pl.CostEstimate(
        flops=2 * products * B * H * T * S * C,
        transcendentals=B * H * T * S,
        bytes_accessed=2 * (q_BTHC.nbytes + k_BSKC.nbytes),
    )
