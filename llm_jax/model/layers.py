"""A layer: attention and an MLP, each behind a norm, added to the residual stream."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llm_jax.mesh import acts
from llm_jax.model.attention import attention
from llm_jax.model.config import ModelConfig
from llm_jax.model.sight import Places, Sight
from llm_jax.model.weights import Weight, matrix, project, scale_vector, use


def rms_norm(x_BTD: Array, scale: Weight, eps: float) -> Array:
    """RMSNorm over the last axis in float32 (Zhang and Sennrich 2019), returned in x's type."""
    x32_BTD = x_BTD.astype(jnp.float32)
    mean_BT1 = jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True)
    scale_D = jnp.expand_dims(scale[...], range(x_BTD.ndim - 1))
    return (x32_BTD * jax.lax.rsqrt(mean_BT1 + eps) * scale_D).astype(x_BTD.dtype)


class Angles(NamedTuple):
    """Cosine and sine by which each half of a head's channels turns, float32 [B, T, 1, C / 2]."""

    cos_BT1C: Array
    sin_BT1C: Array


def angles(positions_BT: Array, cfg: ModelConfig) -> Angles:
    """Rotary angles (Su et al. 2021): channels c and c + C/2 turn by position * theta ** (-2c / C)."""
    half = cfg.d_head // 2
    frequency_C = jnp.asarray([cfg.rope_theta ** (-c / half) for c in range(half)], jnp.float32)
    angle_BT1C = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None]
    return Angles(jnp.cos(angle_BT1C), jnp.sin(angle_BT1C))


@jax.custom_vjp
def rotate(x_BTHC: Array, by: Angles) -> Array:
    """x with its channel pairs turned, in float32, returned in x's type; its gradient is turned back."""
    half = x_BTHC.shape[-1] // 2
    a, b = x_BTHC[..., :half].astype(jnp.float32), x_BTHC[..., half:].astype(jnp.float32)
    turned = [a * by.cos_BT1C - b * by.sin_BT1C, b * by.cos_BT1C + a * by.sin_BT1C]
    return jnp.concatenate(turned, axis=-1).astype(x_BTHC.dtype)


def _rotate_forward(x_BTHC: Array, by: Angles) -> tuple[Array, Angles]:
    return rotate(x_BTHC, by), by


def _rotate_backward(by: Angles, dy_BTHC: Array) -> tuple[Array, Angles]:
    # The angles depend on positions alone, which nothing trains.
    return rotate(dy_BTHC, Angles(by.cos_BT1C, -by.sin_BT1C)), jax.tree.map(jnp.zeros_like, by)


rotate.defvjp(_rotate_forward, _rotate_backward)


def residual_scale(cfg: ModelConfig) -> float:
    """Two additions a layer: their sum keeps its variance at any depth (GPT-2, Radford et al. 2019)."""
    return 1 / math.sqrt(2 * cfg.n_layers)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and optional query and key norms."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.q = matrix("DHC", cfg, rngs, fan_in="D")
        self.k = matrix("DKC", cfg, rngs, fan_in="D")
        self.v = matrix("DKC", cfg, rngs, fan_in="D")
        self.o = matrix("HCD", cfg, rngs, fan_in="HC", scale=residual_scale(cfg))
        if cfg.qk_norm:
            self.q_norm = scale_vector("C", cfg)
            self.k_norm = scale_vector("C", cfg)

    def __call__(self, x_BTD: Array, segments_BT: Array, by: Angles, cfg: ModelConfig, *, causal: bool) -> Array:
        """x_BTD normed, in the compute type; returns what is added to the residual stream."""
        q_BTHC = project("BTD,DHC->BTHC", x_BTD, use(self.q, cfg))
        k_BTKC = project("BTD,DKC->BTKC", x_BTD, use(self.k, cfg))
        v_BTKC = project("BTD,DKC->BTKC", x_BTD, use(self.v, cfg))
        if cfg.qk_norm:
            q_BTHC = rms_norm(q_BTHC, self.q_norm, cfg.norm_eps)
            k_BTKC = rms_norm(k_BTKC, self.k_norm, cfg.norm_eps)
        q_BTHC = checkpoint_name(rotate(q_BTHC, by), "q")
        k_BTKC = checkpoint_name(rotate(k_BTKC, by), "k")
        v_BTKC = checkpoint_name(v_BTKC, "v")
        # Keys and values of the whole row on every context rank: the one all-gather of context parallelism.
        k_BSKC, v_BSKC = jax.reshard((k_BTKC, v_BTKC), acts("BSKC"))
        segments_BS = jax.reshard(segments_BT, acts("BS"))
        # Without a block nobody asks for positions inside the document: the segments stand in for them.
        here, there = Places(segments_BT, segments_BT), Places(segments_BS, segments_BS)
        sight = Sight(causal=causal)
        o_BTHC = attention(
            q_BTHC, k_BSKC, v_BSKC, here, there, sight=sight, soft_cap=None, sinks_H=None, backend=cfg.attention
        )
        o_BTD = project("BTHC,HCD->BTD", o_BTHC, use(self.o, cfg), out_sharding=acts("BTD"))
        return checkpoint_name(o_BTD, "attention_out")


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020) or a plain GELU MLP."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        if cfg.mlp == "swiglu":
            self.gate = matrix("DF", cfg, rngs, fan_in="D")
        self.up = matrix("DF", cfg, rngs, fan_in="D")
        self.down = matrix("FD", cfg, rngs, fan_in="F", scale=residual_scale(cfg))

    def __call__(self, x_BTD: Array, cfg: ModelConfig) -> Array:
        """x_BTD normed, in the compute type; returns what is added to the residual stream."""
        up_BTF = checkpoint_name(project("BTD,DF->BTF", x_BTD, use(self.up, cfg)), "mlp_up")
        match cfg.mlp:
            case "swiglu":
                gate_BTF = checkpoint_name(project("BTD,DF->BTF", x_BTD, use(self.gate, cfg)), "mlp_gate")
                hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
            case "gelu":
                hidden_BTF = jax.nn.gelu(up_BTF)
            case _:
                raise AssertionError(cfg.mlp)
        return project("BTF,FD->BTD", hidden_BTF, use(self.down, cfg), out_sharding=acts("BTD"))


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = scale_vector("D", cfg)
        self.attention = Attention(cfg, rngs)
        self.mlp_norm = scale_vector("D", cfg)
        self.mlp = Mlp(cfg, rngs)

    def __call__(self, x_BTD: Array, segments_BT: Array, by: Angles, cfg: ModelConfig, *, causal: bool) -> Array:
        """The residual stream after this layer."""
        normed_BTD = rms_norm(x_BTD, self.attention_norm, cfg.norm_eps)
        x_BTD += self.attention(normed_BTD, segments_BT, by, cfg, causal=causal)
        return x_BTD + self.mlp(rms_norm(x_BTD, self.mlp_norm, cfg.norm_eps), cfg)


def rematerialised(body: Callable, cfg: ModelConfig) -> Callable:
    """The layer's function under the named policy: what the backward pass recomputes."""
    policies = jax.checkpoint_policies
    match cfg.remat:
        case "none":
            return body
        case "full":
            return jax.checkpoint(body, prevent_cse=False)
        case "dots":
            return jax.checkpoint(body, prevent_cse=False, policy=policies.dots_with_no_batch_dims_saveable)
        case names:
            return jax.checkpoint(body, prevent_cse=False, policy=policies.save_only_these_names(*names))
