"""What a topology such as v5p:4x4x8 or h100:8 is: devices of a kind, how fast they are, and how they are joined.

Imports no jax.
"""

import difflib
import math
import re
from typing import NamedTuple

from llm_jax.config import ConfigError

GIB = 2**30


class Chip(NamedTuple):
    """One device. Its peak is flops.peak_flops of its kind."""

    kind: str
    """What JAX calls it."""
    platform: str
    """cpu, gpu or tpu."""
    memory: float | None
    """Bytes that a program may use; None: that is the machine's affair."""
    bandwidth: float | None
    """Bytes/s of its main memory; None where nothing is said about times."""
    link: float
    """Bytes/s one way of a link of the fast network: of a TPU one of two a dimension, of a GPU all NVLinks."""
    network: float
    """Bytes/s one way of its share of the network between slices or hosts."""
    dims: int
    """Dimensions that a topology has."""
    wraps: int
    """Sizes of a dimension that close into a ring are multiples of it; 0: it is no torus."""


# Memory is what libtpu lets a program have, a little less than what the chip has; it says so when a program is too
# large (libtpu 0.0.52: "Used ... of 95.74G hbm", 31.25G, 15.75G). Bandwidths: Google Cloud's pages on TPU v5e, v5p and
# v6e. Inter-chip interconnect: 1200 GB/s both ways over 6 ports (v5p), 1600 and 3200 Gbit/s over 4 (v5e, v6e), so 100,
# 50 and 100 GB/s a port one way. Between slices: 50 Gbit/s a chip (v5p), 6.4 and 25.6 Tbit/s a pod of 256 (v5e, v6e).
# A dimension of a v5p slice is a ring where it is made of whole cubes of 4, of v5e and v6e where it has all 16.
# NVIDIA's H100 and H200 SXM data sheets: 3.35 and 4.8 TB/s, NVLink 900 GB/s both ways; a network card of 400 Gbit/s for
# each GPU, as in a DGX H100. JAX takes three quarters of a GPU's memory, of which nvidia-smi tells 81559 and 143771 MiB
# (XLA_PYTHON_CLIENT_MEM_FRACTION).
CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5 lite", "tpu", 15.75 * GIB, 819e9, 50e9, 3.125e9, 2, 16),
    "v5p": Chip("TPU v5", "tpu", 95.74 * GIB, 2765e9, 100e9, 6.25e9, 3, 4),
    "v6e": Chip("TPU v6 lite", "tpu", 31.25 * GIB, 1640e9, 100e9, 12.5e9, 2, 16),
    "h100": Chip("NVIDIA H100 80GB HBM3", "gpu", 0.75 * 81559 * 2**20, 3350e9, 450e9, 50e9, 1, 0),
    "h200": Chip("NVIDIA H200", "gpu", 0.75 * 143771 * 2**20, 4800e9, 450e9, 50e9, 1, 0),
    "cpu": Chip("cpu", "cpu", None, None, 0.0, 0.0, 1, 0),
}
GPUS_OF_A_HOST = 8


class Topology(NamedTuple):
    """Devices of one kind, joined."""

    text: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def n_devices(self) -> int:
        """How many devices."""
        return math.prod(self.shape)

    @property
    def speed(self) -> float:
        """Bytes/s that a device sends over the fast network to the others along a mesh axis.

        Of a TPU: over one dimension of the torus, both ways where every dimension is a ring, else one way.
        """
        chip = self.chip
        if not chip.wraps:
            return chip.link
        rings = all(size % chip.wraps == 0 for size in self.shape if size > 1)
        return 2 * chip.link if rings else chip.link


def parse(text: str) -> Topology:
    """The topology that a text names. Raises ConfigError."""
    name, colon, size = text.partition(":")
    if name not in CHIPS:
        close = difflib.get_close_matches(name, CHIPS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(CHIPS)}"
        raise ConfigError(f"--topology {text}: {name!r} is no kind of device; {hint}")
    chip = CHIPS[name]
    example = {1: "8", 2: "4x4", 3: "4x4x4"}[chip.dims]
    if not colon or not re.fullmatch(r"[1-9][0-9]*" + r"x[1-9][0-9]*" * (chip.dims - 1), size):
        raise ConfigError(f"--topology {text}: {name} is given as {name}:{example}")
    shape = tuple(int(n) for n in size.split("x"))
    topology = Topology(text, chip, shape)
    if chip.platform == "gpu" and topology.n_devices > GPUS_OF_A_HOST and topology.n_devices % GPUS_OF_A_HOST:
        raise ConfigError(f"--topology {text}: more than {GPUS_OF_A_HOST} GPUs are whole hosts of {GPUS_OF_A_HOST}")
    return topology
