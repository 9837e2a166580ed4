"""Products of rows with the matrices of their groups, for NVIDIA GPUs: a tile of rows reads its own group's matrix.

Nothing is gathered, and nothing multiplied that is not there but for what fills a group's last tile (as in MegaBlocks,
Gale et al. 2022). JAX's ragged_dot multiplies every row with every matrix on a GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from llm_jax.model import kernels

# Terms that a product on tensor cores has at least; and the multiple to which wider matrices are filled up.
LEAST_TERMS, FILLED_TO = 16, 64


class Tiles(NamedTuple):
    """What a kernel takes at a time, at most, powers of two; and how a GPU goes about it."""

    rows: int
    inner: int
    """Terms that are added up; between groups, rows of the matrices."""
    outer: int
    """Columns of what comes out."""
    warps: int
    stages: int


# By practice with Triton on Hopper, not measured here.
BY_GROUP, BETWEEN_GROUPS = Tiles(128, 64, 256, 8, 3), Tiles(64, 128, 128, 8, 3)


def by_group(x_RD: Array, weight: Array, sizes_E: Array, *, transposed: bool = False, tiles: Tiles = BY_GROUP) -> Array:
    """y_RF in x's type: each row times its group's matrix; rows after the last group give zero.

    weight: [E, D, F], or [E, F, D] where it is to be transposed.
    """
    R, F = x_RD.shape[0], weight.shape[1 if transposed else 2]
    x_RD, weight = _filled_rows(_filled(x_RD, 1)), _filled(_filled(weight, 1), 2)
    rows = _row_tile(x_RD.shape[0], tiles.rows)
    inner, outer = _tile(x_RD.shape[1], tiles.inner), _tile(_wide(F), tiles.outer)
    tile_N4, x_RD, weight = kernels.varying_alike(_tiles_of_rows(sizes_E, x_RD.shape[0], rows), x_RD, weight)
    shape = (x_RD.shape[0], _wide(F))
    y_RF: Any = pl.pallas_call(
        functools.partial(_by_group_kernel, rows=rows, inner=inner, outer=outer, transposed=transposed),
        # Columns first: so a tile's rows are read once, and its group's matrix stays in the GPU's cache.
        grid=(shape[1] // outer, tile_N4.shape[0]),
        in_specs=[pl.BlockSpec((None, 4), lambda f, n: (n, 0)), _whole(x_RD.shape), _whole(weight.shape)],
        out_specs=_whole(shape),
        out_shape=kernels.like(x_RD, shape, x_RD.dtype),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=kernels.product_cost(R, weight.shape, x_RD.dtype.itemsize),
        interpret=kernels.INTERPRET,
        name="grouped_matmul",
    )(tile_N4, x_RD, weight)
    return y_RF[:R, :F]


def _by_group_kernel(
    tile: Any, x_ref: Any, weight_ref: Any, y_ref: Any, *, rows: int, inner: int, outer: int, transposed: bool
) -> None:
    """A tile of rows times so many columns of its group's matrix."""
    group, first, stop, is_real = (tile[i] for i in range(4))
    R, D = x_ref.shape
    # The last tile of all begins earlier, not to end behind the last row.
    start = jnp.minimum(first, R - rows)
    columns = pl.ds(pl.program_id(0) * outer, outer)

    def step(i: Array, y_MF: Array) -> Array:
        terms = pl.ds(i * inner, inner)
        of_weight = (group, columns, terms) if transposed else (group, terms, columns)
        x_MD, weight = triton.load(x_ref.at[pl.ds(start, rows), terms]), triton.load(weight_ref.at[of_weight])
        return y_MF + triton.dot(x_MD, weight, trans_b=transposed)

    steps = is_real * (D // inner)
    y_MF = jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, outer), jnp.float32))
    mine_M = _between(start + jnp.arange(rows), first, stop)
    mine_MF = jnp.broadcast_to(mine_M[:, None], y_MF.shape)
    triton.store(y_ref.at[pl.ds(start, rows), columns], y_MF.astype(y_ref.dtype), mask=mine_MF)


def between_groups(x_RD: Array, dy_RF: Array, sizes_E: Array, tiles: Tiles = BETWEEN_GROUPS) -> Array:
    """The weight's gradient, float32 [E, D, F]: for each group the sum over its rows of x times dy."""
    D, F, E = x_RD.shape[1], dy_RF.shape[1], sizes_E.size
    x_RD, dy_RF = (_filled_rows(_filled(a, 1)) for a in (x_RD, dy_RF))
    shape = (E, x_RD.shape[1], dy_RF.shape[1])
    rows, inner, outer = (
        _row_tile(x_RD.shape[0], tiles.rows),
        _tile(shape[1], tiles.inner),
        _tile(shape[2], tiles.outer),
    )
    stop_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    span_E3 = jnp.stack([stop_E - sizes_E, stop_E, -(-sizes_E // rows)], axis=1)
    span_E3, x_RD, dy_RF = kernels.varying_alike(span_E3, x_RD, dy_RF)
    dweight_EDF: Any = pl.pallas_call(
        functools.partial(_between_groups_kernel, rows=rows),
        grid=(shape[2] // outer, shape[1] // inner, E),
        in_specs=[
            pl.BlockSpec((None, 3), lambda f, d, e: (e, 0)),
            pl.BlockSpec((x_RD.shape[0], inner), lambda f, d, e: (0, d)),
            pl.BlockSpec((x_RD.shape[0], outer), lambda f, d, e: (0, f)),
        ],
        out_specs=pl.BlockSpec((None, inner, outer), lambda f, d, e: (e, d, f)),
        out_shape=kernels.like(x_RD, shape, jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=kernels.product_cost(x_RD.shape[0], shape, x_RD.dtype.itemsize),
        interpret=kernels.INTERPRET,
        name="grouped_matmul_between",
    )(span_E3, x_RD, dy_RF)
    return dweight_EDF[:, :D, :F]


def _between_groups_kernel(span: Any, x_ref: Any, dy_ref: Any, dweight_ref: Any, *, rows: int) -> None:
    """A part of one group's matrix: the sum over its rows."""
    begin, stop, steps = (span[i] for i in range(3))
    R = x_ref.shape[0]

    def step(i: Array, dweight_DF: Array) -> Array:
        first = begin + i * rows
        start = jnp.minimum(first, R - rows)
        mine_M = _between(start + jnp.arange(rows), first, stop)
        at = pl.ds(start, rows)
        x_MD = triton.load(x_ref.at[at, :], mask=jnp.broadcast_to(mine_M[:, None], (rows, x_ref.shape[1])), other=0.0)
        return dweight_DF + triton.dot(x_MD, triton.load(dy_ref.at[at, :]), trans_a=True)

    dweight_ref[...] = jax.lax.fori_loop(0, steps, step, jnp.zeros(dweight_ref.shape, jnp.float32))


def _tiles_of_rows(sizes_E: Array, R: int, rows: int) -> Array:
    """Int32 [N, 4], as many as there can be: a tile's group, its first row, where its group ends, and 1.

    Nobody's rows are told by a 0. What is too many begins behind its group's end.
    """
    E = sizes_E.size
    sizes = jnp.concatenate([sizes_E, R - jnp.sum(sizes_E, keepdims=True)]).astype(jnp.int32)
    stop, tiles = jnp.cumsum(sizes), -(-sizes // rows)
    last = jnp.cumsum(tiles)
    number = jnp.arange(-(-R // rows) + E, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(number[:, None] >= last[None], axis=1, dtype=jnp.int32), E)
    first = (stop - sizes)[group] + (number - (last - tiles)[group]) * rows
    return jnp.stack([jnp.minimum(group, E - 1), first, stop[group], (group < E).astype(jnp.int32)], axis=1)


def _between(row: Array, first: Array, stop: Array) -> Array:
    return (row >= first) & (row < stop)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """All of it, of which a kernel takes what it wants."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _wide(n: int) -> int:
    """n terms or columns, filled up."""
    to = min(FILLED_TO, max(LEAST_TERMS, 1 << (n - 1).bit_length()))
    return n + -n % to


def _filled(x: Array, axis: int) -> Array:
    n = x.shape[axis]
    return x if _wide(n) == n else jnp.pad(x, [(0, _wide(n) - n if a == axis else 0) for a in range(x.ndim)])


def _filled_rows(x_RD: Array) -> Array:
    """Enough of them for a product."""
    return jnp.pad(x_RD, ((0, max(LEAST_TERMS - x_RD.shape[0], 0)), (0, 0)))


def _tile(n: int, most: int) -> int:
    """The largest power of two that divides n, up to `most`."""
    return min(most, n & -n)


def _row_tile(R: int, most: int) -> int:
    return min(most, 1 << (R.bit_length() - 1))
