"""Which updates would do harm: those that are not finite, and those far out of line with the ones before them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llm_jax.train.config import SpikesConfig

# Rounding alone is no spike, however little the last updates differ.
RELATIVE_DEVIATION = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recent:
    """Loss and gradient norm of the last W updates, float32; update i is at i % W, NaN if it was skipped."""

    loss_W: Array
    norm_W: Array


class Judged(NamedTuple):
    """What became of an update.

    finite, spike, healthy (may be made), bool; skips: skipped ones among the last W, this one too, int32; first_skip:
    the number, from 1, of the earliest of them, int32, 0 for none.
    """

    finite: Array
    spike: Array
    healthy: Array
    recent: Recent
    skips: Array
    first_skip: Array


def none_yet(spikes: SpikesConfig) -> Recent:
    """Before the first update."""
    return Recent(jnp.zeros(spikes.window), jnp.zeros(spikes.window))


def judge(recent: Recent, step: Array, loss: Array, norm: Array, spikes: SpikesConfig) -> Judged:
    """Judges the update after `step` others by its loss and its gradient's norm, float32 scalars, and remembers it.

    Both see the whole batch, so the judgement is the same on every mesh and with every accumulation. Skipping an update
    that is six deviations off the last 128 is what OLMo 2 does (2025).
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    spike = finite & (_stands_out(recent.loss_W, loss, step, spikes) | _stands_out(recent.norm_W, norm, step, spikes))
    healthy = finite & ~spike
    place_W = jnp.arange(spikes.window)
    here_W = place_W == step % spikes.window
    recent = Recent(
        jnp.where(here_W, jnp.where(healthy, loss, jnp.nan), recent.loss_W),
        jnp.where(here_W, jnp.where(healthy, norm, jnp.nan), recent.norm_W),
    )
    skipped_W = jnp.isnan(recent.loss_W)
    age_W = (step - place_W) % spikes.window
    oldest = jnp.max(jnp.where(skipped_W, age_W, -1))
    first_skip = jnp.where(oldest < 0, 0, step + 1 - oldest)
    return Judged(finite, spike, healthy, recent, jnp.sum(skipped_W, dtype=jnp.int32), first_skip)


def _stands_out(recent_W: Array, value: Array, step: Array, spikes: SpikesConfig) -> Array:
    """Whether a value lies over the mean by more than sigma deviations, once half a window is known."""
    if spikes.sigma is None:
        return jnp.zeros((), bool)
    known_W = jnp.isfinite(recent_W) & (jnp.arange(spikes.window) < step)
    n = jnp.sum(known_W)
    share_W = known_W / jnp.maximum(n, 1)
    known_values_W = jnp.where(known_W, recent_W, 0)
    mean = jnp.sum(share_W * known_values_W)
    deviation = jnp.sqrt(jnp.sum(share_W * jnp.square(known_values_W - mean)))
    deviation = jnp.maximum(deviation, RELATIVE_DEVIATION * jnp.abs(mean))
    return (n >= spikes.window // 2) & (value > mean + spikes.sigma * deviation)
