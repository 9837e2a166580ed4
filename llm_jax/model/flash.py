"""Attention for NVIDIA GPUs: kernels that visit what queries see and keep no scores (FlashAttention-2, Dao 2023)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from llm_jax.mesh import acts
from llm_jax.model import kernels
from llm_jax.model.flash_backward import keys_gradients, queries_gradient
from llm_jax.model.flash_tiles import LOG2_E, How, Ways, along, cost, loaded, power, scores, stored, tiles_for, ways
from llm_jax.model.intervals import Intervals, intervals
from llm_jax.model.sight import ATTENDED, Places, Sight

# Below every score, and not so far that differences overflow.
LOWEST = -1e30


def flash(
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    sinks_H: Array | None,
    there: Places,
    sight: Sight,
    soft_cap: float | None,
) -> Array:
    """The kernels on every device's rows, queries and heads; see `attention`.

    Memory O(T). They know no global tokens. Where tiles do not divide the row, it is filled up.
    """

    def local(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, sinks_H: Array | None, there: Places) -> Array:
        T, S, C = q_BTHC.shape[1], k_BSKC.shape[1], q_BTHC.shape[3]
        how = How(soft_cap, tiles_for(T, S, C), kernels.INTERPRET)
        first = jax.lax.axis_index("context") * T
        mine = (jax.lax.dynamic_slice_in_dim(x, first, T, axis=1) for x in intervals(there, sight))
        return attend(q_BTHC, k_BSKC, v_BSKC, sinks_H, Intervals(*mine), how)

    # shard_map adds up the gradients of keys and values over context: every rank's queries looked at all of them.
    specs = tuple(acts(letters) for letters in ("BTHC", "BSKC", "BSKC", "H", "BS"))
    wall = jax.shard_map(local, in_specs=specs, out_specs=acts("BTHC"), check_vma=False)
    return wall(q_BTHC, k_BSKC, v_BSKC, sinks_H, there)


def attend(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, sinks_H: Array | None, seen: Intervals, how: How) -> Array:
    """o_BTHC of one device's arrays, each query of which sees an interval of the keys."""
    T, S = q_BTHC.shape[1], k_BSKC.shape[1]
    to_T, to_S = (-T % max(t.queries for t in how.tiles), -S % max(t.keys for t in how.tiles))
    q_BTHC, k_BSKC, v_BSKC = (_filled(x, n, 0) for x, n in ((q_BTHC, to_T), (k_BSKC, to_S), (v_BSKC, to_S)))
    # Who was added sees nobody.
    seen = Intervals(_filled(seen.low, to_T, S), _filled(seen.high, to_T, 0))
    sinks_H = None if sinks_H is None else sinks_H.astype(jnp.float32)
    # Found here and not inside, so that layers that look alike find it once.
    to = ways(seen, how.tiles, S + to_S)
    o_BTHC: Array = _attend(how, q_BTHC, k_BSKC, v_BSKC, sinks_H, to)
    return o_BTHC[:, :T]


def _filled(x_BT: Array, n: int, value: int) -> Array:
    return jnp.pad(x_BT, [(0, 0), (0, n)] + [(0, 0)] * (x_BT.ndim - 2), constant_values=value) if n else x_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, sinks_H: Array | None, to: Ways) -> Array:
    """o_BTHC where tiles divide T and S."""
    return _forward(how, q_BTHC, k_BSKC, v_BSKC, sinks_H, to)[0]


def _forward(
    how: How, q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, sinks_H: Array | None, to: Ways
) -> tuple[Array, tuple[Any, ...]]:
    (B, T, H, C), (S, K) = q_BTHC.shape, k_BSKC.shape[1:3]
    tiles, G, width = how.tiles.forward, H // K, power(C)
    of_tile = pl.BlockSpec((None, tiles.queries, None, width), lambda i, h, b: (b, i, h, 0))
    of_row = pl.BlockSpec((None, S, None, width), lambda i, h, b: (b, 0, h // G, 0))
    interval = pl.BlockSpec((None, tiles.queries), lambda i, h, b: (b, i))
    outputs: Any = pl.pallas_call(
        functools.partial(_kernel, channels=C, soft_cap=how.soft_cap, keys=tiles.keys),
        grid=(T // tiles.queries, H, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0)),
            interval,
            interval,
            None if sinks_H is None else pl.BlockSpec((None,), lambda i, h, b: (h,)),
            of_tile,
            of_row,
            of_row,
        ],
        out_specs=[of_tile, pl.BlockSpec((None, None, tiles.queries), lambda i, h, b: (b, h, i))],
        out_shape=[jax.ShapeDtypeStruct(q_BTHC.shape, q_BTHC.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)],
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=cost(q_BTHC, k_BSKC, 2),
        interpret=how.interpret,
        name="flash_forward",
    )(to.forward, *to.seen, sinks_H, q_BTHC, k_BSKC, v_BSKC)
    o_BTHC, normaliser_BHT = (checkpoint_name(x, ATTENDED) for x in outputs)
    return o_BTHC, (q_BTHC, k_BSKC, v_BSKC, sinks_H, to, o_BTHC, normaliser_BHT)


def _kernel(
    span: Any,
    low_ref: Any,
    high_ref: Any,
    sink_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    o_ref: Any,
    normaliser_ref: Any,
    *,
    channels: int,
    soft_cap: float | None,
    keys: int,
) -> None:
    """A tile of queries of one head against the tiles of keys that they see, one after another."""
    q_TC, low_T1, high_T1 = loaded(q_ref, channels), low_ref[...][:, None], high_ref[...][:, None]

    def step(j: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        highest_T, sum_T, o_TC = carry
        at = pl.ds(j * keys, keys)
        scores_TS, _ = scores(q_TC, loaded(k_ref.at[at, :], channels), channels, soft_cap)
        if masked:
            s_1S = (j * keys + jnp.arange(keys))[None]
            scores_TS = jnp.where((low_T1 <= s_1S) & (s_1S < high_T1), scores_TS, -jnp.inf)
        now_T = jnp.maximum(highest_T, jnp.max(scores_TS, axis=1))
        shrunk_T, share_TS = jnp.exp2(highest_T - now_T), jnp.exp2(scores_TS - now_T[:, None])
        v_SC = loaded(v_ref.at[at, :], channels)
        o_TC = o_TC * shrunk_T[:, None] + triton.dot(share_TS.astype(v_SC.dtype), v_SC)
        return now_T, sum_T * shrunk_T + jnp.sum(share_TS, axis=1), o_TC

    T = q_TC.shape[0]
    none_T = jnp.zeros((T,), jnp.float32)
    highest_T, sum_T, o_TC = along(span, step, (none_T + LOWEST, none_T, jnp.zeros(q_TC.shape, jnp.float32)))
    if sink_ref is not None:
        sink = sink_ref[...] * LOG2_E
        now_T = jnp.maximum(highest_T, sink)
        shrunk_T = jnp.exp2(highest_T - now_T)
        highest_T, sum_T, o_TC = now_T, sum_T * shrunk_T + jnp.exp2(sink - now_T), o_TC * shrunk_T[:, None]
    # Who was added to fill a tile has seen nobody.
    sum_T = jnp.where(sum_T > 0, sum_T, 1)
    stored(o_ref, o_TC / sum_T[:, None], channels)
    normaliser_ref[...] = jnp.where(highest_T > LOWEST, highest_T + jnp.log2(sum_T), 0)


def _backward(how: How, saved: tuple[Any, ...], do_BTHC: Array) -> tuple[Array, Array, Array, Array | None, None]:
    q_BTHC, k_BSKC, v_BSKC, sinks_H, to, o_BTHC, normaliser_BHT = saved
    inner_BHT = jnp.swapaxes(jnp.sum(do_BTHC.astype(jnp.float32) * o_BTHC.astype(jnp.float32), axis=-1), 1, 2)
    arguments = (q_BTHC, k_BSKC, v_BSKC, do_BTHC, normaliser_BHT, inner_BHT, to, how)
    dsinks_H = None
    if sinks_H is not None:
        # The sink's value is zero: its share moves by -inner alone.
        share_BHT = jnp.exp2(sinks_H[None, :, None] * LOG2_E - normaliser_BHT)
        dsinks_H = -jnp.sum(share_BHT * inner_BHT, axis=(0, 2))
    return queries_gradient(*arguments), *keys_gradients(*arguments), dsinks_H, None


_attend.defvjp(_forward, _backward)
