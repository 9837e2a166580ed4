"""The device mesh, and how letters become partition specs. Every mesh is explicit: shardings are part of types."""

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import P
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llm_jax.alphabet import MESH_AXES, act_axes, over_slices, weight_axes
from llm_jax.config import ConfigError

# Without this an axis of size 1 stays in an array's type: P("data", None) would differ from P("data", "context").
jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)

EXPLICIT = (AxisType.Explicit,) * len(MESH_AXES)


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None, *, slices: int | None = None) -> Mesh:
    """The explicit mesh of the given axis sizes; with too many devices it takes the first ones.

    slices: groups of devices that only a slow network joins; data goes across it, then fsdp, and nothing else. None is
    what the devices say, in plain order where that does not fit. Raises ConfigError where a number asked for does not.
    """
    devices = list(devices if devices is not None else jax.devices())[: math.prod(sizes.values())]
    groups = slices_of(devices, slices)
    try:
        parts = parts_over(groups, sizes)
    except ConfigError:
        if slices is not None:
            raise
        groups, parts = [devices], over_slices(sizes, 1)
    within = tuple(sizes[axis] // parts[axis] for axis in MESH_AXES)
    blocks = np.stack([_arranged(group, within) for group in groups])
    return Mesh(across(blocks, parts), MESH_AXES, axis_types=EXPLICIT)


def told_slices(mesh: Mesh, slices: int | None) -> str:
    """What a line about a mesh says of its slices, after the devices; nothing of one slice."""
    groups = slices_of(list(mesh.devices.flat), slices)
    if len(groups) == 1:
        return ""
    try:
        parts = parts_over(groups, mesh.shape)
    except ConfigError:
        return f", in plain order: data and fsdp cannot be divided over the {len(groups)} slices"
    return f", {len(groups)} slices joined by " + " x ".join(f"{axis} {n}" for axis, n in parts.items() if n > 1)


def slices_of(devices: Sequence[Any], slices: int | None) -> list[list[Any]]:
    """The devices of each slice; of None as the devices say: TPU slices, hosts of GPUs.

    Raises ConfigError where the processes do not divide into so many slices as are asked for.
    """
    if slices == 1:
        return [list(devices)]
    said = _grouped(devices, _slice)
    if slices is None or slices == len(said):
        return said
    # What the devices do not say, processes do: those that follow each other are one slice.
    processes = _grouped(devices, lambda device: (_slice(device), device.process_index))
    if len(processes) % slices:
        n = f"{len(processes)} processes do" if len(processes) > 1 else "one process does"
        raise ConfigError(f"mesh.slices = {slices}: {n} not divide into so many groups of equal size")
    each = len(processes) // slices
    return [list(itertools.chain(*processes[k * each : (k + 1) * each])) for k in range(slices)]


def parts_over(groups: Sequence[Sequence[Any]], sizes: Mapping[str, int]) -> dict[str, int]:
    """over_slices, for slices of these devices; raises ConfigError too where one of them has more than another."""
    if len({len(group) for group in groups}) > 1:
        n = ", ".join(str(len(group)) for group in groups)
        raise ConfigError(f"mesh.slices = {len(groups)}: they have {n} devices, and must have equally many")
    return over_slices(sizes, len(groups))


def across(blocks: np.ndarray, parts: Mapping[str, int]) -> np.ndarray:
    """A mesh's devices from each slice's own, [slice, *axes within] -> [*axes]; which slice it is comes first.

    parts: over_slices.
    """
    _, data, fsdp, *inner = blocks.shape
    outer = blocks.reshape(parts["data"], parts["fsdp"], data, fsdp, *inner)
    return outer.swapaxes(1, 2).reshape(parts["data"] * data, parts["fsdp"] * fsdp, *inner)


def _arranged(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in an order that suits their own network."""
    if len({_slice(device) for device in devices}) > 1:
        # JAX arranges one slice at a time, and refuses more.
        return np.array(devices).reshape(shape)
    try:
        return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=EXPLICIT).devices
    except NotImplementedError:
        # An axis of 8 on a torus of 4 x 4 x 4 takes a whole dimension and half of another; JAX wants to be told.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def _grouped(devices: Sequence[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for device in devices:
        groups.setdefault(key(device), []).append(device)
    return [groups[k] for k in sorted(groups)]


def acts(letters: str) -> P:
    """The partition spec of an activation named by its letters."""
    return P(*act_axes(letters))


def weights(letters: str) -> P:
    """The partition spec of a stored weight named by its letters."""
    return P(*weight_axes(letters))


def gathered(letters: str) -> P:
    """The partition spec of a weight in use: as stored, but whole over fsdp."""
    return P(*(None if axis == "fsdp" else axis for axis in weight_axes(letters)))


def compiled_for_one_call() -> dict[str, Any]:
    """Compiler options for a program that is called once, such as the one that draws the first weights.

    XLA's default for CPUs, 3, costs more than such a program can gain: 4 s for a small model's first weights instead
    of 2.5, and 14 instead of 2.5 on JAX 0.12. The bits are the same.
    """
    return {"xla_backend_optimization_level": 2} if jax.default_backend() == "cpu" else {}


def keep_compiled() -> None:
    """Keeps compiled programs between processes: in JAX_COMPILATION_CACHE_DIR, or in a folder for this JAX version.

    A cache is never carried to another machine: CPU code in it may use instructions that the other does not have.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "llm_jax" / f"jax-{jax.__version__}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
