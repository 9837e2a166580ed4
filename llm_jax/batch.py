"""A batch on the device: rows of tokens become inputs, targets, weights, segments and positions inside the step."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.mesh import acts

# The segment number of padding.
PADDING = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a model reads and is asked; int32, weights float32; all T and N letters may be sharded over context.

    In the step every field has a leading A, the microbatches.
    """

    tokens_BT: Array
    segments_BT: Array
    positions_BT: Array
    targets_BN: Array
    weights_BN: Array
    places_BN: Array | None = None
    """The predicted positions, in order; None: every one, N = T."""


def documents(rows_BU: Array) -> tuple[Array, Array]:
    """Segment number and position inside the document of each token of a row; a document starts at BOS.

    rows_BU: int32 [..., U], whole rows (U not sharded); returns two arrays of its shape.
    """
    axis = rows_BU.ndim - 1
    starts_BU = rows_BU == BOS_ID
    index_BU = jax.lax.broadcasted_iota(jnp.int32, rows_BU.shape, axis, out_sharding=jax.typeof(rows_BU).sharding)
    segments_BU = jnp.cumsum(starts_BU.astype(jnp.int32), axis)
    first_BU = jax.lax.cummax(jnp.where(starts_BU, index_BU, 0), axis)
    return segments_BU, index_BU - first_BU


def segments_and_positions(rows_ABU: Array, cross_documents: bool) -> tuple[Array, Array]:
    """Those of the T = U - 1 tokens that a model reads, where it wants them; across documents a row is a single one.

    Padding is a segment of its own, PADDING, so that a model that looks both ways does not see it.
    """
    segments_ABU, positions_ABU = documents(rows_ABU)
    if cross_documents:
        segments_ABU = jnp.zeros_like(segments_ABU)
        positions_ABU = jnp.zeros_like(positions_ABU) + jnp.arange(rows_ABU.shape[-1])[None, None]
    segments_ABU = jnp.where(rows_ABU == PAD_ID, PADDING, segments_ABU)
    return place(segments_ABU[..., :-1]), place(positions_ABU[..., :-1])


def row_keys(key: Array, first: Array | int, A: int, B: int) -> Array:
    """A key for each row [A, B] of a batch: key folded with the row's number, first + a * B + b.

    So what is drawn for a row depends neither on the microbatch nor on the device or process that holds it.
    """
    a_AB, b_AB = (jax.lax.broadcasted_iota(jnp.uint32, (A, B), axis, out_sharding=acts("AB")) for axis in (0, 1))
    row_AB = jnp.uint32(first) + a_AB * jnp.uint32(B) + b_AB
    return jax.vmap(jax.vmap(lambda row: jax.random.fold_in(key, row)))(row_AB)


def place(array_ABT: Array) -> Array:
    """Puts [A, B, T] or [A, B, N] where the model wants it; only a local slice, since rows arrive whole everywhere."""
    return jax.reshard(array_ABT, acts("ABT"))
