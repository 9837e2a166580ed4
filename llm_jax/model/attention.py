"""Attention backends behind one signature; all give the same numbers, they differ in memory and speed."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llm_jax.mesh import acts
from llm_jax.model.chunked import chunked
from llm_jax.model.sight import ATTENDED, MASKED, Places, Sight, visible


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
    # Pallas takes half a second to import: kernels are, where they run.
    match backend:
        case "xla":
            return _xla(*arguments, sight, soft_cap)
        case "chunked":
            return chunked(*arguments, sight, soft_cap)
        case "splash":
            from llm_jax.model.kernels import splash

            return splash(*arguments, sight, soft_cap)
        case "flash":
            from llm_jax.model.flash import flash

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
    o_BTHC = dense(q_BTHC, k_BSKC, v_BSKC, sinks_H, visible(here, there, t_T, s_S, sight), soft_cap)
    return checkpoint_name(o_BTHC, ATTENDED)


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
