"""How long a step takes at best: each part of the machine at its data sheet's speed. Pure, and without jax."""

from collections.abc import Sequence
from typing import NamedTuple

from llm_jax.plan.chips import Topology
from llm_jax.plan.collectives import Collective
from llm_jax.run import Run
from llm_jax.train.flops import flops_per_token, mfu, peak_flops


class Roofline(NamedTuple):
    """Seconds of a step that each part needs by itself, and what follows from them.

    At best all of them overlap, and the slowest is the step; at worst none does, and they add up.
    """

    compute: float
    """Products of matrices at the peak, recomputation included."""
    memory: float
    """The compiled program's reads and writes of main memory, at its bandwidth."""
    network: float
    """What is sent within a slice or host, at the speed of one mesh axis at a time."""
    slow_network: float
    """What is sent between slices or hosts."""
    tokens: int
    """Of a step."""
    best_mfu: float
    worst_mfu: float

    @property
    def best(self) -> float:
        """Seconds of a step if everything overlaps."""
        return max(self.parts.values())

    @property
    def worst(self) -> float:
        """Seconds of a step if nothing overlaps."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        return {
            "compute": self.compute,
            "memory": self.memory,
            "network": self.network,
            "slow network": self.slow_network,
        }

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def roofline(
    run: Run, topology: Topology, flops: float, moved_bytes: float, collectives: Sequence[Collective]
) -> Roofline | None:
    """The estimate for a step of the run; None where the chip's peak is not known.

    flops: products of all devices together; moved_bytes: of one device.
    """
    chip = topology.chip
    peak = peak_flops(chip.kind, run.model.compute_dtype)
    if peak is None or chip.bandwidth is None:
        return None
    parts = (
        flops / (peak * topology.n_devices),
        moved_bytes / chip.bandwidth,
        sum(c.sent for c in collectives if not c.slow) / topology.speed,
        sum(c.sent for c in collectives if c.slow) / chip.network,
    )
    per_token = flops_per_token(run.model, run.data.seq_len, run.objective)
    best, worst = (
        mfu(run.tokens_per_step / seconds, per_token, peak, topology.n_devices) for seconds in (max(parts), sum(parts))
    )
    assert best is not None and worst is not None
    return Roofline(*parts, tokens=run.tokens_per_step, best_mfu=best, worst_mfu=worst)
