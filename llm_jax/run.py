"""A run is one frozen value: every section's config, the checks across them, and the numbers that follow from them.

Imports no jax: `llm-jax config` answers without it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Lt, MinLen

from llm_jax import alphabet
from llm_jax.config import Config, ConfigError, load, override
from llm_jax.data import config as data_config
from llm_jax.data.config import DataConfig, TokenizerConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import ModelConfig
from llm_jax.objective import config as objective_config
from llm_jax.objective.config import CausalConfig, ObjectiveConfig
from llm_jax.optim.config import AdamWConfig, OptimConfig
from llm_jax.train.config import CheckpointConfig, LoggingConfig, MeshConfig, SpikesConfig, TrainConfig, WatchdogConfig

# What may differ when a run goes on; everything else shapes the loss curve.
FREE_TO_CHANGE = (
    "run_dir",
    "name",
    "mesh",
    "checkpoint",
    "watchdog",
    "eval",
    "logging",
    "data.prefetch",
    "data.dir",
    "train.replay_every",
    "train.accumulation",
)


class Run(Config):
    """Everything that determines a run; it travels inside the checkpoint."""

    name: Annotated[str, MinLen(1)] = "run"
    """What the run is called in reports."""
    run_dir: Annotated[str, MinLen(1)] = "runs/run"
    """Where the run's files go."""
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0
    """Everything random follows from it."""
    model: ModelConfig = ModelConfig()
    """The transformer."""
    data: DataConfig = DataConfig()
    """Which text, and how it becomes rows."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    objective: ObjectiveConfig = CausalConfig()
    """What is predicted."""
    optim: OptimConfig = AdamWConfig()
    """How the weights move."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work; never changes the result."""
    train: TrainConfig = TrainConfig()
    """How long, and with how many rows at a time."""
    spikes: SpikesConfig = SpikesConfig()
    """Bad updates: skipped, and gone back past."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, and what to keep."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """When a run that does not move is given up for a restart."""
    eval: EvalConfig = EvalConfig()
    """Looking at held-out text."""
    logging: LoggingConfig = LoggingConfig()
    """What is printed and recorded."""

    @property
    def tokens_per_step(self) -> int:
        """Positions of one update, padding and document borders included."""
        return self.train.batch_rows * self.data.seq_len


def from_command_line(path: str | Path, overrides: Sequence[str]) -> Run:
    """The run of a config file with its path=value overrides, checked. Raises ConfigError, a line for each mistake."""
    run = override(load(path, Run), overrides)
    check(run)
    return run


def check(run: Run) -> None:
    """Raises ConfigError where sections contradict each other; needs no device."""
    run.model.check()
    if 0 < run.model.learned_positions < run.data.seq_len:
        raise ConfigError(
            f"data.seq_len = {run.data.seq_len} is more than model.learned_positions = {run.model.learned_positions}"
        )
    data_config.check(run.data)
    objective_config.check(run.objective)
    run.train.check()
    run.spikes.check()
    run.optim.check(run.train.steps)
    run.eval.check(run.data.seq_len)
    check_axes(run.mesh)
    # An axis of -1 is checked when the devices are known; what is known now is checked now.
    check_mesh(run, {axis: max(size, 1) for axis, size in axis_sizes(run.mesh).items()})


def axis_sizes(mesh: MeshConfig) -> dict[str, int]:
    """The size of each axis as it was asked for, -1 for the rest."""
    return {axis: getattr(mesh, axis) for axis in alphabet.MESH_AXES}


def check_axes(mesh: MeshConfig) -> None:
    """Raises ConfigError where the axes make no mesh on any number of devices."""
    sizes = axis_sizes(mesh)
    for axis, size in sizes.items():
        if size == 0:
            raise ConfigError(f"mesh.{axis} = 0; an axis has at least 1 device (1 is off, -1 is the rest)")
    if len([axis for axis, size in sizes.items() if size == -1]) > 1:
        raise ConfigError(f"mesh: more than one axis is -1 ({', '.join(a for a, s in sizes.items() if s == -1)})")


def mesh_sizes(mesh: MeshConfig, n_devices: int) -> dict[str, int]:
    """Axis sizes for n_devices, -1 resolved. Raises ConfigError where they do not fit."""
    sizes = axis_sizes(mesh)
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            if n_devices % known or n_devices < known:
                raise ConfigError(f"mesh.{axis} = -1: {n_devices} devices are not divisible by the other axes' {known}")
            sizes[axis] = n_devices // known
    if math.prod(sizes.values()) > n_devices:
        raise ConfigError(
            f"mesh needs {math.prod(sizes.values())} devices ({_product(sizes)}), and there are {n_devices}"
        )
    if mesh.slices is not None:
        alphabet.over_slices(sizes, mesh.slices)
    return sizes


def check_mesh(run: Run, sizes: dict[str, int]) -> None:
    """Raises ConfigError where a size of the run is not divisible by its mesh axes."""
    check_weights(run.model, sizes)
    microbatch = ("train.batch_rows / train.accumulation", run.train.batch_rows // run.train.accumulation)
    alphabet.check_divisible({"B": microbatch, "T": ("data.seq_len", run.data.seq_len)}, sizes, alphabet.ACT_AXES)
    alphabet.check_divisible({"B": ("eval.batch_rows", run.eval.batch_rows)}, sizes, alphabet.ACT_AXES)


def check_weights(model: ModelConfig, sizes: dict[str, int]) -> None:
    """Raises ConfigError where a weight is not divisible by the mesh axes that it is sharded over."""
    alphabet.check_divisible(
        {
            "D": ("model.d_model", model.d_model),
            "F": ("model.d_ff", model.d_ff),
            "H": ("model.n_heads", model.n_heads),
            "K": ("model.n_kv_heads", model.n_kv_heads),
            "V": ("model.vocab_size, padded to a multiple of 128,", model.padded_vocab_size),
        },
        sizes,
        alphabet.WEIGHT_AXES,
    )
    if model.moe is not None:
        experts = {"E": ("model.moe.experts", model.moe.experts), "F": ("model.moe.d_ff", model.moe.d_ff)}
        alphabet.check_divisible(experts, sizes, alphabet.WEIGHT_AXES)
        shared = {"F": ("model.moe.shared_d_ff", model.moe.shared_d_ff)}
        alphabet.check_divisible(shared, sizes, alphabet.WEIGHT_AXES)


def _product(sizes: dict[str, int]) -> str:
    return " * ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"
