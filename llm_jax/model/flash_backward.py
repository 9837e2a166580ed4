"""The gradients of attention's kernels for GPUs: shares are made again from the log-normalisers (Dao et al. 2022).

One kernel goes along the keys for the queries' gradients, the other along the queries for those of keys and values, so
that each adds up what is its own, in float32, and neither waits for another.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from llm_jax.model.flash_tiles import How, Ways, along, cost, loaded, power, scores, stored


def queries_gradient(
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    do_BTHC: Array,
    normaliser_BHT: Array,
    inner_BHT: Array,
    to: Ways,
    how: How,
) -> Array:
    """dq_BTHC; inner_BHT is the product of each query's output and its gradient."""
    (B, T, H, C), (S, K) = q_BTHC.shape, k_BSKC.shape[1:3]
    tiles, G, width = how.tiles.queries, H // K, power(C)
    of_tile = pl.BlockSpec((None, tiles.queries, None, width), lambda i, h, b: (b, i, h, 0))
    of_row = pl.BlockSpec((None, S, None, width), lambda i, h, b: (b, 0, h // G, 0))
    interval = pl.BlockSpec((None, tiles.queries), lambda i, h, b: (b, i))
    of_query = pl.BlockSpec((None, None, tiles.queries), lambda i, h, b: (b, h, i))
    return pl.pallas_call(
        functools.partial(_queries_kernel, channels=C, soft_cap=how.soft_cap, keys=tiles.keys),
        grid=(T // tiles.queries, H, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0)),
            interval,
            interval,
            of_tile,
            of_row,
            of_row,
            of_tile,
            of_query,
            of_query,
        ],
        out_specs=of_tile,
        out_shape=jax.ShapeDtypeStruct(q_BTHC.shape, q_BTHC.dtype),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=cost(q_BTHC, k_BSKC, 3),
        interpret=how.interpret,
        name="flash_queries_gradient",
    )(to.queries, *to.seen, q_BTHC, k_BSKC, v_BSKC, do_BTHC, normaliser_BHT, inner_BHT)


def _queries_kernel(
    span: Any,
    low_ref: Any,
    high_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    do_ref: Any,
    normaliser_ref: Any,
    inner_ref: Any,
    dq_ref: Any,
    *,
    channels: int,
    soft_cap: float | None,
    keys: int,
) -> None:
    """A tile of queries of one head along the keys."""
    q_TC, do_TC = loaded(q_ref, channels), loaded(do_ref, channels)
    low_T1, high_T1, normaliser_T1, inner_T1 = (
        ref[...][:, None] for ref in (low_ref, high_ref, normaliser_ref, inner_ref)
    )

    def step(j: Array, dq_TC: Array, masked: bool) -> Array:
        at = pl.ds(j * keys, keys)
        k_SC, v_SC = (loaded(ref.at[at, :], channels) for ref in (k_ref, v_ref))
        scores_TS, tanh_TS = scores(q_TC, k_SC, channels, soft_cap)
        if masked:
            s_1S = (j * keys + jnp.arange(keys))[None]
            scores_TS = jnp.where((low_T1 <= s_1S) & (s_1S < high_T1), scores_TS, -jnp.inf)
        dshare_TS = triton.dot(do_TC, v_SC, trans_b=True)
        dscores_TS = jnp.exp2(scores_TS - normaliser_T1) * (dshare_TS - inner_T1)
        if tanh_TS is not None:
            dscores_TS *= 1 - tanh_TS * tanh_TS
        return dq_TC + triton.dot(dscores_TS.astype(k_SC.dtype), k_SC)

    dq_TC = along(span, step, jnp.zeros(q_TC.shape, jnp.float32))
    stored(dq_ref, dq_TC * (1 / math.sqrt(channels)), channels)


def keys_gradients(
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    do_BTHC: Array,
    normaliser_BHT: Array,
    inner_BHT: Array,
    to: Ways,
    how: How,
) -> tuple[Array, Array]:
    """dk_BSKC and dv_BSKC, the sums over all query heads of a group."""
    (B, T, H, C), (S, K) = q_BTHC.shape, k_BSKC.shape[1:3]
    tiles, G, width = how.tiles.keys, H // K, power(C)
    of_tile = pl.BlockSpec((None, tiles.keys, None, width), lambda j, k, b: (b, j, k, 0))
    of_row = pl.BlockSpec((None, T, G, width), lambda j, k, b: (b, 0, k, 0))
    interval = pl.BlockSpec((None, T), lambda j, k, b: (b, 0))
    of_query = pl.BlockSpec((None, G, T), lambda j, k, b: (b, k, 0))
    return pl.pallas_call(
        functools.partial(_keys_kernel, channels=C, soft_cap=how.soft_cap, queries=tiles.queries),
        grid=(S // tiles.keys, K, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda j, k, b: (b, j, 0)),
            interval,
            interval,
            of_row,
            of_tile,
            of_tile,
            of_row,
            of_query,
            of_query,
        ],
        out_specs=[of_tile, of_tile],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKC, v_BSKC)],
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=cost(q_BTHC, k_BSKC, 4),
        interpret=how.interpret,
        name="flash_keys_gradients",
    )(to.keys, *to.seen, q_BTHC, k_BSKC, v_BSKC, do_BTHC, normaliser_BHT, inner_BHT)


def _keys_kernel(
    span: Any,
    low_ref: Any,
    high_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    do_ref: Any,
    normaliser_ref: Any,
    inner_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    channels: int,
    soft_cap: float | None,
    queries: int,
) -> None:
    """A tile of keys along the queries of all heads of its group; scores are those of keys and queries, [S, T]."""
    k_SC, v_SC = loaded(k_ref, channels), loaded(v_ref, channels)
    S = k_SC.shape[0]
    s_S1 = (pl.program_id(0) * S + jnp.arange(S))[:, None]

    def head(g: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def step(i: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
            dk_SC, dv_SC = carry
            at = pl.ds(i * queries, queries)
            q_TC, do_TC = (loaded(ref.at[at, g, :], channels) for ref in (q_ref, do_ref))
            normaliser_1T, inner_1T = (ref[g, at][None] for ref in (normaliser_ref, inner_ref))
            scores_ST, tanh_ST = scores(k_SC, q_TC, channels, soft_cap)
            if masked:
                low_1T, high_1T = (ref[at][None] for ref in (low_ref, high_ref))
                scores_ST = jnp.where((low_1T <= s_S1) & (s_S1 < high_1T), scores_ST, -jnp.inf)
            share_ST = jnp.exp2(scores_ST - normaliser_1T)
            dv_SC += triton.dot(share_ST.astype(do_TC.dtype), do_TC)
            dshare_ST = triton.dot(v_SC, do_TC, trans_b=True)
            dscores_ST = share_ST * (dshare_ST - inner_1T)
            if tanh_ST is not None:
                dscores_ST *= 1 - tanh_ST * tanh_ST
            return dk_SC + triton.dot(dscores_ST.astype(q_TC.dtype), q_TC), dv_SC

        return along(span, step, carry)

    zeros_SC = jnp.zeros(k_SC.shape, jnp.float32)
    dk_SC, dv_SC = jax.lax.fori_loop(0, q_ref.shape[1], head, (zeros_SC, zeros_SC))
    stored(dk_ref, dk_SC * (1 / math.sqrt(channels)), channels)
    stored(dv_ref, dv_SC, channels)
