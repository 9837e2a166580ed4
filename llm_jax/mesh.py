"""The device mesh, and how letters become partition specs. Every mesh is explicit: shardings are part of types."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax import P
from jax.sharding import AxisType, Mesh

from llm_jax.alphabet import MESH_AXES, act_axes, weight_axes
from llm_jax.config import ConfigError

# Without this an axis of size 1 stays in an array's type: P("data", None) would differ from P("data", "context").
jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
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


def join_processes() -> None:
    """Joins the job's other processes, where the environment tells of any; comes before the first use of a device.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID decide where they are set, else what JAX detects
    (Slurm, Open MPI, TPU pods). Raises ConfigError where fewer processes come together than the launcher advertised.
    """
    triple = {name: os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")}
    missing = [f"JAX_{name}" for name, value in triple.items() if value is None]
    if triple["NUM_PROCESSES"] is not None or triple["PROCESS_ID"] is not None:
        if missing:
            raise ConfigError(f"{', '.join(missing)} not set; several processes need all of the three variables")
        advertised = _whole_number("NUM_PROCESSES", triple["NUM_PROCESSES"])
        if advertised > 1:
            process = _whole_number("PROCESS_ID", triple["PROCESS_ID"])
            jax.distributed.initialize(triple["COORDINATOR_ADDRESS"], advertised, process)
    else:
        advertised = _advertised()
        if advertised > 1:
            try:
                jax.distributed.initialize()
            except ValueError as error:
                raise ConfigError(f"the launcher says there are {advertised} processes; JAX: {error}") from error
    if jax.process_count() != advertised:
        raise ConfigError(f"{jax.process_count()} of the {advertised} processes that the launcher advertises joined")


def _advertised() -> int:
    """How many processes the launcher says there are; 1 without a launcher.

    A bare `python` in an sbatch script has SLURM_NTASKS and no peers: without this count it would train alone.
    """
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "localhost").split(",")
    counts = [os.environ.get(name) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    return max([len(hosts), *(int(count) for count in counts if count)])


def _whole_number(name: str, text: str | None) -> int:
    if text is None or not text.isdecimal():
        raise ConfigError(f"JAX_{name} = {text!r}: must be a whole number")
    return int(text)


def keep_compiled() -> None:
    """Keeps compiled programs between processes: in JAX_COMPILATION_CACHE_DIR, or in a folder for this JAX version.

    A cache is never carried to another machine: CPU code in it may use instructions that the other does not have.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "llm_jax" / f"jax-{jax.__version__}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
