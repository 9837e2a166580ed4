"""A tree of arrays as names and arrays, the form in which a checkpoint knows it: "params/layers/0/q"."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AbstractMesh, NamedSharding, Sharding
from orbax.checkpoint import type_handlers

# Replicas of an array share the work of writing it where each gets at least so much: to cut it, every device compiles a
# slice for every shape, which takes seconds before the first save where small arrays are cut too.
SLICE_BYTES = 1 << 24

# How many differing arrays a message lists.
LISTED = 20


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by name, in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of one name"
    return named


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """The same leaves as dicts in dicts, so that what is stored is no flat list of paths."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def types(named: Mapping[str, Any]) -> dict[str, str]:
    """Dtype and shape of each array, as in "float32[64,128]"."""
    return {name: f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]" for name, leaf in named.items()}


def differences(saved: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """A line for each array that is not in both, or of another type; saved top-level entries may be wholly unwanted."""
    top = {name.split("/")[0] for name in wanted}
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            lines.append(f"{name}: {wanted[name]} is wanted, and is not in the checkpoint")
        elif name not in wanted and name.split("/")[0] in top:
            lines.append(f"{name}: {saved[name]} is in the checkpoint, and is not wanted")
        elif name in wanted and saved[name] != wanted[name]:
            lines.append(f"{name}: {wanted[name]} is wanted, and the checkpoint has {saved[name]}")
    return lines[:LISTED] + ([f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else [])


def handler() -> ocp.PyTreeCheckpointHandler:
    """What writes and reads dicts of jax.Arrays."""
    arrays = type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=type_handlers.create_type_handler_registry((jax.Array, arrays))
    )


def read(handler: ocp.PyTreeCheckpointHandler, folder: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays of a folder that wanted, ShapeDtypeStructs with shardings, names; nothing else is read."""
    targets = nest(
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_on_devices(leaf.sharding))
            for name, leaf in wanted.items()
        }
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    with jax.transfer_guard("allow"):
        tree = handler.restore(
            epath.Path(folder),
            args=ocp.args.PyTreeRestore(targets, restore_args=restore_args, partial_restore=True),
        )
    return flatten(tree)


def _on_devices(sharding: Sharding | None) -> Sharding:
    """`jax.eval_shape` gives shardings on an abstract mesh, and none to scalars; the mesh that is set has devices."""
    if sharding is None:
        return NamedSharding(jax.sharding.get_mesh(), jax.P())
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        return NamedSharding(jax.sharding.get_mesh(), sharding.spec, memory_kind=sharding.memory_kind)
    return sharding
