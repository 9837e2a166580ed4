"""The loop's, the mesh's, the checkpoints' and the log's sections of a run."""

from typing import Annotated

from annotated_types import Ge, Gt, MinLen

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
    slices: Annotated[int, Ge(1)] | None = None
    """Groups of devices that only a slow network joins; null is what the devices say. It carries data, then fsdp."""


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

    replay_every: Annotated[int, Ge(1)] | None = None
    """Every so many updates the gradient is computed twice and its bits compared: a bad chip shows; null is off."""

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
    """The newest so many of those are kept."""
    minutes: Annotated[float, Gt(0)] | None = 30.0
    """Save too when nothing was saved for so many minutes; such a one goes when the next is whole. Null is off."""
    permanent_every: Annotated[int, Ge(1)] | None = None
    """Save after every so many updates for good: these are never removed. Null is off."""


class SpikesConfig(Config):
    """Updates that would do harm are skipped; where they are too many, the run goes back to before the first."""

    sigma: Annotated[float, Gt(0)] | None = 6.0
    """Skip updates whose loss or gradient norm is so many deviations over its mean; null: non-finite ones only."""
    window: Annotated[int, Ge(4)] = 128
    """Updates that mean and deviation are taken over; half of them have to be there first."""
    skips: Annotated[int, Ge(1)] = 10
    """So many skipped updates in a window are too many: back to the checkpoint before, and on with the next batches."""
    rollbacks: Annotated[int, Ge(0)] = 2
    """So often it goes back; then the run is given up with exit code 70."""

    def check(self) -> None:
        """Raises ConfigError where two fields contradict each other."""
        if self.skips > self.window:
            raise ConfigError(f"spikes.skips = {self.skips} is more than spikes.window = {self.window}")


DEFAULT_SPIKES = SpikesConfig()


class WatchdogConfig(Config):
    """When a run that does not move is given up for a restart (exit code 76), and by whom."""

    factor: Annotated[float, Gt(1)] = 20.0
    """A step may take so many times the running median of steps, but at least floor_s; then grace_s more."""
    floor_s: Annotated[float, Gt(0)] = 180.0
    """Seconds that any step may take."""
    grace_s: Annotated[float, Ge(0)] = 30.0
    """Seconds over that before the alarm."""
    join_s: Annotated[int, Ge(1)] = 300
    """Seconds to wait for the job's other processes at the start."""
    prepare_s: Annotated[float, Gt(0)] = 7 * 24 * 3600.0
    """Seconds that preparing the data may take."""
    restore_s: Annotated[float, Gt(0)] = 3600.0
    """Seconds that making or restoring the state may take."""
    compile_s: Annotated[float, Gt(0)] = 3600.0
    """Seconds that a compilation may take, the first step and the first look at held-out rows too."""
    checkpoint_s: Annotated[float, Gt(0)] = 1800.0
    """Seconds that a save may hold up the loop."""
    heartbeat_s: Annotated[int, Ge(1)] = 600
    """JAX's own limit, which names nobody: a process that is silent for so long ends the job. Longer than a step's."""


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
