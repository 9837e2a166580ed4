"""Attention for CPUs: blocks of queries, each against the keys it can see or a few more.

Heads stand before tokens in here, [B, K, ..., C], laid out so once: products over heads then read whole matrices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llm_jax.mesh import acts
from llm_jax.model.sight import ATTENDED, MASKED, Places, Sight, reach, visible


class Queries(NamedTuple):
    """Consecutive queries of a row."""

    q_BKGTC: Array
    """Scaled."""
    here: Places
    first: Array
    """The place in the row of the first of them."""


class Keys(NamedTuple):
    """What they look at."""

    k_BKSC: Array
    v_BKSC: Array
    there: Places


def chunked(
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    sinks_H: Array | None,
    here: Places,
    there: Places,
    sight: Sight,
    soft_cap: float | None,
) -> Array:
    """attention's o_BTHC in memory O(block * S), not O(T * S)."""

    def local(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, sinks_H: Array | None, here: Places, there: Places) -> Array:
        B, T, H, C = q_BTHC.shape
        S, K = k_BSKC.shape[1:3]
        q_BTKGC = (q_BTHC * (1 / math.sqrt(C))).reshape(B, T, K, H // K, C)
        queries = Queries(jnp.moveaxis(q_BTKGC, 1, 3), here, jax.lax.axis_index("context") * T)
        keys = Keys(jnp.moveaxis(k_BSKC, 1, 2), jnp.moveaxis(v_BSKC, 1, 2), there)
        sinks_1KG1 = None if sinks_H is None else sinks_H.astype(jnp.float32).reshape(1, K, H // K, 1)
        behind, ahead = reach(sight, S)
        block = _block_length(T, (behind + ahead + 1) // 2)
        if 3 * (behind + block + ahead) <= S:
            o_BKGTC = _near(queries, keys, sinks_1KG1, block, sight, soft_cap)
        else:
            # More spans than two of 128 save nothing, and are longer to compile.
            o_BKGTC = _spans(queries, keys, sinks_1KG1, _block_length(T, max(128, T // 4)), sight, soft_cap)
        return jnp.moveaxis(o_BKGTC, 3, 1).reshape(B, T, H, C)

    # shard_map adds up the gradients of keys and values over context: every rank's queries looked at all of them.
    specs = tuple(acts(letters) for letters in ("BTHC", "BSKC", "BSKC", "H", "BT", "BS"))
    return jax.shard_map(local, in_specs=specs, out_specs=acts("BTHC"), check_vma=False)(
        q_BTHC, k_BSKC, v_BSKC, sinks_H, here, there
    )


def _spans(
    queries: Queries, keys: Keys, sinks_1KG1: Array | None, block: int, sight: Sight, soft_cap: float | None
) -> Array:
    """Queries that see much of the row: in up to four spans, each against the keys that its queries can see."""
    T, S = queries.q_BKGTC.shape[3], keys.k_BKSC.shape[2]
    behind, ahead = reach(sight, S)
    length = -(-T // (4 * block)) * block
    outputs = []
    for start in range(0, T, length):
        stop = min(start + length, T)
        # Under context parallelism a rank's first query is not known at compile time: it looks at all keys.
        low, high = (max(start - behind, 0), min(stop + ahead, S)) if T == S else (0, S)
        around = Keys(keys.k_BKSC[:, :, low:high], keys.v_BKSC[:, :, low:high], _cut(keys.there, low, high))
        here = _cut(queries.here, start, stop)
        of_span = Queries(queries.q_BKGTC[:, :, :, start:stop], here, queries.first + start)
        outputs.append(_span(of_span, around, low, sinks_1KG1, block, sight, soft_cap))
    return jnp.concatenate(outputs, axis=3)


def _span(
    queries: Queries, keys: Keys, low: int, sinks_1KG1: Array | None, block: int, sight: Sight, soft_cap: float | None
) -> Array:
    """Queries all against the same keys, the first of which is at place `low` of its row."""

    def one_block(queries: Queries) -> Array:
        s_S = low + jnp.arange(keys.k_BKSC.shape[2])
        visible_BTS = visible(queries.here, keys.there, queries.first + jnp.arange(block), s_S, sight)
        return _block(soft_cap, queries.q_BKGTC, keys.k_BKSC, keys.v_BKSC, sinks_1KG1, visible_BTS)

    if queries.q_BKGTC.shape[3] == block:
        return one_block(queries)
    return _looped(jax.checkpoint(one_block), queries, block)


def _near(
    queries: Queries, keys: Keys, sinks_1KG1: Array | None, block: int, sight: Sight, soft_cap: float | None
) -> Array:
    """Queries that see little of the row: a loop over blocks, each against the keys around it."""
    S = keys.k_BKSC.shape[2]
    behind, ahead = reach(sight, S)
    width = behind + block + ahead

    def one_block(queries: Queries) -> Array:
        low = jnp.clip(queries.first - behind, 0, S - width)
        k_near, v_near = (jax.lax.dynamic_slice_in_dim(x, low, width, axis=2) for x in (keys.k_BKSC, keys.v_BKSC))
        around = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, low, width, axis=1), keys.there)
        t_T, s_S = queries.first + jnp.arange(block), low + jnp.arange(width)
        visible_BTS = visible(queries.here, around, t_T, s_S, sight)
        return _block(soft_cap, queries.q_BKGTC, k_near, v_near, sinks_1KG1, visible_BTS)

    # The backward pass cuts keys and makes masks anew, but no block's output.
    kept = jax.checkpoint_policies.save_only_these_names(ATTENDED)
    return _looped(jax.checkpoint(one_block, policy=kept), queries, block)


def _looped(one_block: Callable[[Queries], Array], queries: Queries, block: int) -> Array:
    """one_block's output for every block of the queries.

    Written out instead of looped, XLA would keep the scores of all blocks at once.
    """
    B, K, G, T, C = queries.q_BKGTC.shape
    n = T // block
    q_blocks = jnp.moveaxis(queries.q_BKGTC.reshape(B, K, G, n, block, C), 3, 0)
    here_blocks = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, n, block), 1, 0), queries.here)
    o_blocks = jax.lax.map(one_block, Queries(q_blocks, here_blocks, queries.first + block * jnp.arange(n)))
    return jnp.moveaxis(o_blocks, 0, 3).reshape(B, K, G, T, C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(
    soft_cap: float | None,
    q_BKGTC: Array,
    k_BKSC: Array,
    v_BKSC: Array,
    sinks_1KG1: Array | None,
    visible_BTS: Array,
) -> Array:
    """dense's numbers; the backward pass makes the scores again from the log-normalisers, as in FlashAttention
    (Dao et al. 2022), instead of reading back what the softmax left."""
    return _block_forward(soft_cap, q_BKGTC, k_BKSC, v_BKSC, sinks_1KG1, visible_BTS)[0]


def _block_forward(
    soft_cap: float | None,
    q_BKGTC: Array,
    k_BKSC: Array,
    v_BKSC: Array,
    sinks_1KG1: Array | None,
    visible_BTS: Array,
) -> tuple[Array, tuple]:
    scores_BKGTS = _masked(_scores(q_BKGTC, k_BKSC, soft_cap), visible_BTS)
    highest_BKGT = jnp.max(scores_BKGTS, axis=-1)
    if sinks_1KG1 is not None:
        highest_BKGT = jnp.maximum(highest_BKGT, sinks_1KG1)
    exp_BKGTS = jnp.exp(scores_BKGTS - highest_BKGT[..., None])
    sum_BKGT = jnp.sum(exp_BKGTS, axis=-1)
    if sinks_1KG1 is not None:
        sum_BKGT += jnp.exp(sinks_1KG1 - highest_BKGT)
    o_BKGTC = jnp.einsum("BKGTS,BKSC->BKGTC", exp_BKGTS.astype(v_BKSC.dtype), v_BKSC)
    o_BKGTC = checkpoint_name((o_BKGTC / sum_BKGT[..., None]).astype(v_BKSC.dtype), ATTENDED)
    normaliser_BKGT = checkpoint_name(highest_BKGT + jnp.log(sum_BKGT), ATTENDED)
    return o_BKGTC, (q_BKGTC, k_BKSC, v_BKSC, sinks_1KG1, visible_BTS, o_BKGTC, normaliser_BKGT)


def _block_backward(
    soft_cap: float | None, saved: tuple, do_BKGTC: Array
) -> tuple[Array, Array, Array, Array | None, None]:
    q_BKGTC, k_BKSC, v_BKSC, sinks_1KG1, visible_BTS, o_BKGTC, normaliser_BKGT = saved
    capped_BKGTS = _scores(q_BKGTC, k_BKSC, soft_cap)
    share_BKGTS = jnp.exp(_masked(capped_BKGTS, visible_BTS) - normaliser_BKGT[..., None])
    dshare_BKGTS = jnp.einsum("BKGTC,BKSC->BKGTS", do_BKGTC, v_BKSC, preferred_element_type=jnp.float32)
    inner_BKGT = jnp.sum(do_BKGTC.astype(jnp.float32) * o_BKGTC, axis=-1)
    dscores_BKGTS = share_BKGTS * (dshare_BKGTS - inner_BKGT[..., None])
    if soft_cap is not None:
        dscores_BKGTS *= 1 - jnp.square(capped_BKGTS / soft_cap)
    dscores_BKGTS = dscores_BKGTS.astype(q_BKGTC.dtype)
    dq_BKGTC = jnp.einsum("BKGTS,BKSC->BKGTC", dscores_BKGTS, k_BKSC)
    dk_BKSC = jnp.einsum("BKGTS,BKGTC->BKSC", dscores_BKGTS, q_BKGTC)
    dv_BKSC = jnp.einsum("BKGTS,BKGTC->BKSC", share_BKGTS.astype(v_BKSC.dtype), do_BKGTC)
    dsinks_1KG1 = None
    if sinks_1KG1 is not None:
        # The sink's value is zero: its share moves by -inner alone.
        sink_share_BKGT = jnp.exp(sinks_1KG1 - normaliser_BKGT)
        dsinks_1KG1 = -jnp.sum(sink_share_BKGT * inner_BKGT, axis=(0, 3), keepdims=True)
    return dq_BKGTC, dk_BKSC, dv_BKSC, dsinks_1KG1, None


_block.defvjp(_block_forward, _block_backward)


def _scores(q_BKGTC: Array, k_BKSC: Array, soft_cap: float | None) -> Array:
    """Float32 scores_BKGTS of every query and key, capped."""
    scores_BKGTS = jnp.einsum("BKGTC,BKSC->BKGTS", q_BKGTC, k_BKSC, preferred_element_type=jnp.float32)
    return scores_BKGTS if soft_cap is None else soft_cap * jnp.tanh(scores_BKGTS / soft_cap)


def _masked(scores_BKGTS: Array, visible_BTS: Array) -> Array:
    """MASKED where a query may not look."""
    return jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED)


def _cut(places: Any, start: int, stop: int) -> Any:
    """[start, stop) of the second axis of every array."""
    return jax.tree.map(lambda x: x[:, start:stop], places)


def _block_length(T: int, wished: int) -> int:
    """The longest up to the wished one, that between 64 and 512, which divides the row; the row where none does."""
    for block in range(min(max(64, wished), 512, T), 31, -1):
        if T % block == 0:
            return block
    return T
