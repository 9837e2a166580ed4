"""What happens between an MLP's matrices, in dense layers and in experts."""

import jax
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
            return jax.nn.gelu(gate, approximate=False) * up
        case "gelu":
            return jax.nn.gelu(up, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(up, approximate=True)
