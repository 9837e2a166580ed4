"""Each row times the matrix of its group, in backends that give the same numbers."""

import functools
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Backend = Literal["blocked", "ragged", "tiled", "mosaic", "einsum"]
# Platforms that have a kernel for it.
KERNELS: dict[str, Backend] = {"gpu": "tiled", "tpu": "mosaic"}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x_RD: Array, weight_EDF: Array, sizes_E: Array, backend: Backend, rows: int = 1) -> Array:
    """y_RF in x's type: the first sizes_E[0] rows times the first matrix, the next sizes_E[1] times the second, ...

    Rows after the last group come out as anything and get no gradient worth reading. blocked wants R and sizes_E in
    multiples of `rows` (group_rows), and rows that are to add nothing to the weight's gradient to be 0 in x or in y's
    gradient, those after the last group too. einsum takes every group to have R / E rows, whatever sizes_E says. A
    weight wider than x has its gradient added up in the weight's type. ragged is lax.ragged_dot, which on many devices
    does E times the work; tiled is a kernel for GPUs, mosaic one for TPUs. Only inside a shard_map, or on one device.
    """
    return _by_group(x_RD, weight_EDF.astype(x_RD.dtype), sizes_E, backend, rows)


def _forward(
    x_RD: Array, weight_EDF: Array, sizes_E: Array, backend: Backend, rows: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_matmul(x_RD, weight_EDF, sizes_E, backend, rows), (x_RD, weight_EDF, sizes_E)


def _backward(
    backend: Backend, rows: int, saved: tuple[Array, Array, Array], dy_RF: Array
) -> tuple[Array, Array, None]:
    x_RD, weight_EDF, sizes_E = saved
    cast_EDF = weight_EDF.astype(dy_RF.dtype)
    if backend in ("tiled", "mosaic"):
        dx_RD = _kernels(backend).by_group(dy_RF, cast_EDF, sizes_E, transposed=True)
    else:
        dx_RD = _by_group(dy_RF, jnp.swapaxes(cast_EDF, 1, 2), sizes_E, backend, rows)
    return dx_RD, _between_groups(x_RD, dy_RF, sizes_E, backend, rows).astype(weight_EDF.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _kernels(backend: Backend) -> ModuleType:
    """by_group and between_groups of a backend; Pallas takes half a second to import."""
    if backend == "tiled":
        from llm_jax.model import grouped_tiled

        return grouped_tiled
    from llm_jax.model import grouped_mosaic

    return grouped_mosaic


def _by_group(x_RD: Array, weight_EDF: Array, sizes_E: Array, backend: Backend, rows: int) -> Array:
    """Each row times the matrix of its group."""
    match backend:
        case "blocked":
            return _blocked(x_RD, weight_EDF, sizes_E, rows)
        case "ragged":
            return jax.lax.ragged_dot(x_RD, weight_EDF, sizes_E)
        case "tiled" | "mosaic":
            return _kernels(backend).by_group(x_RD, weight_EDF, sizes_E)
        case "einsum":
            E = sizes_E.size
            y_EMF = jnp.einsum("EMD,EDF->EMF", x_RD.reshape(E, -1, x_RD.shape[1]), weight_EDF)
            return y_EMF.reshape(-1, weight_EDF.shape[2])
    raise AssertionError(f"grouped matmul {backend!r} was not resolved")


def _between_groups(x_RD: Array, dy_RF: Array, sizes_E: Array, backend: Backend, rows: int) -> Array:
    """The weight's gradient, float32 [E, D, F]: for each group the sum over its rows of x times dy."""
    match backend:
        case "blocked":
            return _blocked_between(x_RD, dy_RF, sizes_E, rows)
        case "ragged":
            over_rows = jax.lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
            )
            return jax.lax.ragged_dot_general(x_RD, dy_RF, sizes_E, over_rows, preferred_element_type=jnp.float32)
        case "tiled" | "mosaic":
            return _kernels(backend).between_groups(x_RD, dy_RF, sizes_E)
        case "einsum":
            x_EMD, dy_EMF = (a.reshape(sizes_E.size, -1, a.shape[1]) for a in (x_RD, dy_RF))
            return jnp.einsum("EMD,EMF->EDF", x_EMD, dy_EMF, preferred_element_type=jnp.float32)
    raise AssertionError(f"grouped matmul {backend!r} was not resolved")


def group_rows(backend: Backend, C: int, E: int) -> int:
    """Rows of which every group of C choices among E has to have a multiple.

    For blocked a power of two, 32 to 256, that is a quarter of a group on average: larger blocks multiply faster, and
    more of a group's last one is for nothing; measured on a CPU for groups of 128 to 1024 rows.
    """
    return 2 ** min(max((C // (4 * E)).bit_length() - 1, 5), 8) if backend == "blocked" else 1


def _matrix_of_block(sizes_E: Array, blocks: int, rows: int) -> Array:
    """Whose matrix each block of rows is multiplied with; the last one's where a block is nobody's."""
    first_Q = rows * jnp.arange(blocks)
    return jnp.sum(first_Q[:, None] >= jnp.cumsum(sizes_E)[None, :-1], axis=1, dtype=jnp.int32)


def _blocked(x_RD: Array, weight_EDF: Array, sizes_E: Array, rows: int) -> Array:
    """One product for all blocks of rows, each with a copy of its group's matrix."""
    x_QMD = x_RD.reshape(-1, rows, x_RD.shape[1])
    weight_QDF = weight_EDF[_matrix_of_block(sizes_E, x_QMD.shape[0], rows)]
    return jnp.einsum("QMD,QDF->QMF", x_QMD, weight_QDF).reshape(-1, weight_EDF.shape[2])


def _blocked_between(x_RD: Array, dy_RF: Array, sizes_E: Array, rows: int) -> Array:
    """A product for each block, and their sums over groups: another product, since that is what runs in parallel."""
    E = sizes_E.size
    x_QMD, dy_QMF = (a.reshape(-1, rows, a.shape[1]) for a in (x_RD, dy_RF))
    of_block_QDF = jnp.einsum("QMD,QMF->QDF", x_QMD, dy_QMF, preferred_element_type=jnp.float32)
    mine_EQ = jnp.arange(E)[:, None] == _matrix_of_block(sizes_E, x_QMD.shape[0], rows)[None]
    return jnp.einsum("EQ,QDF->EDF", mine_EQ.astype(jnp.float32), of_block_QDF, precision=jax.lax.Precision.HIGHEST)
