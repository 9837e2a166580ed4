"""The optimizer's section of a run."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from llm_jax.config import Config, ConfigError


class AdamWConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) with global-norm clipping; vectors are never decayed."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate."""
    b1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the first moment."""
    b2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decoupled decay of matrices, times the learning rate."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Largest global gradient norm; null is off."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape after the warm-up; wsd is warm-up, stable, decay."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps of linear warm-up from 0."""
    decay_steps: Annotated[int, Ge(0)] = 0
    """wsd only: length of the final linear decay."""
    final_lr_share: Annotated[float, Ge(0), Le(1)] = 0.1
    """The last learning rate as a share of the peak; not used by constant."""

    def check(self, steps: int) -> None:
        """Raises ConfigError where the schedule does not fit into train.steps."""
        if self.warmup_steps + self.decay_steps > steps:
            raise ConfigError(
                f"optim.warmup_steps + optim.decay_steps = {self.warmup_steps + self.decay_steps} "
                f"is more than train.steps = {steps}"
            )
        if self.decay_steps and self.schedule != "wsd":
            raise ConfigError(f"optim.decay_steps is for optim.schedule=wsd; the schedule is {self.schedule}")


OptimConfig = AdamWConfig
