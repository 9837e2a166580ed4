"""A weight is declared once, on one line: letters and fan-in. Shape, sharding, init and decay follow from them."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, P

from llm_jax.alphabet import ROW_AXES, weight_axes
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


def stored(weight: Weight, cfg: ModelConfig) -> Array:
    """The weight as it lies on the devices, in the type in which it is gathered."""
    return weight[...].astype(cfg.compute_dtype) if cfg.gather_dtype == "compute" else weight[...]


def whole(part: Array, letters: str) -> Array:
    """A weight whole over fsdp, of the part that this device stores; only inside a shard_map.

    Its gradient goes back as in summed_as_stored.
    """
    axes = weight_axes(letters)
    # An axis of one device is none to a type, although a spec may name it.
    divided = "fsdp" in axes and jax.lax.axis_size("fsdp") > 1
    same = tuple(axis for axis in ROW_AXES if axis not in axes or (axis == "fsdp" and not divided))
    part = jax.lax.pcast(part, same, to="varying")
    return jax.lax.all_gather(part, "fsdp", axis=axes.index("fsdp"), tiled=True) if divided else part


def after(value: Array, *done: Array) -> Array:
    """value, from which nothing is made on CPUs before all of `done` is there; only inside a shard_map.

    For what is sent before or after a loop that sends. XLA's CPU lets a collective begin when the one before it has
    begun, and a loop of collectives has begun long before it ends: devices would begin theirs in different orders, and
    abort or wait for each other for ever. It waits for data alone: for a zero, here, that it does not know to be one.
    """
    if all(jax.lax.axis_size(axis) == 1 for axis in ROW_AXES):
        return value

    def waiting(value: Array, *done: Array) -> Array:
        first = sum(a[(0,) * a.ndim].astype(jnp.float32) for a in done)
        zero = jax.lax.optimization_barrier(jnp.fmin(jnp.abs(first), 0))
        return value + zero.astype(value.dtype)

    return jax.lax.platform_dependent(value, *done, cpu=waiting, default=lambda value, *_: value)


@jax.custom_vjp
def in_turn(x: Array, weight: Array) -> tuple[Array, Array]:
    """x, and a stored weight that x meets behind the loop over layers, each in its turn as in `after`.

    The weight is not sent before x is there, nor x's gradient used before the weight's has been sent.
    """
    return x, _behind(weight, x)


def _behind(value: Array, done: Array) -> Array:
    """`after`, outside of a shard_map."""
    specs = tuple(jax.typeof(a).sharding.spec for a in (value, done))
    return jax.shard_map(after, in_specs=specs, out_specs=specs[0], check_vma=False)(value, done)


in_turn.defvjp(lambda x, weight: (in_turn(x, weight), None), lambda _, gradients: (_behind(*gradients), gradients[1]))


def plus(x: Array, bias: Weight | None) -> Array:
    """x + bias along x's last axes, in x's type; x for None. The bias's gradient is added up in float32."""
    if bias is None:
        return x
    value = jnp.expand_dims(bias[...], tuple(range(x.ndim - len(bias.letters))))
    return (x.astype(jnp.float32) + value).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(equation: str, x: Array, weight: Array, out_sharding: P | None = None) -> Array:
    """einsum(equation, x, weight) in x's type, B and T first in x and in the result; out_sharding as in einsum.

    The weight comes as it is stored and is made whole over fsdp here, inside the scanned, checkpointed layer: one
    layer's weights are whole at a time. Its gradient is added up, over devices too, in the type in which it came.
    """
    return _project_forward(equation, x, weight, out_sharding)[0]


def _project_forward(
    equation: str, x: Array, weight: Array, out_sharding: P | None
) -> tuple[Array, tuple[Array, Array, Array]]:
    used = jax.reshard(weight, gathered(_letters(equation)[1])).astype(x.dtype)
    # Nothing of the last is kept but its type.
    return _product(equation, x, used, out_sharding), (x, used, jnp.zeros((), weight.dtype))


def _project_backward(
    equation: str, out_sharding: P | None, saved: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, used, typed = saved
    transposed = jax.linear_transpose(lambda x: _product(equation, x, used, out_sharding), x)
    return *transposed(dy), _weight_gradient(equation, x, dy, typed.dtype)


project.defvjp(_project_forward, _project_backward)


def _product(equation: str, x: Array, weight: Array, out_sharding: P | None) -> Array:
    """While no context axis divides T, tokens are merged into one axis, and so are heads and their channels.

    XLA's CPU matmuls are a third faster with it; elsewhere it is free. Merging two sharded axes would be a hidden
    all-to-all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["context"] > 1:
        return jnp.einsum(equation, x, weight, out_sharding=out_sharding)
    B, T = x.shape[:2]
    of_x, of_weight, _ = _letters(equation)
    n_summed = sum(letter in of_x for letter in of_weight)
    summed, made = weight.shape[:n_summed], weight.shape[n_summed:]
    # One merge or split at a time: several at once would have to be told where they leave their axes.
    x_NI = x.reshape(B * T, *summed).reshape(B * T, math.prod(summed))
    weight_IO = weight.reshape(math.prod(summed), *made).reshape(math.prod(summed), math.prod(made))
    merged = None if out_sharding is None else P(out_sharding[0], *out_sharding[2:])
    y_NO = jnp.einsum("NI,IO->NO", x_NI, weight_IO, out_sharding=merged)
    return y_NO.reshape(B, T, math.prod(made)).reshape(B, T, *made)


def _weight_gradient(equation: str, x: Array, dy: Array, dtype: jnp.dtype) -> Array:
    """The sum over all tokens of x times dy, as the weight is stored."""
    _, letters, _ = _letters(equation)

    def local(x: Array, dy: Array) -> Array:
        x_NI, dy_NO = (a.reshape(a.shape[0] * a.shape[1], -1) for a in (x, dy))
        part_IO = jnp.einsum("NI,NO->IO", x_NI, dy_NO, preferred_element_type=dtype)
        return summed_as_stored(part_IO.reshape(*x.shape[2:], *dy.shape[2:]), letters)

    specs = (jax.typeof(x).sharding.spec, jax.typeof(dy).sharding.spec)
    return jax.shard_map(local, in_specs=specs, out_specs=weights(letters))(x, dy)


def summed_as_stored(part: Array, letters: str) -> Array:
    """The sum over all axes that divide rows, as the weight is stored; only inside a shard_map.

    First each device gets its part of the sum over fsdp, and that alone is added up over the other axes. XLA would make
    one sum over all of them, of the whole gradient, which sends twice as much.
    """
    axes = weight_axes(letters)
    several = [axis for axis in ROW_AXES if jax.lax.axis_size(axis) > 1]
    if "fsdp" in axes and "fsdp" in several:
        part = jax.lax.psum_scatter(part, "fsdp", scatter_dimension=axes.index("fsdp"), tiled=True)
    others = tuple(axis for axis in several if axis not in axes)
    return jax.lax.psum(part, others) if others else part


def _letters(equation: str) -> tuple[str, str, str]:
    of_x, of_weight, of_y = equation.replace("->", ",").split(",")
    return of_x, of_weight, of_y


def matrices(params: Any) -> Any:
    """Of each weight of a tree, whether it decays; the tree's weights replaced by bools."""
    return jax.tree.map(lambda w: w.decays, params, is_leaf=lambda w: isinstance(w, Weight))
