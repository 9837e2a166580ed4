"""The device mesh, and how letters become partition specs. Every mesh is explicit: shardings are part of types."""

import math
from collections.abc import Sequence

import jax
from jax import P
from jax.sharding import AxisType, Mesh

from llm_jax.alphabet import MESH_AXES, act_axes, weight_axes

# Without this an axis of size 1 stays in an array's type, and P("data", None) differs from P("data", "context") on one device.
jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The explicit mesh of the given axis sizes; with too many devices it takes the first ones."""
    n = math.prod(sizes.values())
    devices = list(devices if devices is not None else jax.devices())[:n]
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def acts(letters: str) -> P:
    """The partition spec of an activation named by its letters."""
    return P(*act_axes(letters))


def weights(letters: str) -> P:
    """The partition spec of a stored weight named by its letters."""
    return P(*weight_axes(letters))


def gathered(letters: str) -> P:
    """The partition spec of a weight in use: as stored, but whole over fsdp."""
    return P(*(None if axis == "fsdp" else axis for axis in weight_axes(letters)))
