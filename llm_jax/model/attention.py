"""Attention backends behind one signature; all give the same numbers, they differ in memory and speed."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llm_jax.mesh import acts
from llm_jax.model.flash import flash
from llm_jax.model.kernels import splash
from llm_jax.model.sight import Places, Sight, reach, visible

MASKED = -1e30


class Queries(NamedTuple):
    """Consecutive queries of a row."""

    q_BTHC: Array
    here: Places
    first: Array
    """The place in the row of the first of them."""


def attention(
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    here: Places,
    there: Places,
    *,
    sight: Sight,
    soft_cap: float | None,
    sinks_H: Array | None,
    backend: str,
) -> Array:
    """Scaled dot-product attention; H query heads share K key heads in groups of H / K.

    T may be sharded over context, S is whole. here [B, T] and there [B, S] place queries and keys, and sight says who
    sees whom. soft_cap: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2, 2024). sinks_H: float32, a score of
    each head that takes its share of the softmax and brings no value (gpt-oss, 2025). Returns o_BTHC in q's type;
    scores and softmax are float32.
    """
    # Vectors are stored whole on every device: each takes its heads' part.
    sinks_H = None if sinks_H is None else jax.reshard(sinks_H, acts("H"))
    arguments = (q_BTHC, k_BSKC, v_BSKC, sinks_H, here, there)
    match backend:
        case "xla":
            return _xla(*arguments, sight, soft_cap)
        case "chunked":
            return _chunked(*arguments, sight, soft_cap)
        case "splash":
            return splash(*arguments, sight, soft_cap)
        case "flash":
            return flash(q_BTHC, k_BSKC, v_BSKC, sinks_H, there, sight, soft_cap)
    raise AssertionError(f"attention backend {backend!r} was not resolved")


def _xla(
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    sinks_H: Array | None,
    here: Places,
    there: Places,
    sight: Sight,
    soft_cap: float | None,
) -> Array:
    """The reference: every score at once."""
    T, S = q_BTHC.shape[1], k_BSKC.shape[1]
    t_T = jax.lax.broadcasted_iota(jnp.int32, (T,), 0, out_sharding=acts("T"))
    s_S = jax.lax.broadcasted_iota(jnp.int32, (S,), 0, out_sharding=acts("S"))
    return dense(q_BTHC, k_BSKC, v_BSKC, sinks_H, visible(here, there, t_T, s_S, sight), soft_cap)


def dense(
    q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, sinks_H: Array | None, visible_BTS: Array, soft_cap: float | None
) -> Array:
    """Attention where it is known who sees whom; sinks_H are divided as the heads are."""
    return mixed(shares(q_BTHC, k_BSKC, sinks_H, visible_BTS, soft_cap), v_BSKC)


def shares(q_BTHC: Array, k_BSKC: Array, sinks_H: Array | None, visible_BTS: Array, soft_cap: float | None) -> Array:
    """Float32 shares_BKGTS of every key in what a query reads: 0 where it may not look, 1 in all but for the sink's."""
    scores_BKGTS = _masked(_scores(q_BTHC, k_BSKC, soft_cap), visible_BTS)
    if sinks_H is None:
        return jax.nn.softmax(scores_BKGTS, axis=-1)
    normaliser_BKGT = jnp.logaddexp(jax.nn.logsumexp(scores_BKGTS, axis=-1), _grouped_sinks(sinks_H, k_BSKC))
    return jnp.exp(scores_BKGTS - normaliser_BKGT[..., None])


def mixed(shares_BKGTS: Array, v_BSKC: Array) -> Array:
    """Attention's output o_BTHC: each query's share of every value."""
    o_BTKGC = jnp.einsum("BKGTS,BSKC->BTKGC", shares_BKGTS.astype(v_BSKC.dtype), v_BSKC)
    B, T, K, G, C = o_BTKGC.shape
    return o_BTKGC.reshape(B, T, K * G, C)


def _chunked(
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    sinks_H: Array | None,
    here: Places,
    there: Places,
    sight: Sight,
    soft_cap: float | None,
) -> Array:
    """Blocks of queries, each against the keys it can see or a few more; memory O(block * S), not O(T * S)."""

    def local(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, sinks_H: Array | None, here: Places, there: Places) -> Array:
        arguments = (q_BTHC, k_BSKC, v_BSKC, sinks_H, here, there)
        T, S = q_BTHC.shape[1], k_BSKC.shape[1]
        behind, ahead = reach(sight, S)
        block = _block_length(T, (behind + ahead + 1) // 2)
        if 3 * (behind + block + ahead) <= S:
            return _near(*arguments, block, sight, soft_cap)
        return _spans(*arguments, _block_length(T, T // 4), sight, soft_cap)

    # shard_map adds up the gradients of keys and values over context: every rank's queries looked at all of them.
    specs = tuple(acts(letters) for letters in ("BTHC", "BSKC", "BSKC", "H", "BT", "BS"))
    return jax.shard_map(local, in_specs=specs, out_specs=acts("BTHC"), check_vma=False)(
        q_BTHC, k_BSKC, v_BSKC, sinks_H, here, there
    )


def _spans(
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    sinks_H: Array | None,
    here: Places,
    there: Places,
    block: int,
    sight: Sight,
    soft_cap: float | None,
) -> Array:
    """Queries that see much of the row: in up to four spans, each against the keys that its queries can see."""
    T, S = q_BTHC.shape[1], k_BSKC.shape[1]
    behind, ahead = reach(sight, S)
    length = -(-T // (4 * block)) * block
    first = jax.lax.axis_index("context") * T
    outputs = []
    for start in range(0, T, length):
        stop = min(start + length, T)
        # Under context parallelism a rank's first query is not known at compile time: it looks at all keys.
        low, high = (max(start - behind, 0), min(stop + ahead, S)) if T == S else (0, S)
        q, at = _cut((q_BTHC, here), start, stop)
        k, v, around = _cut((k_BSKC, v_BSKC, there), low, high)
        outputs.append(_span(Queries(q, at, first + start), k, v, around, low, sinks_H, block, sight, soft_cap))
    return jnp.concatenate(outputs, axis=1)


def _span(
    queries: Queries,
    k_BSKC: Array,
    v_BSKC: Array,
    there: Places,
    low: int,
    sinks_H: Array | None,
    block: int,
    sight: Sight,
    soft_cap: float | None,
) -> Array:
    """Queries all against the same keys, the first of which is at place `low` of its row."""

    def one_block(queries: Queries) -> Array:
        q_BTHC, here, first = queries
        s_S = low + jnp.arange(k_BSKC.shape[1])
        visible_BTS = visible(here, there, first + jnp.arange(block), s_S, sight)
        return _block(soft_cap, q_BTHC, k_BSKC, v_BSKC, sinks_H, visible_BTS)

    if queries.q_BTHC.shape[1] == block:
        return one_block(queries)
    return _looped(jax.checkpoint(one_block), queries, block)


def _near(
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    sinks_H: Array | None,
    here: Places,
    there: Places,
    block: int,
    sight: Sight,
    soft_cap: float | None,
) -> Array:
    """Queries that see little of the row: a loop over blocks, each against the keys around it."""
    T, S = q_BTHC.shape[1], k_BSKC.shape[1]
    behind, ahead = reach(sight, S)
    width = behind + block + ahead

    def one_block(queries: Queries) -> Array:
        q_BTHC, here, first = queries
        low = jnp.clip(first - behind, 0, S - width)
        k_near, v_near, around = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, low, width, axis=1), (k_BSKC, v_BSKC, there)
        )
        visible_BTS = visible(here, around, first + jnp.arange(block), low + jnp.arange(width), sight)
        return _block(soft_cap, q_BTHC, k_near, v_near, sinks_H, visible_BTS)

    # The backward pass cuts keys and makes masks anew, but no block's output.
    kept = jax.checkpoint_policies.save_only_these_names("block_out", "block_normaliser")
    queries = Queries(q_BTHC, here, jax.lax.axis_index("context") * T)
    return _looped(jax.checkpoint(one_block, policy=kept), queries, block)


def _looped(one_block: Callable[[Queries], Array], queries: Queries, block: int) -> Array:
    """one_block's output for every block of the queries.

    Written out instead of looped, XLA would keep the scores of all blocks at once.
    """
    B, T, H, C = queries.q_BTHC.shape
    n = T // block
    q_blocks, here_blocks = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(B, n, block, *x.shape[2:]), 1, 0), (queries.q_BTHC, queries.here)
    )
    o_blocks = jax.lax.map(one_block, Queries(q_blocks, here_blocks, queries.first + block * jnp.arange(n)))
    return jnp.moveaxis(o_blocks, 0, 1).reshape(B, T, H, C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(
    soft_cap: float | None, q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, sinks_H: Array | None, visible_BTS: Array
) -> Array:
    """dense's numbers; the backward pass makes the scores again from the log-normalisers, as in FlashAttention
    (Dao et al. 2022), instead of reading back what the softmax left."""
    return _block_forward(soft_cap, q_BTHC, k_BSKC, v_BSKC, sinks_H, visible_BTS)[0]


def _block_forward(
    soft_cap: float | None, q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, sinks_H: Array | None, visible_BTS: Array
) -> tuple[Array, tuple]:
    B, T, H, C = q_BTHC.shape
    scores_BKGTS = _masked(_scores(q_BTHC, k_BSKC, soft_cap), visible_BTS)
    highest_BKGT = jnp.max(scores_BKGTS, axis=-1)
    if sinks_H is not None:
        highest_BKGT = jnp.maximum(highest_BKGT, _grouped_sinks(sinks_H, k_BSKC))
    exp_BKGTS = jnp.exp(scores_BKGTS - highest_BKGT[..., None])
    sum_BKGT = jnp.sum(exp_BKGTS, axis=-1)
    if sinks_H is not None:
        sum_BKGT += jnp.exp(_grouped_sinks(sinks_H, k_BSKC) - highest_BKGT)
    o_BKGTC = jnp.einsum("BKGTS,BSKC->BKGTC", exp_BKGTS.astype(v_BSKC.dtype), v_BSKC)
    o_BKGTC = (o_BKGTC / sum_BKGT[..., None]).astype(v_BSKC.dtype)
    o_BTHC = jnp.moveaxis(o_BKGTC, 3, 1).reshape(B, T, H, C)
    kept = (
        checkpoint_name(o_BKGTC, "block_out"),
        checkpoint_name(highest_BKGT + jnp.log(sum_BKGT), "block_normaliser"),
    )
    return o_BTHC, (q_BTHC, k_BSKC, v_BSKC, sinks_H, visible_BTS, *kept)


def _block_backward(
    soft_cap: float | None, saved: tuple, do_BTHC: Array
) -> tuple[Array, Array, Array, Array | None, None]:
    q_BTHC, k_BSKC, v_BSKC, sinks_H, visible_BTS, o_BKGTC, normaliser_BKGT = saved
    B, T, H, C = q_BTHC.shape
    do_BKGTC = jnp.moveaxis(_grouped(do_BTHC, k_BSKC), 1, 3)
    capped_BKGTS = _scores(q_BTHC, k_BSKC, soft_cap)
    share_BKGTS = jnp.exp(_masked(capped_BKGTS, visible_BTS) - normaliser_BKGT[..., None])
    dshare_BKGTS = jnp.einsum("BKGTC,BSKC->BKGTS", do_BKGTC, v_BSKC, preferred_element_type=jnp.float32)
    inner_BKGT = jnp.sum(do_BKGTC.astype(jnp.float32) * o_BKGTC, axis=-1)
    dscores_BKGTS = share_BKGTS * (dshare_BKGTS - inner_BKGT[..., None])
    if soft_cap is not None:
        dscores_BKGTS *= 1 - jnp.square(capped_BKGTS / soft_cap)
    dscores_BKGTS = dscores_BKGTS.astype(q_BTHC.dtype)
    scale = 1 / math.sqrt(C)
    dq_BTHC = (jnp.einsum("BKGTS,BSKC->BTKGC", dscores_BKGTS, k_BSKC) * scale).reshape(B, T, H, C)
    dk_BSKC = jnp.einsum("BKGTS,BTKGC->BSKC", dscores_BKGTS, _grouped(q_BTHC * scale, k_BSKC))
    dv_BSKC = jnp.einsum("BKGTS,BKGTC->BSKC", share_BKGTS.astype(v_BSKC.dtype), do_BKGTC)
    dsinks_H = None
    if sinks_H is not None:
        # The sink's value is zero: its share moves by -inner alone.
        sink_share_BKGT = jnp.exp(_grouped_sinks(sinks_H, k_BSKC) - normaliser_BKGT)
        dsinks_H = -jnp.sum(sink_share_BKGT * inner_BKGT, axis=(0, 3)).reshape(H)
    return dq_BTHC, dk_BSKC, dv_BSKC, dsinks_H, None


_block.defvjp(_block_forward, _block_backward)


def _scores(q_BTHC: Array, k_BSKC: Array, soft_cap: float | None) -> Array:
    """Float32 scores_BKGTS of every query and key, capped."""
    q_BTKGC = _grouped(q_BTHC * (1 / math.sqrt(q_BTHC.shape[-1])), k_BSKC)
    scores_BKGTS = jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32)
    return scores_BKGTS if soft_cap is None else soft_cap * jnp.tanh(scores_BKGTS / soft_cap)


def _masked(scores_BKGTS: Array, visible_BTS: Array) -> Array:
    """MASKED where a query may not look."""
    return jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED)


def _grouped(x_BTHC: Array, k_BSKC: Array) -> Array:
    """[B, T, K, G, C]: the query heads of each key head together."""
    B, T, H, C = x_BTHC.shape
    return x_BTHC.reshape(B, T, k_BSKC.shape[2], H // k_BSKC.shape[2], C)


def _grouped_sinks(sinks_H: Array, k_BSKC: Array) -> Array:
    """[1, K, G, 1], to meet what is [B, K, G, T]."""
    K = k_BSKC.shape[2]
    return sinks_H.astype(jnp.float32).reshape(1, K, sinks_H.shape[0] // K, 1)


def _cut(arrays: Any, start: int, stop: int) -> Any:
    """[start, stop) of the second axis of every array."""
    return jax.tree.map(lambda x: x[:, start:stop], arrays)


def _block_length(T: int, wished: int) -> int:
    """The longest up to the wished one, that between 64 and 512, which divides the row; the row where none does."""
    for block in range(min(max(64, wished), 512, T), 31, -1):
        if T % block == 0:
            return block
    return T
