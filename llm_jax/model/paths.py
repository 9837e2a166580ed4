"""How a checkpoint names its arrays: nested dicts of strings, layers by number and not by their place in a scan."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Tree = dict[str, Any]
LAYERS = "layers"


def to_tree(state: Any) -> Tree:
    """A state as nested dicts; what is stacked under `layers` becomes an entry a layer. For jit or eval_shape."""
    tree: Tree = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        keys = _keys(path)
        names = _names_of_layers(keys, leaf)
        if names is None:
            _put(tree, keys, leaf)
        else:
            for i, name in enumerate(names):
                _put(tree, name, leaf[i])
    return tree


def from_tree(tree: Tree, like: Any) -> Any:
    """to_tree's inverse: the state of `like`'s structure (shapes will do). Call it inside jit or eval_shape."""

    def leaf_of(path: tuple, leaf: Any) -> Array:
        keys = _keys(path)
        names = _names_of_layers(keys, leaf)
        return _get(tree, keys) if names is None else jnp.stack([_get(tree, name) for name in names])

    return jax.tree_util.tree_map_with_path(leaf_of, like)


def _names_of_layers(keys: list[str], leaf: Any) -> list[list[str]] | None:
    """The names of a leaf's layers, if it is stacked: in the place "1+3" they are layers 1, 4, 7, ..."""
    if LAYERS not in keys:
        return None
    at = keys.index(LAYERS) + 1
    first, plus, stride = keys[at].partition("+")
    if not plus:
        return None
    return [[*keys[:at], str(int(first) + i * int(stride)), *keys[at + 1 :]] for i in range(leaf.shape[0])]


def placed(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes whose shardings only name mesh axes, on this mesh's devices; what has no sharding is replicated."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding is not None else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract)


def _keys(path: tuple) -> list[str]:
    """A key path as strings, without the slot in which a variable keeps its value."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return keys[:-1] if keys[-1] in ("value", "raw_value") else keys


def _put(tree: Tree, keys: list[str], leaf: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    assert keys[-1] not in tree, keys
    tree[keys[-1]] = leaf


def _get(tree: Tree, keys: list[str]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree
