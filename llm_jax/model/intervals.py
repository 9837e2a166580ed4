"""Whom queries see, as intervals of their row; and which tiles of queries and keys have anything to do with each other.

A document's tokens follow each other, so that a query sees an interval of its row whatever its sight, but for global
tokens: of its document, or of its block, what causal mask and window leave.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llm_jax.model.sight import Places, Sight, reach


class Intervals(NamedTuple):
    """The keys that each query sees, int32 [B, T]; neither end ever falls along a row."""

    low: Array
    """The first of them."""
    high: Array
    """The first after them."""


def intervals(there: Places, sight: Sight) -> Intervals:
    """Of all queries of whole rows; sight has no global tokens. A document is what follows each other in a segment."""
    segments_BS, positions_BS = there
    S = segments_BS.shape[1]
    changes = segments_BS[:, 1:] != segments_BS[:, :-1]
    if sight.block is not None:
        block_BS = positions_BS // sight.block
        changes |= block_BS[:, 1:] != block_BS[:, :-1]
    begins_BS, ends_BS = (jnp.pad(changes, ((0, 0), side)) for side in ((1, 0), (0, 1)))
    # Every pair is compared, in one fused reduction: a GPU makes a running maximum of a row step by step.
    s_S = jnp.arange(S, dtype=jnp.int32)
    t_1T1, s_11S = s_S[None, :, None], s_S[None, None, :]
    first_BT = jnp.max(jnp.where(begins_BS[:, None] & (s_11S <= t_1T1), s_11S, 0), axis=2)
    after_BT = jnp.min(jnp.where(ends_BS[:, None] & (s_11S >= t_1T1), s_11S + 1, S), axis=2)
    behind, ahead = reach(sight, S)
    return Intervals(jnp.maximum(first_BT, s_S[None] - behind), jnp.minimum(after_BT, s_S[None] + ahead + 1))


class Visits(NamedTuple):
    """For tiles I of queries and J of keys, which of the others each has to visit, int32 [B, I, 4] and [B, J, 4].

    Four numbers of tiles: from the first to the last one are visited; from the second to the third everyone there sees
    everyone here, so that no mask is needed.
    """

    of_queries: Array
    of_keys: Array


def visits(seen: Intervals, queries: int, keys: int, S: int) -> Visits:
    """For tiles of so many queries and keys, which divide T and S."""
    B, T = seen.low.shape
    low, high = (x.reshape(B, T // queries, queries) for x in seen)
    least_low, most_low, least_high, most_high = (
        of_tile[:, :, None] for x in (low, high) for of_tile in (jnp.min(x, axis=2), jnp.max(x, axis=2))
    )
    start = jnp.arange(0, S, keys, dtype=jnp.int32)[None, None]
    some_BIJ = (least_low < start + keys) & (most_high > start)
    all_BIJ = (most_low <= start) & (least_high >= start + keys)
    return Visits(*(_spans(some_BIJ, all_BIJ, axis) for axis in (2, 1)))


def _spans(some_BIJ: Array, all_BIJ: Array, axis: int) -> Array:
    n = some_BIJ.shape[axis]
    number = jax.lax.broadcasted_iota(jnp.int32, some_BIJ.shape, axis)
    start, stop = jnp.min(jnp.where(some_BIJ, number, n), axis), jnp.max(jnp.where(some_BIJ, number + 1, 0), axis)
    whole, after = jnp.min(jnp.where(all_BIJ, number, n), axis), jnp.max(jnp.where(all_BIJ, number + 1, 0), axis)
    # Where nothing is whole, both are where the visits end.
    return jnp.stack([start, jnp.minimum(whole, stop), jnp.where(whole < after, after, stop), stop], axis=-1)
