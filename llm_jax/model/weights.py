"""A weight is declared once, on one line: letters and fan-in. Shape, sharding, init and decay follow from them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from llm_jax.mesh import gathered, weights
from llm_jax.model.config import ModelConfig


class Weight(nnx.Param):
    """A parameter that knows its letters (`.letters`, without L: layers are stacked in front)."""


def matrix(letters: str, cfg: ModelConfig, rngs: nnx.Rngs, *, fan_in: str, scale: float = 1.0) -> Weight:
    """A float32 matrix drawn from a normal of standard deviation scale / sqrt(product of the fan_in letters' sizes)."""
    shape = tuple(cfg.dims[a] for a in letters)
    std = scale / math.sqrt(math.prod(cfg.dims[a] for a in fan_in))
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=weights(letters))
    return Weight(value, letters=letters)


def scale_vector(letters: str, cfg: ModelConfig) -> Weight:
    """A float32 vector of ones, replicated."""
    shape = tuple(cfg.dims[a] for a in letters)
    return Weight(jnp.ones(shape, jnp.float32, out_sharding=weights(letters)), letters=letters)


def use(weight: Weight, cfg: ModelConfig) -> Array:
    """The weight in the compute type, whole over fsdp; the gradient is reduced over fsdp on the way back.

    Called inside the scanned, checkpointed layer, so that one layer's weights are whole at a time.
    """
    compute = jnp.dtype(cfg.compute_dtype)
    value = weight[...]
    if cfg.gather_dtype == "compute":
        value = value.astype(compute)
    return jax.reshard(value, gathered(weight.letters)).astype(compute)


def matrices(params: Any) -> Any:
    """Of each weight of a tree, whether it is a matrix (two letters or more); the tree's weights replaced by bools."""
    return jax.tree.map(lambda w: len(w.letters) > 1, params, is_leaf=lambda w: isinstance(w, Weight))
