"""Products of rows with the matrices of their groups, for TPUs: a tile of rows meets the matrices of its own groups.

Tiles lie where they lie, and one that a group's end goes through is visited once for each group in it (as in
MegaBlocks, Gale et al. 2022, and in JAX's megablox, whose kernels know no shard_map that checks what varies).
JAX's ragged_dot multiplies every row with every matrix where chip and version of libtpu have it so.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.model import kernels
from llm_jax.model.kernels import LANES

# Rows of a tile; columns and terms of one. Two of each array and the sums lie in a TPU's fast memory at a time.
ROWS, LEAST_ROWS, WIDTH = 512, 128, 1024
FAST_MEMORY = 48 * 2**20


class Visits(NamedTuple):
    """Int32 [N] each, as many as there can be: what a kernel does one after the other."""

    group: Array
    tile: Array
    start: Array
    """The first row of the group, and the first that is none of it; the same, and there is nothing to do."""
    stop: Array


def by_group(x_RD: Array, weight: Array, sizes_E: Array, *, transposed: bool = False) -> Array:
    """y_RF in x's type: each row times its group's matrix; rows after the last group give zero.

    weight: [E, D, F], or [E, F, D] where it is to be transposed.
    """
    (R, D), (E, *sides) = x_RD.shape, weight.shape
    F = sides[0 if transposed else 1]
    rows, inner, outer = _row_tile(R, E), _tile(D), _tile(F)
    # Nobody's rows are a group, too: they come out as zero.
    visits = _visits(jnp.concatenate([sizes_E, R - jnp.sum(sizes_E, keepdims=True)]), R, rows)
    (x_RD, weight, *visits) = kernels.varying_alike(x_RD, weight, *visits)
    sides = (outer, inner) if transposed else (inner, outer)

    # For nobody's rows nothing is read: what is there stays.
    def of_x(f: Array, n: Array, d: Array, group: Any, tile: Any, *_: Any) -> tuple[Array, Array]:
        is_real = group[n] < E
        return jnp.where(is_real, tile[n], 0), jnp.where(is_real, d, 0)

    def of_weight(f: Array, n: Array, d: Array, group: Any, *_: Any) -> tuple[Array, ...]:
        d = jnp.where(group[n] < E, d, 0)
        return (jnp.minimum(group[n], E - 1), *((f, d) if transposed else (d, f)))

    return pl.pallas_call(
        functools.partial(_by_group_kernel, groups=E, terms=D, transposed=transposed),
        # Terms last, since they are added up; a tile's visits one after the other, so that it stays until it is whole.
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(F, outer), visits[0].size, pl.cdiv(D, inner)),
            in_specs=[
                pl.BlockSpec((rows, inner), of_x),
                pl.BlockSpec((None, *sides), of_weight),
            ],
            out_specs=pl.BlockSpec((rows, outer), lambda f, n, d, group, tile, *_: (tile[n], f)),
            scratch_shapes=[pltpu.VMEM((rows, outer), jnp.float32)],
        ),
        out_shape=kernels.like(x_RD, (R, F), x_RD.dtype),
        compiler_params=_parameters(),
        cost_estimate=kernels.product_cost(R, (E, D, F), x_RD.dtype.itemsize),
        interpret=kernels.INTERPRET,
        name="grouped_matmul",
    )(*visits, x_RD, weight)


def _by_group_kernel(
    group: Any,
    tile: Any,
    start: Any,
    stop: Any,
    x_ref: Any,
    weight_ref: Any,
    y_ref: Any,
    sum_ref: Any,
    *,
    groups: int,
    terms: int,
    transposed: bool,
) -> None:
    """A visit's rows, and so many columns and terms of its group's matrix."""
    n, d = pl.program_id(1), pl.program_id(2)
    inner = x_ref.shape[1]
    # Of columns behind the last nothing is kept; terms behind the last would be added.
    over_terms = functools.partial(_kept, first=d * inner, stop=terms) if terms % inner else lambda x, axis: x

    @pl.when(d == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when((stop[n] > start[n]) & (group[n] < groups))
    def _() -> None:
        x_MD, weight = over_terms(x_ref[...], axis=1), over_terms(weight_ref[...], axis=1 if transposed else 0)
        sum_ref[...] += _product(x_MD, weight, 1, 1 if transposed else 0)

    @pl.when(d == pl.num_programs(2) - 1)
    def _() -> None:
        row_MF = tile[n] * y_ref.shape[0] + jax.lax.broadcasted_iota(jnp.int32, y_ref.shape, 0)
        mine_MF = (row_MF >= start[n]) & (row_MF < stop[n])
        y_ref[...] = jnp.where(mine_MF, sum_ref[...], y_ref[...].astype(jnp.float32)).astype(y_ref.dtype)


def between_groups(x_RD: Array, dy_RF: Array, sizes_E: Array) -> Array:
    """The weight's gradient, float32 [E, D, F]: for each group the sum over its rows of x times dy."""
    (R, D), F, E = x_RD.shape, dy_RF.shape[1], sizes_E.size
    rows, inner, outer = _row_tile(R, E), _tile(D), _tile(F)
    (x_RD, dy_RF, *visits) = kernels.varying_alike(x_RD, dy_RF, *_visits(sizes_E, R, rows, at_least=1))
    return pl.pallas_call(
        _between_groups_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(D, inner), pl.cdiv(F, outer), visits[0].size),
            in_specs=[
                pl.BlockSpec((rows, inner), lambda d, f, n, group, tile, *_: (tile[n], d)),
                pl.BlockSpec((rows, outer), lambda d, f, n, group, tile, *_: (tile[n], f)),
            ],
            out_specs=pl.BlockSpec((None, inner, outer), lambda d, f, n, group, *_: (group[n], d, f)),
        ),
        out_shape=kernels.like(x_RD, (E, D, F), jnp.float32),
        compiler_params=_parameters(),
        cost_estimate=kernels.product_cost(R, (E, D, F), x_RD.dtype.itemsize),
        interpret=kernels.INTERPRET,
        name="grouped_matmul_between",
    )(*visits, x_RD, dy_RF)


def _between_groups_kernel(
    group: Any, tile: Any, start: Any, stop: Any, x_ref: Any, dy_ref: Any, dweight_ref: Any
) -> None:
    """A part of one group's matrix: the sum over the rows of a visit is added to it."""
    n = pl.program_id(2)

    @pl.when((n == 0) | (group[n] != group[jnp.maximum(n - 1, 0)]))
    def _() -> None:
        dweight_ref[...] = jnp.zeros_like(dweight_ref)

    @pl.when(stop[n] > start[n])
    def _() -> None:
        mine = functools.partial(_kept, axis=0, first=tile[n] * x_ref.shape[0], start=start[n], stop=stop[n])
        dweight_ref[...] += _product(mine(x_ref[...]), mine(dy_ref[...]), 0, 0)


def _visits(sizes: Array, R: int, rows: int, at_least: int = 0) -> Visits:
    """Every group's tiles, group by group, with at_least so many visits for an empty one; then nothing to do."""
    stop = jnp.cumsum(sizes, dtype=jnp.int32)
    start = stop - sizes.astype(jnp.int32)
    first = start // rows
    visits = jnp.where(sizes > 0, -(-stop // rows) - first, at_least)
    last = jnp.cumsum(visits, dtype=jnp.int32)
    number = jnp.arange(pl.cdiv(R, rows) + sizes.size, dtype=jnp.int32)
    is_real = number < last[-1]
    # What is too many stays where the last visit was.
    number = jnp.minimum(number, last[-1] - 1)
    group = jnp.sum(number[:, None] >= last[None], axis=1, dtype=jnp.int32)
    tile = jnp.minimum(first[group] + number - (last - visits)[group], pl.cdiv(R, rows) - 1)
    return Visits(group, tile, start[group], jnp.where(is_real, stop[group], start[group]))


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Added up over one axis of each, in float32."""
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _kept(x: Array, axis: int, first: Any, stop: Any, start: Any = 0) -> Array:
    """Zero but for those from start to stop along an axis, whose first has the number `first`."""
    number = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where((number >= start) & (number < stop), x, jnp.zeros_like(x))


def _row_tile(R: int, E: int) -> int:
    """Large tiles multiply faster, and more of one is for nothing where a group ends: half a group, within limits."""
    rows = max(LEAST_ROWS, min(ROWS, 1 << ((R // (2 * E)) or 1).bit_length() - 1))
    return min(rows, R + -R % 16)


def _tile(n: int) -> int:
    """Columns or terms of a tile: equal parts of n, up to whole lanes."""
    part = pl.cdiv(n, pl.cdiv(n, WIDTH))
    return n if part == n else part + -part % LANES


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=FAST_MEMORY
    )
