"""TPU chips that this machine does not have: programs are compiled for them, and do not run."""

import os

from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from llm_jax.alphabet import MESH_AXES

# No metadata server is asked, and several test processes may compile at once.
WITHOUT_CHIPS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def mesh_on(topology: str, **sizes: int) -> Mesh:
    """A mesh of a topology's chips, such as v5e:2x4; axes that are not named are 1."""
    os.environ |= WITHOUT_CHIPS
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    placed = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))
