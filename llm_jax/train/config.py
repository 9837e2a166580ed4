"""The loop's, the mesh's, the checkpoints' and the log's sections of a run."""

from typing import Annotated

from annotated_types import Ge, MinLen

from llm_jax.config import Config, ConfigError


class MeshConfig(Config):
    """Sizes of the mesh axes; 1 is off, and one may be -1 (the rest of the devices)."""

    data: Annotated[int, Ge(-1)] = -1
    """Copies of the model, each with its own rows."""
    fsdp: Annotated[int, Ge(-1)] = 1
    """Weights and optimizer state are divided over this axis, rows too."""
    tensor: Annotated[int, Ge(-1)] = 1
    """Heads, feed-forward and vocabulary are divided over this axis."""
    context: Annotated[int, Ge(-1)] = 1
    """Positions of a row are divided over this axis."""
    expert: Annotated[int, Ge(-1)] = 1
    """Experts are divided over this axis, rows too."""


class TrainConfig(Config):
    """How long, and with how many rows at a time."""

    steps: Annotated[int, Ge(1)] = 1000
    """Optimizer updates of the whole run."""
    batch_rows: Annotated[int, Ge(1)] = 16
    """Rows of one update, over all devices and microbatches."""
    accumulation: Annotated[int, Ge(1)] = 1
    """Microbatches of one update; divides batch_rows."""
    init_from: Annotated[str, MinLen(1)] | None = None
    """Run directory whose newest weights start this run (weights only; step 0, a fresh optimizer)."""

    def check(self) -> None:
        """Raises ConfigError where two fields contradict each other."""
        if self.batch_rows % self.accumulation:
            raise ConfigError(
                f"train.batch_rows = {self.batch_rows} is not divisible by train.accumulation = {self.accumulation}"
            )


class CheckpointConfig(Config):
    """When to save, and what to keep."""

    every: Annotated[int, Ge(1)] = 500
    """Save after every so many updates; the last update is always saved."""
    keep: Annotated[int, Ge(1)] = 3
    """The newest so many are kept."""


class LoggingConfig(Config):
    """What is printed and recorded."""

    every: Annotated[int, Ge(1)] = 10
    """Print every so many updates; metrics.jsonl always has them all."""
    tensorboard: bool = True
    """Write TensorBoard files too."""
    profile_start: Annotated[int, Ge(1)] | None = None
    """First update of the profiler's window; null is off."""
    profile_steps: Annotated[int, Ge(1)] = 3
    """Updates in the profiler's window."""
