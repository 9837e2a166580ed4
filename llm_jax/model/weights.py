"""A weight is declared once, on one line: letters and fan-in. Shape, sharding, init and decay follow from them."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, P

from llm_jax.mesh import gathered, weights
from llm_jax.model.config import ModelConfig


class Weight(nnx.Param):
    """A parameter that knows its letters (`.letters`, without L: layers are stacked in front) and whether it `.decays`.

    What is drawn decays: matrices, and tables of embeddings too, as in BERT and GPT-2. What starts as ones or zeros
    does not, since near zero is no better place for it: scales and biases, however many letters they have, and sinks.
    """


class Balance(nnx.Variable):
    """What a router adds to an expert's score when it chooses; moved by the step, never by the optimizer."""


def matrix(letters: str, dims: Mapping[str, int], rngs: nnx.Rngs, *, fan_in: str, scale: float = 1.0) -> Weight:
    """A float32 matrix drawn from a normal of standard deviation scale / sqrt(product of the fan_in letters' sizes).

    dims: the size of every letter.
    """
    shape = tuple(dims[a] for a in letters)
    std = scale / math.sqrt(math.prod(dims[a] for a in fan_in))
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=weights(letters))
    return Weight(value, letters=letters, decays=True)


def ones(letters: str, dims: Mapping[str, int]) -> Weight:
    """A float32 weight of ones, for the scale of a norm."""
    value = jnp.ones(tuple(dims[a] for a in letters), jnp.float32, out_sharding=weights(letters))
    return Weight(value, letters=letters, decays=False)


def zeros(letters: str, dims: Mapping[str, int]) -> Weight:
    """A float32 weight of zeros, for a bias."""
    value = jnp.zeros(tuple(dims[a] for a in letters), jnp.float32, out_sharding=weights(letters))
    return Weight(value, letters=letters, decays=False)


def residual_scale(cfg: ModelConfig) -> float:
    """Two additions a layer: their sum keeps its variance at any depth (GPT-2, Radford et al. 2019)."""
    return 1 / math.sqrt(2 * cfg.n_layers)


def use(weight: Weight, cfg: ModelConfig) -> Array:
    """The weight whole over fsdp, in the type in which it is gathered; its gradient goes back the same way.

    Called inside the scanned, checkpointed layer, so that one layer's weights are whole at a time.
    """
    value = weight[...]
    if cfg.gather_dtype == "compute":
        value = value.astype(cfg.compute_dtype)
    return jax.reshard(value, gathered(weight.letters))


def plus(x: Array, bias: Weight | None) -> Array:
    """x + bias along x's last axes, in x's type; x for None. The bias's gradient is added up in float32."""
    if bias is None:
        return x
    whole = jnp.expand_dims(bias[...], tuple(range(x.ndim - len(bias.letters))))
    return (x.astype(jnp.float32) + whole).astype(x.dtype)


def project(equation: str, x: Array, weight: Array, out_sharding: P | None = None) -> Array:
    """einsum(equation, x, weight) in x's type, B and T first in x and in the result; out_sharding as in einsum.

    The gradient of a weight wider than x is added up, over devices too, in float32.

    While no context axis divides T, tokens are merged into one axis, and so are heads and their channels: XLA's CPU
    matmuls are a third faster with it, and make the gradients of weights without transposing what came in; elsewhere it
    is free. Merging two sharded axes would be a hidden all-to-all.
    """
    if weight.dtype != x.dtype:
        # Not merged: XLA's CPU cannot run the product "ND,NHC->DHC" of bfloat16 into float32.
        return _einsum_of_wider_weight(equation, x, weight, out_sharding)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["context"] > 1:
        return jnp.einsum(equation, x, weight, out_sharding=out_sharding)
    B, T = x.shape[:2]
    of_x, of_weight = equation.split("->")[0].split(",")
    n_summed = sum(letter in of_x for letter in of_weight)
    summed, made = weight.shape[:n_summed], weight.shape[n_summed:]
    # One merge or split at a time: several at once would have to be told where they leave their axes.
    x_NI = x.reshape(B * T, *summed).reshape(B * T, math.prod(summed))
    weight_IO = weight.reshape(math.prod(summed), *made).reshape(math.prod(summed), math.prod(made))
    merged = None if out_sharding is None else P(out_sharding[0], *out_sharding[2:])
    y_NO = jnp.einsum("NI,IO->NO", x_NI, weight_IO, out_sharding=merged)
    return y_NO.reshape(B, T, math.prod(made)).reshape(B, T, *made)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum_of_wider_weight(equation: str, x: Array, weight: Array, out_sharding: P | None) -> Array:
    """A plain cast of the weight would have its gradient added up over devices in x's type, before the cast back."""
    return _wider_forward(equation, x, weight, out_sharding)[0]


def _wider_forward(equation: str, x: Array, weight: Array, out_sharding: P | None) -> tuple[Array, tuple[Array, Array]]:
    narrow = weight.astype(x.dtype)
    return jnp.einsum(equation, x, narrow, out_sharding=out_sharding), (x, narrow)


def _wider_backward(
    equation: str, out_sharding: P | None, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, narrow = saved
    of_x, of_weight, of_y = equation.replace("->", ",").split(",")
    in_x, in_weight = f"{of_y},{of_weight}->{of_x}", f"{of_x},{of_y}->{of_weight}"
    dx = jnp.einsum(in_x, dy, narrow, out_sharding=jax.typeof(x).sharding.spec)
    place = jax.typeof(narrow).sharding.spec
    return dx, jnp.einsum(in_weight, x, dy, preferred_element_type=jnp.float32, out_sharding=place)


_einsum_of_wider_weight.defvjp(_wider_forward, _wider_backward)


def matrices(params: Any) -> Any:
    """Of each weight of a tree, whether it decays; the tree's weights replaced by bools."""
    return jax.tree.map(lambda w: w.decays, params, is_leaf=lambda w: isinstance(w, Weight))
