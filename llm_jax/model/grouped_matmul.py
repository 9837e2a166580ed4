"""Each row times the matrix of its group, in backends that give the same numbers."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llm_jax.model.grouped_kernel import between_groups, by_group

Backend = Literal["blocked", "ragged", "tiled", "einsum"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x_RD: Array, weight_EDF: Array, sizes_E: Array, backend: Backend) -> Array:
    """y_RF in x's type: the first sizes_E[0] rows times the first matrix, the next sizes_E[1] times the second, ...

    Rows after the last group come out as anything and get no gradient worth reading. einsum takes every group to have
    R / E rows, whatever sizes_E says. A weight wider than x has its gradient added up in the weight's type. ragged is
    lax.ragged_dot, which on a CPU does E times the work; tiled is a kernel for GPUs. Only inside a shard_map, or on one
    device.
    """
    return _by_group(x_RD, weight_EDF.astype(x_RD.dtype), sizes_E, backend)


def _forward(
    x_RD: Array, weight_EDF: Array, sizes_E: Array, backend: Backend
) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_matmul(x_RD, weight_EDF, sizes_E, backend), (x_RD, weight_EDF, sizes_E)


def _backward(backend: Backend, saved: tuple[Array, Array, Array], dy_RF: Array) -> tuple[Array, Array, None]:
    x_RD, weight_EDF, sizes_E = saved
    cast_EDF = weight_EDF.astype(dy_RF.dtype)
    if backend == "tiled":
        dx_RD = by_group(dy_RF, cast_EDF, sizes_E, transposed=True)
    else:
        dx_RD = _by_group(dy_RF, jnp.swapaxes(cast_EDF, 1, 2), sizes_E, backend)
    return dx_RD, _between_groups(x_RD, dy_RF, sizes_E, backend).astype(weight_EDF.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _by_group(x_RD: Array, weight_EDF: Array, sizes_E: Array, backend: Backend) -> Array:
    """Each row times the matrix of its group."""
    match backend:
        case "blocked":
            return _blocked(x_RD, weight_EDF, sizes_E)
        case "ragged":
            return jax.lax.ragged_dot(x_RD, weight_EDF, sizes_E)
        case "tiled":
            return by_group(x_RD, weight_EDF, sizes_E)
        case "einsum":
            E = sizes_E.size
            y_EMF = jnp.einsum("EMD,EDF->EMF", x_RD.reshape(E, -1, x_RD.shape[1]), weight_EDF)
            return y_EMF.reshape(-1, weight_EDF.shape[2])
    raise AssertionError(f"grouped matmul {backend!r} was not resolved")


def _between_groups(x_RD: Array, dy_RF: Array, sizes_E: Array, backend: Backend) -> Array:
    """The weight's gradient, float32 [E, D, F]: for each group the sum over its rows of x times dy."""
    match backend:
        case "blocked":
            return _blocked_between(x_RD, dy_RF, sizes_E)
        case "ragged":
            over_rows = jax.lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
            )
            return jax.lax.ragged_dot_general(x_RD, dy_RF, sizes_E, over_rows, preferred_element_type=jnp.float32)
        case "tiled":
            return between_groups(x_RD, dy_RF, sizes_E)
        case "einsum":
            x_EMD, dy_EMF = (a.reshape(sizes_E.size, -1, a.shape[1]) for a in (x_RD, dy_RF))
            return jnp.einsum("EMD,EMF->EDF", x_EMD, dy_EMF, preferred_element_type=jnp.float32)
    raise AssertionError(f"grouped matmul {backend!r} was not resolved")


class _Blocks(NamedTuple):
    """Groups cut into blocks of `rows` rows; the arrays have room for the most that there can be."""

    rows: int
    group: Array
    """Whose matrix a block is multiplied with."""
    start: Array
    """Its first row; a group's last block reaches into the next group, or past the last row."""
    stop: Array
    """The end of its group."""
    total: Array
    """How many blocks there are: empty groups have none, so that work follows the rows that are there."""


def _blocks(sizes_E: Array, R: int) -> _Blocks:
    E, rows = sizes_E.size, block_rows(R, sizes_E.size)
    stop_E, blocks_E = jnp.cumsum(sizes_E), -(-sizes_E // rows)
    last_E = jnp.cumsum(blocks_E)
    number = jnp.arange(-(-R // rows) + E)
    group = jnp.minimum(jnp.sum(number[:, None] >= last_E[None], axis=1, dtype=jnp.int32), E - 1)
    start = (stop_E - sizes_E)[group] + (number - (last_E - blocks_E)[group]) * rows
    return _Blocks(rows, group, start, stop_E[group], last_E[-1])


def block_rows(R: int, E: int) -> int:
    """Rows that blocked multiplies at a time: of 32, 64, 128 and 256 what is a quarter of a group, on average.

    Larger blocks multiply faster, and more of a group's last one is for nothing; measured on a CPU for groups of 128 to
    1024 rows.
    """
    return 2 ** min(max((R // (4 * E)).bit_length() - 1, 5), 8)


def _blocked(x_RD: Array, weight_EDF: Array, sizes_E: Array) -> Array:
    """One product a block. What a block writes past its group's end, the next group's blocks write over."""
    R, F = x_RD.shape[0], weight_EDF.shape[2]
    blocks = _blocks(sizes_E, R)
    x_RD = jnp.pad(x_RD, ((0, blocks.rows), (0, 0)))

    def one_block(i: Array, y_RF: Array) -> Array:
        x_MD = jax.lax.dynamic_slice_in_dim(x_RD, blocks.start[i], blocks.rows)
        return jax.lax.dynamic_update_slice_in_dim(y_RF, x_MD @ weight_EDF[blocks.group[i]], blocks.start[i], 0)

    return jax.lax.fori_loop(0, blocks.total, one_block, jnp.zeros_like(x_RD, shape=(R + blocks.rows, F)))[:R]


def _blocked_between(x_RD: Array, dy_RF: Array, sizes_E: Array) -> Array:
    """Blocks add to their group's gradient: nothing of size [blocks, D, F] is made."""
    R, D, F = x_RD.shape[0], x_RD.shape[1], dy_RF.shape[1]
    blocks = _blocks(sizes_E, R)
    x_RD, dy_RF = (jnp.pad(a, ((0, blocks.rows), (0, 0))) for a in (x_RD, dy_RF))

    def one_block(i: Array, dweight_EDF: Array) -> Array:
        start, group = blocks.start[i], blocks.group[i]
        mine_M = start + jnp.arange(blocks.rows) < blocks.stop[i]
        x_MD, dy_MF = (jax.lax.dynamic_slice_in_dim(a, start, blocks.rows) for a in (x_RD, dy_RF))
        dweight_DF = jnp.einsum(
            "MD,MF->DF", jnp.where(mine_M[:, None], x_MD, 0), dy_MF, preferred_element_type=jnp.float32
        )
        return dweight_EDF.at[group].add(dweight_DF)

    zeros_EDF = jnp.zeros_like(x_RD, jnp.float32, shape=(sizes_E.size, D, F))
    return jax.lax.fori_loop(0, blocks.total, one_block, zeros_EDF)
