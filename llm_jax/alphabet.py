"""The one alphabet: what each letter of a shape means and which mesh axes it is sharded over. Plain data, no jax.

A accumulation step   B batch row      U token of a stored row (T + 1)   T query position   S key position
D model width         F feed-forward   H query head                      K kv head          G query heads of one kv head
C head channel        V vocabulary     L layer             N predicted position
E expert              X chosen expert  M slot in an expert
P learned position    Y token type     O width inside the output head (as D, and whole)
"""

import math
from collections.abc import Mapping

from llm_jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")

WEIGHT_AXES: Mapping[str, str] = {
    "D": "fsdp",
    "F": "tensor",
    "H": "tensor",
    "K": "tensor",
    "V": "tensor",
    "E": "expert",
}

ACT_AXES: Mapping[str, str | tuple[str, ...]] = {
    "B": ("data", "fsdp", "expert"),
    "T": "context",
    "N": "context",
    "F": "tensor",
    "H": "tensor",
    "K": "tensor",
    "V": "tensor",
}

# The axes that divide tokens: what they share is a sum over all of them.
ROW_AXES = (*ACT_AXES["B"], "context")

# Rows of the embedding are padded to a multiple of this, whatever the mesh, so that checkpoints fit every mesh.
VOCAB_MULTIPLE = 128


def weight_axes(letters: str) -> tuple[str | None, ...]:
    """The mesh axis of each letter of a weight; a vector is divided over tensor at most, as what it is used with is.

    Over other axes its gather would cost more than it does.
    """
    axes = tuple(WEIGHT_AXES.get(a) for a in letters)
    return axes if len(letters) > 1 else tuple(axis if axis == "tensor" else None for axis in axes)


def act_axes(letters: str) -> tuple[str | tuple[str, ...] | None, ...]:
    """The mesh axes of each letter of an activation."""
    return tuple(ACT_AXES.get(a) for a in letters)


def over_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """How many parts of each axis lie on different slices: data carries what it can of them, fsdp the rest.

    sizes: axis -> size. Raises ConfigError where the two cannot be divided over so many slices.
    """
    data = math.gcd(sizes["data"], slices)
    fsdp = slices // data
    if sizes["fsdp"] % fsdp:
        raise ConfigError(
            f"mesh.slices = {slices}: mesh.data = {sizes['data']} and mesh.fsdp = {sizes['fsdp']} cannot be divided "
            "over so many; the network between slices is too slow for the other axes"
        )
    return dict.fromkeys(MESH_AXES, 1) | {"data": data, "fsdp": fsdp}


def check_divisible(sizes: Mapping[str, tuple[str, int]], mesh: Mapping[str, int], axes: Mapping) -> None:
    """Raises ConfigError for the first letter whose size its mesh axes do not divide.

    sizes: letter -> (the field's path, its value); mesh: axis -> size; axes: WEIGHT_AXES or ACT_AXES.
    """
    for letter, (path, size) in sizes.items():
        names = axes.get(letter, ())
        for_letter = (names,) if isinstance(names, str) else names
        parts = 1
        for name in for_letter:
            parts *= mesh[name]
        if size % parts:
            over = " * ".join(f"mesh.{name}" for name in for_letter if mesh[name] > 1)
            raise ConfigError(f"{path} = {size} is not divisible by {over} = {parts}")
