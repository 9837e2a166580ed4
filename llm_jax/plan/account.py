"""What the training state is made of, and where: every leaf's bytes, whole and on a device, from shapes alone."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from llm_jax.alphabet import MESH_AXES, WEIGHT_AXES
from llm_jax.model.weights import Weight
from llm_jax.run import Run
from llm_jax.train.state import abstract_state


class Leaf(NamedTuple):
    """One array of the state."""

    path: str
    kind: str
    """weights, optimizer.NAME (such as optimizer.mu), or other."""
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    """The mesh axes over which it is divided."""
    bytes: int
    on_a_device: int


def leaves(run: Run, axes: Mapping[str, int]) -> list[Leaf]:
    """Every array of the run's training state on a mesh of these sizes, most bytes on a device first."""
    with jax.sharding.use_abstract_mesh(_mesh(axes)):
        state = abstract_state(run.model, run.optim, run.spikes)
    found = [_leaf(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]]
    return sorted(found, key=lambda leaf: -leaf.on_a_device)


def whole_on_devices(run: Run, axes: Mapping[str, int]) -> list[str]:
    """The weights with a letter that belongs to an axis of the mesh and that are not divided over it."""
    with jax.sharding.use_abstract_mesh(_mesh(axes)):
        params = abstract_state(run.model, run.optim, run.spikes).params
    found = []
    for path, weight in jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, Weight))[0]:
        letters = weight.letters
        wanted = {WEIGHT_AXES[a] for a in letters if a in WEIGHT_AXES and axes[WEIGHT_AXES[a]] > 1}
        # A vector is divided over tensor at most: over fsdp its gather would cost more than it does.
        wanted -= {"fsdp"} if len(letters) == 1 else set()
        if missing := wanted - set(_divided(weight.get_value())):
            found.append(f"{_name(path)} ({letters}) is whole over {', '.join(sorted(missing))}")
    return found


def replicated_share(found: Iterable[Leaf], axes: Mapping[str, int]) -> float:
    """The share of the weights' bytes that every device of fsdp x tensor has whole; 0 where neither is on."""
    if axes["fsdp"] * axes["tensor"] == 1:
        return 0.0
    weights = [leaf for leaf in found if leaf.kind == "weights"]
    whole = [leaf for leaf in weights if not {"fsdp", "tensor"} & set(leaf.axes)]
    return sum(leaf.bytes for leaf in whole) / sum(leaf.bytes for leaf in weights)


def by_kind(found: Iterable[Leaf]) -> dict[str, tuple[int, int]]:
    """Bytes of each kind: of all, and on a device."""
    sums: dict[str, tuple[int, int]] = {}
    for leaf in found:
        whole, part = sums.get(leaf.kind, (0, 0))
        sums[leaf.kind] = (whole + leaf.bytes, part + leaf.on_a_device)
    return sums


def _mesh(axes: Mapping[str, int]) -> AbstractMesh:
    sizes = tuple(axes[axis] for axis in MESH_AXES)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def _leaf(path: tuple, leaf: jax.ShapeDtypeStruct) -> Leaf:
    name, size = _name(path), leaf.dtype.itemsize
    part = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    bytes_of_all, on_a_device = math.prod(leaf.shape) * size, math.prod(part) * size
    return Leaf(name, _kind(name), leaf.shape, str(leaf.dtype), _divided(leaf), bytes_of_all, on_a_device)


def _kind(name: str) -> str:
    section, *rest = name.split("/")
    if section == "params":
        return "weights"
    if section != "opt_state":
        return "other"
    # Optax's states are tuples of named fields: the last name before the weights' own path.
    fields = [part for part in rest if not part.isdigit()]
    return f"optimizer.{fields[0]}" if fields else "other"


def _divided(leaf: jax.ShapeDtypeStruct | jax.Array) -> tuple[str, ...]:
    spec = () if leaf.sharding is None else leaf.sharding.spec  # pyright: ignore[reportAttributeAccessIssue]
    names = [axis if isinstance(axis, tuple) else (axis,) for axis in spec if axis is not None]
    return tuple(name for axis in names for name in axis)


def _name(path: tuple) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value").removesuffix("/raw_value")
