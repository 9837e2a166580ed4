"""A plan: what a run's step needs on a topology, what it communicates, and how fast it could be."""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

from llm_jax.config import ConfigError
from llm_jax.model.backends import resolve
from llm_jax.plan.account import Leaf, leaves
from llm_jax.plan.chips import Topology
from llm_jax.plan.compile import Compiled, compiled
from llm_jax.plan.roofline import Roofline, roofline
from llm_jax.run import Run, check_mesh, mesh_sizes


class Plan(NamedTuple):
    """What is known of a run on a topology."""

    run: Run
    """With the model's backends as the platform has them."""
    topology: Topology
    axes: dict[str, int]
    state: list[Leaf]
    compiled: Compiled
    has: float
    """Bytes of memory that a program may use on a device."""
    roofline: Roofline | None
    """None where no peak is known, or nothing was compiled."""

    @property
    def missing(self) -> float | None:
        """Bytes that a device lacks, 0 where the step fits; None where only the compiler knows."""
        if self.compiled.needs is None:
            return None
        return max(self.compiled.needs - self.has, 1.0 if self.compiled.refused else 0.0)

    @property
    def fits(self) -> bool:
        """Whether the step fits into every device's memory."""
        return not self.compiled.refused and self.missing == 0


def fit_mesh(run: Run, topology: Topology) -> dict[str, int]:
    """The run's mesh on the topology, by the rules of a run. Raises ConfigError where it is not made of all of it."""
    axes = mesh_sizes(run.mesh, topology.n_devices)
    used = math.prod(axes.values())
    if used < topology.n_devices:
        raise ConfigError(
            f"the mesh uses {used} of the {topology.n_devices} devices of {topology.text}; mesh.data=-1 takes them all"
        )
    check_mesh(run, axes)
    return axes


def make_plan(run: Run, topology: Topology, report: Callable[[str], None]) -> Plan:
    """Compiles, or finds what was compiled before, and adds up. Raises ConfigError, Impossible."""
    axes = fit_mesh(run, topology)
    resolved = run.model_copy(update={"model": resolve(run.model, topology.chip.platform, axes["expert"])})
    told = compiled(resolved, topology, report)
    line = None if told.refused else roofline(resolved, topology, told.flops, told.moved_bytes, told.collectives)
    return Plan(resolved, topology, axes, leaves(resolved, axes), told, memory_of(topology), line)


def memory_of(topology: Topology) -> float:
    """Bytes that a device has; emulated ones share this machine's memory."""
    if topology.chip.memory is not None:
        return topology.chip.memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / topology.n_devices
