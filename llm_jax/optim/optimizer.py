"""The optimizer as optax transforms without a learning rate: the step multiplies by it, since it follows `step`."""

from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from llm_jax.optim.config import OptimConfig


def transform(cfg: OptimConfig, decayed: Any) -> optax.GradientTransformation:
    """Gradients to descent directions; decayed says of each weight whether weight decay touches it."""
    return optax.chain(
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, decayed),
    )


def learning_rate(cfg: OptimConfig, step: Array, steps: int) -> Array:
    """The rate of the update that follows `step` finished ones, of `steps` in all; float32.

    Warm-up rises from lr / warmup_steps at the first update to lr at the last of them.
    wsd is warm-up, stable, linear decay (MiniCPM, Hu et al. 2024).
    """
    done = step.astype(jnp.float32)
    final = cfg.final_lr_share
    left = max(1, steps - 1 - cfg.warmup_steps)
    progress = jnp.clip((done - cfg.warmup_steps) / left, 0.0, 1.0)
    match cfg.schedule:
        case "constant":
            shape = jnp.ones_like(done)
        case "linear":
            shape = 1 - (1 - final) * progress
        case "cosine":
            shape = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        case "wsd":
            falling = (done - (steps - 1 - cfg.decay_steps)) / max(1, cfg.decay_steps)
            shape = 1 - (1 - final) * jnp.clip(falling, 0.0, 1.0)
    warm = (done + 1) / max(1, cfg.warmup_steps)
    return cfg.lr * jnp.where(done < cfg.warmup_steps, warm, shape)


def clip_scale(norm: Array, cfg: OptimConfig) -> Array:
    """What to multiply a gradient of this global norm by, so that it is at most clip_norm."""
    if cfg.clip_norm is None:
        return jnp.ones_like(norm)
    return jnp.minimum(1.0, cfg.clip_norm / jnp.maximum(norm, 1e-30))
