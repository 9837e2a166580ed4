"""A weight is declared once, on one line: letters and fan-in. Shape, sharding, init and decay follow from them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, P

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


def project(equation: str, x: Array, weight: Array, out_sharding: P | None = None) -> Array:
    """einsum(equation, x, weight) for x of tokens, B and T first in x and in the result; out_sharding as in einsum.

    While no context axis divides T, tokens are merged into one axis: XLA's CPU matmuls, the gradients of weights above
    all, are a third faster with it, and elsewhere it is free. Merging two sharded axes would be a hidden all-to-all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["context"] > 1:
        return jnp.einsum(equation, x, weight, out_sharding=out_sharding)
    B, T = x.shape[:2]
    merged = None if out_sharding is None else P(out_sharding[0], *out_sharding[2:])
    y = jnp.einsum(equation.replace("BT", "N"), x.reshape(B * T, *x.shape[2:]), weight, out_sharding=merged)
    return y.reshape(B, T, *y.shape[1:])


def matrices(params: Any) -> Any:
    """Of each weight of a tree, whether it is a matrix (two letters or more); the tree's weights replaced by bools."""
    return jax.tree.map(lambda w: len(w.letters) > 1, params, is_leaf=lambda w: isinstance(w, Weight))
