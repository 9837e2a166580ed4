"""Cross-entropy against a vocabulary that may be sharded: sums, never means, and no [tokens, V] array kept."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, P

from llm_jax.alphabet import ROW_AXES
from llm_jax.mesh import acts, weights
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Head, soft_cap
from llm_jax.model.weights import after, summed_as_stored, whole


class Sums(NamedTuple):
    """Sums over weighted tokens, float32 scalars: nats, squared log-normalisers, and right first guesses."""

    nll: Array
    z_squared: Array
    correct: Array


def cross_entropy_sums(
    x_BTD: Array, head: Head, targets_BT: Array, weights_BT: Array, cfg: ModelConfig, z_loss: float
) -> tuple[Array, Sums]:
    """The sum over tokens of weight * (nll + z_loss * log_normaliser**2), and its parts without a gradient.

    Loss and gradient are made together, chunk by chunk of tokens; the gradient flows to x_BTD and the head.
    """
    if head.transform is not None:
        x_BTD = head.transform(x_BTD, cfg)
    return _fused(x_BTD, head.unembed_VD, head.bias_V, targets_BT, weights_BT, cfg, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _fused(
    x_BTD: Array,
    head_VD: Array,
    bias_V: Array | None,
    targets_BT: Array,
    weights_BT: Array,
    cfg: ModelConfig,
    z_loss: float,
) -> tuple[Array, Sums]:
    arguments = (x_BTD, head_VD, bias_V, targets_BT, weights_BT)
    (total, sums), _ = _fused_forward(*arguments, cfg, z_loss, with_gradient=False)
    return total, sums


# The sum's gradients by x_BTD, head_VD and bias_V, each of its array's type.
_Gradients = tuple[Array, Array, Array | None]


def _fused_forward(
    x_BTD: Array,
    head_VD: Array,
    bias_V: Array | None,
    targets_BT: Array,
    weights_BT: Array,
    cfg: ModelConfig,
    z_loss: float,
    with_gradient: bool = True,
) -> tuple[tuple[Array, Sums], _Gradients | None]:
    """Inside the wall each device has its own tokens and its own part of the vocabulary."""

    def local(
        x_BTD: Array, head_VD: Array, bias_V: Array | None, targets_BT: Array, weights_BT: Array
    ) -> tuple[Array, _Gradients | None]:
        head_VD = whole(after(head_VD, x_BTD), "VD")
        n = targets_BT.size
        chunks = _chunk_count(n, head_VD.shape[0], cfg)
        x_QND = x_BTD.reshape(chunks, n // chunks, x_BTD.shape[-1])
        targets_QN, weights_QN = (a.reshape(chunks, n // chunks) for a in (targets_BT, weights_BT))

        def one_chunk(dhead: _DHead, chunk: tuple[Array, Array, Array]) -> tuple[_DHead, tuple[Array, Array]]:
            x_ND, targets_N, weights_N = chunk
            logits_NV, slope_NV = _local_logits(x_ND, head_VD, bias_V, cfg)
            part = _vocabulary_sums(logits_NV, targets_N)
            values_N3 = jnp.stack([part.log_z_N - part.picked_N, jnp.square(part.log_z_N), part.correct_N], axis=1)
            sums = weights_N @ values_N3
            if not with_gradient:
                return dhead, (sums, jnp.zeros((), x_ND.dtype))
            dlogits_NV = _dlogits(part, slope_NV, weights_N, cfg, z_loss)
            dbias_V = None if dhead.bias_V is None else dhead.bias_V + jnp.sum(dlogits_NV, axis=0)
            dlogits_NV = dlogits_NV.astype(x_ND.dtype)
            dx_ND = jax.lax.psum(dlogits_NV @ head_VD, "tensor")
            x_DN = jax.lax.optimization_barrier(x_ND.T)
            dhead_VD = dhead.head_VD + jnp.einsum("DN,NV->DV", x_DN, dlogits_NV, preferred_element_type=jnp.float32)
            return _DHead(dhead_VD, dbias_V), (sums, dx_ND)

        nothing = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), _DHead(head_VD.T, bias_V))
        dhead, (sums, dx_QND) = jax.lax.scan(one_chunk, nothing, (x_QND, targets_QN, weights_QN))
        sums = jax.lax.psum(jnp.sum(sums, axis=0), ROW_AXES)
        if not with_gradient:
            return sums, None
        dhead_VD = summed_as_stored(dhead.head_VD.T, "VD").astype(head_VD.dtype)
        dbias_V = None if dhead.bias_V is None else jax.lax.psum(dhead.bias_V, ROW_AXES)
        dx_BTD = after(dx_QND.reshape(x_BTD.shape), dhead_VD, *(() if dbias_V is None else (dbias_V,)))
        return sums, (dx_BTD, dhead_VD, dbias_V)

    of_head = (weights("VD"), P("tensor") if bias_V is not None else None)
    specs = (acts("BTD"), *of_head, acts("BT"), acts("BT"))
    out_specs = (P(), (acts("BTD"), *of_head) if with_gradient else None)
    wall = jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)
    sums, gradients = wall(x_BTD, head_VD, bias_V, targets_BT, weights_BT)
    parts = Sums(sums[0], sums[1], sums[2])
    return (parts.nll + z_loss * parts.z_squared, parts), gradients


class _DHead(NamedTuple):
    """The head's gradient so far, float32."""

    head_VD: Array
    bias_V: Array | None


def _fused_backward(
    cfg: ModelConfig, z_loss: float, gradients: _Gradients, cotangents: tuple[Array, Sums]
) -> tuple[Array, Array, Array | None, None, None]:
    scale = cotangents[0]
    dx_BTD, dhead_VD, dbias_V = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
    return dx_BTD, dhead_VD, dbias_V, None, None


_fused.defvjp(_fused_forward, _fused_backward)


def token_scores(x_BTD: Array, head: Head, targets_BT: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """Nats of each target and whether it is the first guess, both float32 [B, T]; for evaluation."""
    if head.transform is not None:
        x_BTD = head.transform(x_BTD, cfg)

    def local(x_BTD: Array, head_VD: Array, bias_V: Array | None, targets_BT: Array) -> tuple[Array, Array]:
        head_VD = whole(after(head_VD, x_BTD), "VD")
        n = targets_BT.size
        chunks = _chunk_count(n, head_VD.shape[0], cfg)

        def one_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
            x_ND, targets_N = chunk
            logits_NV, _ = _local_logits(x_ND, head_VD, bias_V, cfg)
            part = _vocabulary_sums(logits_NV, targets_N)
            return part.log_z_N - part.picked_N, part.correct_N

        chunked = (x_BTD.reshape(chunks, n // chunks, -1), targets_BT.reshape(chunks, n // chunks))
        nll_QN, correct_QN = jax.lax.map(one_chunk, chunked)
        return nll_QN.reshape(targets_BT.shape), correct_QN.reshape(targets_BT.shape)

    specs = (acts("BTD"), weights("VD"), P("tensor") if head.bias_V is not None else None, acts("BT"))
    wall = jax.shard_map(local, in_specs=specs, out_specs=(acts("BT"), acts("BT")), check_vma=False)
    return wall(x_BTD, head.unembed_VD, head.bias_V, targets_BT)


def _dlogits(part: "_Part", slope_NV: Array, weights_N: Array, cfg: ModelConfig, z_loss: float) -> Array:
    """The gradient of a chunk's sum by the logits before the soft cap, float32."""
    scale_N = weights_N * (1 + 2 * z_loss * part.log_z_N) / part.z_N
    # A comparison, where a scatter of N values would do: so nothing stands between this and the cast to x's type, and
    # accelerators write the gradient once.
    is_target_NV = jnp.arange(part.exp_NV.shape[1])[None] == part.target_N[:, None]
    dlogits_NV = part.exp_NV * scale_N[:, None] - jnp.where(is_target_NV, weights_N[:, None], 0.0)
    return dlogits_NV if cfg.logit_soft_cap is None else dlogits_NV * slope_NV


def _local_logits(x_ND: Array, head_VD: Array, bias_V: Array | None, cfg: ModelConfig) -> tuple[Array, Array]:
    """Float32 logits of this device's part of the vocabulary, padding masked, and their slope under the soft cap."""
    logits_NV = jnp.einsum("ND,VD->NV", x_ND, head_VD, preferred_element_type=jnp.float32)
    if bias_V is not None:
        logits_NV += bias_V[None]
    slope_NV = jnp.ones((1, 1), jnp.float32)
    if cfg.logit_soft_cap is not None:
        logits_NV = soft_cap(logits_NV, cfg.logit_soft_cap)
        slope_NV = 1 - jnp.square(logits_NV / cfg.logit_soft_cap)
    if cfg.padded_vocab_size > cfg.vocab_size:
        V = head_VD.shape[0]
        vocabulary_V = jax.lax.axis_index("tensor") * V + jnp.arange(V)
        logits_NV = jnp.where((vocabulary_V < cfg.vocab_size)[None], logits_NV, -1e30)
    return logits_NV, slope_NV


class _Part(NamedTuple):
    """A chunk of tokens against this device's part of the vocabulary, N tokens; sums are over the whole vocabulary."""

    exp_NV: Array
    """exp(logit - the highest logit)."""
    z_N: Array
    """The sum of exp_NV."""
    log_z_N: Array
    """The log-normaliser of the logits."""
    target_N: Array
    """The target's place in this part; no place of it where another part has the target."""
    picked_N: Array
    """The target's logit."""
    correct_N: Array
    """1 where the target is the first guess: nothing has a higher logit, and nothing before it the same."""


def _vocabulary_sums(logits_NV: Array, targets_N: Array) -> _Part:
    V = logits_NV.shape[1]
    highest_N = jax.lax.pmax(jnp.max(logits_NV, axis=1), "tensor")
    exp_NV = jnp.exp(logits_NV - highest_N[:, None])
    z_N = jax.lax.psum(jnp.sum(exp_NV, axis=1), "tensor")
    target_N = targets_N - jax.lax.axis_index("tensor") * V
    mine_N = (target_N >= 0) & (target_N < V)
    mine = logits_NV.at[jnp.arange(targets_N.size), target_N].get(mode="clip")
    picked_N = jax.lax.psum(jnp.where(mine_N, mine, 0.0), "tensor")
    # Whether anything is ahead of it is cheaper on a CPU than a count, and that than an argmax.
    before_NV = jnp.arange(V)[None] < target_N[:, None]
    ahead_NV = (logits_NV > picked_N[:, None]) | (before_NV & (logits_NV == picked_N[:, None]))
    ahead_N = jax.lax.psum(jnp.any(ahead_NV, axis=1).astype(jnp.float32), "tensor")
    correct_N = (ahead_N == 0).astype(jnp.float32)
    return _Part(exp_NV, z_N, jnp.log(z_N) + highest_N, target_N, picked_N, correct_N)


def _chunk_count(n_tokens: int, n_vocabulary: int, cfg: ModelConfig) -> int:
    """The smallest divisor of n_tokens that keeps a chunk's logits at cfg.logit_chunk; 1 where that is not settled."""
    if cfg.logit_chunk is None:
        return 1
    for chunks in range(-(-n_tokens * n_vocabulary // cfg.logit_chunk), n_tokens):
        if n_tokens % chunks == 0:
            return chunks
    return n_tokens
