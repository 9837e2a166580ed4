"""Norms over the channels of a token, in float32 whatever the type of the activations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from llm_jax.model.config import ModelConfig
from llm_jax.model.weights import Weight, ones, zeros


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016), with a scale and perhaps a bias."""

    scale: Weight
    bias: Weight | None

    def __init__(self, cfg: ModelConfig):
        self.scale = ones("D", cfg.dims)
        self.bias = zeros("D", cfg.dims) if cfg.norm_bias else None

    def __call__(self, x_BTD: Array, cfg: ModelConfig) -> Array:
        """x_BTD normed over D, in its own type."""
        x32_BTD = x_BTD.astype(jnp.float32)
        if cfg.norm == "layernorm":
            x32_BTD -= jnp.mean(x32_BTD, axis=-1, keepdims=True)
        y_BTD = x32_BTD * inverse_rms(x32_BTD, cfg.norm_eps) * self.scale[...][None, None]
        if self.bias is not None:
            y_BTD += self.bias[...][None, None]
        return y_BTD.astype(x_BTD.dtype)


def rms_norm(x_BTHC: Array, scale: Weight, eps: float) -> Array:
    """RMSNorm over the axes that the scale has, in x's type: of each head for C, of all heads together for HC.

    Over all heads the mean squares of a tensor axis's devices are added up here.
    """
    axes = tuple(range(-len(scale.letters), 0))
    x32_BTHC = x_BTHC.astype(jnp.float32)
    whole = jnp.expand_dims(scale[...], tuple(range(x_BTHC.ndim - len(scale.letters))))
    return (x32_BTHC * inverse_rms(x32_BTHC, eps, axes) * whole).astype(x_BTHC.dtype)


def inverse_rms(x: Array, eps: float, axes: tuple[int, ...] = (-1,)) -> Array:
    """1 / sqrt(mean square + eps) over the axes, which are kept with length 1."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + eps)
