"""What happens between an MLP's matrices, in dense layers and in experts."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from llm_jax.model.config import ModelConfig


def activate(cfg: ModelConfig, gate: Array | None, up: Array) -> Array:
    """The hidden units from the products with the gate's and the up matrix, of one shape; gate is None where
    cfg.gated is not.

    SwiGLU and GEGLU (Shazeer 2020), GELU (Hendrycks and Gimpel 2016), exact or by its approximation with tanh.
    """
    match cfg.mlp:
        case "swiglu":
            assert gate is not None
            return jax.nn.silu(gate) * up
        case "geglu":
            assert gate is not None
            return _gelu(gate) * up
        case "gelu":
            return _gelu(up)
        case "gelu_tanh":
            return jax.nn.gelu(up, approximate=True)


@jax.custom_vjp
def _gelu(x: Array) -> Array:
    """The exact GELU. Its gradient is written out, because JAX 0.12 cannot differentiate erf inside a shard_map."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return _gelu(x), x


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    slope = 0.5 * jax.lax.erfc(-x * math.sqrt(0.5)) + x * jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)
    return (dy * slope,)


_gelu.defvjp(_gelu_forward, _gelu_backward)
