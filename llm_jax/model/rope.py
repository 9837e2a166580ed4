"""Rotary positions (Su et al. 2021), and how they are stretched to contexts longer than those of training."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llm_jax.model.config import LinearScaling, Llama3Scaling, ModelConfig, NtkScaling, RopeScaling, YarnScaling


class Angles(NamedTuple):
    """Cosine and sine by which each half of a head's channels turns, float32 [B, T, 1, C / 2]."""

    cos_BT1C: Array
    sin_BT1C: Array


def angles(positions_BT: Array, theta: float, cfg: ModelConfig) -> Angles:
    """Channels c and c + C/2 turn by position * frequency c; cosine and sine also carry YaRN's temperature."""
    frequency_C = jnp.asarray(frequencies(theta, cfg.d_head, cfg.rope_scaling), jnp.float32)
    angle_BT1C = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None]
    by = Angles(jnp.cos(angle_BT1C), jnp.sin(angle_BT1C))
    if isinstance(cfg.rope_scaling, YarnScaling):
        sharper = yarn_temperature(cfg.rope_scaling.factor)
        by = Angles(by.cos_BT1C * sharper, by.sin_BT1C * sharper)
    return by


def frequencies(theta: float, d_head: int, scaling: RopeScaling | None) -> list[float]:
    """The radians a position by which each of the C / 2 channel pairs turns, fastest first: theta ** (-2c / C), scaled.

    NTK: theta grows, so that the slowest pair turns `factor` times slower and the fastest as before. YaRN and Llama 3:
    what turns seldom over the original context is divided by the factor, what turns often is kept, and between the two
    bounds it is blended, linear in the number of turns (Peng et al. 2023, section 3.2).
    """
    half = d_head // 2
    match scaling:
        case NtkScaling(factor=factor) if half > 1:
            theta *= factor ** (half / (half - 1))
        case _:
            pass
    plain = [theta ** (-c / half) for c in range(half)]
    match scaling:
        case LinearScaling(factor=factor):
            return [f / factor for f in plain]
        case YarnScaling():
            return [_blended(f, scaling.factor, scaling.original_length, scaling.slow, scaling.fast) for f in plain]
        case Llama3Scaling():
            return [_blended(f, scaling.factor, scaling.original_length, scaling.low, scaling.high) for f in plain]
        case _:
            return plain


def _blended(frequency: float, factor: float, original_length: int, seldom: float, often: float) -> float:
    turns = original_length * frequency / (2 * math.pi)
    kept = min(max((turns - seldom) / (often - seldom), 0.0), 1.0)
    return kept * frequency + (1 - kept) * frequency / factor


def yarn_temperature(factor: float) -> float:
    """What queries and keys are multiplied by, so that attention over a longer context stays as sharp."""
    return 0.1 * math.log(factor) + 1


@jax.custom_vjp
def rotate(x_BTHC: Array, by: Angles) -> Array:
    """x with its channel pairs turned, in float32, returned in x's type; its gradient is turned back."""
    half = x_BTHC.shape[-1] // 2
    a, b = x_BTHC[..., :half].astype(jnp.float32), x_BTHC[..., half:].astype(jnp.float32)
    turned = [a * by.cos_BT1C - b * by.sin_BT1C, b * by.cos_BT1C + a * by.sin_BT1C]
    return jnp.concatenate(turned, axis=-1).astype(x_BTHC.dtype)


def _rotate_forward(x_BTHC: Array, by: Angles) -> tuple[Array, Angles]:
    return rotate(x_BTHC, by), by


def _rotate_backward(by: Angles, dy_BTHC: Array) -> tuple[Array, Angles]:
    # The angles depend on positions alone, which nothing trains.
    return rotate(dy_BTHC, Angles(by.cos_BT1C, -by.sin_BT1C)), jax.tree.map(jnp.zeros_like, by)


rotate.defvjp(_rotate_forward, _rotate_backward)
