"""Attention by its definition, in numpy and float64: who sees whom token by token, a plain softmax, its gradients."""

import functools
from typing import NamedTuple

import numpy as np

from llm_jax.model.sight import Sight


class Inputs(NamedTuple):
    """What attention reads, and the cotangent of what it returns."""

    q_BTHC: np.ndarray
    k_BTKC: np.ndarray
    v_BTKC: np.ndarray
    sinks_H: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    do_BTHC: np.ndarray


def inputs(B: int, T: int, H: int, K: int, C: int, starts: tuple[int, ...] | None = None) -> Inputs:
    """Random ones: the first row is one document and the others are a few, or all rows have these borders."""
    rng = np.random.default_rng(T)
    q, k, v, do = (rng.normal(size=(B, T, heads, C)).astype(np.float32) for heads in (H, K, K, H))
    borders = rng.random((B, T)) < 4 / T
    borders[0] = False
    if starts is not None:
        borders[:] = np.isin(np.arange(T), starts)
    segments, positions = places(borders)
    return Inputs(q, k, v, rng.normal(size=H).astype(np.float32), segments, positions, do)


def places(borders_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token's document and its position inside of it, int32, where documents start at borders."""
    borders_BT = borders_BT.copy()
    borders_BT[:, 0] = True
    place_T = np.arange(borders_BT.shape[1])
    segments = np.cumsum(borders_BT, axis=1) - 1
    positions = place_T - np.maximum.accumulate(np.where(borders_BT, place_T, 0), axis=1)
    return segments.astype(np.int32), positions.astype(np.int32)


@functools.cache
def _sees(sight: Sight, segments: tuple[int, ...], positions: tuple[int, ...]) -> np.ndarray:
    places = list(zip(segments, positions, strict=True))
    return np.array([[mine == its and _allows(sight, here, there) for its, there in places] for mine, here in places])


def sees(sight: Sight, segments_T: np.ndarray, positions_T: np.ndarray) -> np.ndarray:
    """Bool [T, S]: whether the token at t sees the one at s; every pair is asked."""
    return _sees(sight, tuple(segments_T.tolist()), tuple(positions_T.tolist()))


def _allows(sight: Sight, here: int, there: int) -> bool:
    """Whether the token at position `here` of a document sees the one at `there`."""
    if sight.causal and there > here:
        return False
    if sight.window is not None:
        return here - there < sight.window if sight.causal else 2 * abs(here - there) <= sight.window
    if sight.block is not None:
        start = here - here % sight.block
        in_block = start <= there < start + sight.block
        return in_block or here < sight.global_tokens or there < sight.global_tokens
    return True


def reference(x: Inputs, sight: Sight, soft_cap: float | None, sinks: bool) -> list[np.ndarray]:
    """The output and the gradients of q, k, v and, if there are sinks, of them."""
    q, k, v, do = (a.astype(np.float64) for a in (x.q_BTHC, x.k_BTKC, x.v_BTKC, x.do_BTHC))
    B, T, H, C = q.shape
    o, dq, dk, dv = (np.zeros_like(a) for a in (q, q, k, v))
    dsinks = np.zeros(H)
    for b in range(B):
        seen = sees(sight, x.segments_BT[b], x.positions_BT[b])
        for h in range(H):
            group = h // (H // k.shape[2])
            keys, values = k[b, :, group], v[b, :, group]
            scores = q[b, :, h] @ keys.T / np.sqrt(C)
            slope = np.ones_like(scores)
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
                slope = 1 - (scores / soft_cap) ** 2
            # One more key for the sink; its value is zero.
            sink = np.full((T, 1), x.sinks_H[h] if sinks else -np.inf)
            exp = np.exp(np.concatenate([np.where(seen, scores, -np.inf), sink], axis=1))
            shares = exp / exp.sum(axis=1, keepdims=True)
            o[b, :, h] = shares[:, :T] @ values
            dshares = np.concatenate([do[b, :, h] @ values.T, np.zeros((T, 1))], axis=1)
            dscores = shares * (dshares - np.sum(shares * dshares, axis=1, keepdims=True))
            dsinks[h] += dscores[:, T].sum()
            draw = dscores[:, :T] * slope / np.sqrt(C)
            dq[b, :, h] = draw @ keys
            dk[b, :, group] += draw.T @ q[b, :, h]
            dv[b, :, group] += shares[:, :T].T @ do[b, :, h]
    return [o, dq, dk, dv, dsinks] if sinks else [o, dq, dk, dv]
