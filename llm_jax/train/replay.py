"""The same gradient twice, compared bit for bit: a device that computes wrongly is told from a batch that is bad."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from llm_jax.model.paths import to_tree
from llm_jax.named_arrays import flatten
from llm_jax.train.state import TrainState
from llm_jax.train.step import Summed, Sums, mix

Checksums = dict[str, Array]


def make_checksums(
    gradient_of: Callable[[TrainState, Array], tuple[Summed, Sums]],
) -> Callable[[TrainState, Array], Checksums]:
    """The function (state, rows_ABU) -> a uint32 checksum of every loss term and every gradient array, by its name.

    One flipped bit changes it. It adds whole numbers, so it is the same in whatever order devices add.
    """

    def checksums(state: TrainState, rows_ABU: Array) -> Checksums:
        (gradient, sums, _), _ = gradient_of(state, rows_ABU)
        named = flatten(to_tree(gradient)) | {f"sum of {name}": value for name, value in sums.items()}
        return {name: checksum(value) for name, value in named.items()}

    return checksums


def checksum(x: Array) -> Array:
    """A uint32 of all the bits of a float array."""
    whole = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jnp.sum(mix(jax.lax.bitcast_convert_type(x, whole).astype(jnp.uint32) + jnp.uint32(1)), dtype=jnp.uint32)


def differing(checksums: Callable[[TrainState, Array], Checksums], state: TrainState, rows_ABU: Array) -> list[str]:
    """The names of what came out differently when it was computed a second time from the same input."""
    once, again = (jax.device_get(checksums(state, rows_ABU)) for _ in range(2))
    return [name for name in once if once[name] != again[name]]


def tell_difference(number: int, names: list[str]) -> str:
    """The line for people; number: the update's."""
    return (
        f"step {number}: the same gradient, computed twice, differs in {len(names)} arrays "
        f"({names[0]}{', ...' if len(names) > 1 else ''}): a device computes wrongly; the batch is not to blame"
    )
