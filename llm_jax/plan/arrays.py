"""The largest arrays of a step as it is traced, on one device: for what no compiler will compile."""

import math
from typing import Any

from jax.extend.core import Jaxpr

from llm_jax.plan.arithmetic import bodies
from llm_jax.plan.traffic import Temporary


def largest_arrays(jaxpr: Jaxpr, n: int) -> list[Temporary]:
    """The n largest arrays that its operations make, each of its kind once; XLA may fuse some of them away."""
    found: dict[str, int] = {}
    _collect(jaxpr, found)
    largest = sorted(found.items(), key=lambda item: -item[1])[:n]
    return [Temporary(size, what) for what, size in largest]


def bytes_on_a_device(aval: Any) -> int:
    """Bytes of what a device has of an array of this type; inside a shard_map that is all of it."""
    shape, sharding = aval.shape, getattr(aval, "sharding", None)
    if sharding is not None and not sharding.mesh.empty and not sharding.mesh.manual_axes:
        shape = sharding.shard_shape(shape)
    return math.prod(shape) * aval.dtype.itemsize


def _collect(jaxpr: Jaxpr, found: dict[str, int]) -> None:
    for equation in jaxpr.eqns:
        inner = list(bodies(equation))
        for body in inner:
            _collect(body, found)
        if inner:
            continue  # what it results in is made inside of it
        for variable in equation.outvars:
            aval: Any = variable.aval
            if hasattr(aval, "dtype") and hasattr(aval.dtype, "itemsize"):
                dims = ",".join(str(size) for size in aval.shape)
                found[f"{aval.dtype}[{dims}] {equation.primitive.name}, of all devices"] = bytes_on_a_device(aval)
