"""The training state: one tree, born sharded, and the form in which a checkpoint names its parts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Transformer, split
from llm_jax.model.weights import matrices
from llm_jax.optim.config import OptimConfig
from llm_jax.optim.optimizer import transform
from llm_jax.train.config import DEFAULT_SPIKES, SpikesConfig
from llm_jax.train.spikes import Recent, none_yet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: updates made, skipped ones too; batch_index: the next batch, which a rollback moves on alone; int32.

    skipped: updates not made, so far; rollbacks: how often the run went back; recent: what spikes are judged by;
    balance: the routers' choice biases, which the optimizer does not know; empty for a dense model.
    """

    step: Array
    batch_index: Array
    skipped: Array
    rollbacks: Array
    recent: Recent
    params: nnx.State
    balance: nnx.State
    opt_state: Any


def init_state(cfg: ModelConfig, optim: OptimConfig, seed: int, spikes: SpikesConfig = DEFAULT_SPIKES) -> TrainState:
    """The state before the first update, born sharded, the same on every mesh. For use in jit or eval_shape."""
    _, params, balance = split(Transformer(cfg, nnx.Rngs(params=jax.random.key(seed))))
    return with_weights(params, balance, optim, spikes)


def with_weights(
    params: nnx.State, balance: nnx.State, optim: OptimConfig, spikes: SpikesConfig = DEFAULT_SPIKES
) -> TrainState:
    """A state at step 0 that starts from given weights."""
    zero = jnp.zeros((), jnp.int32)
    opt_state = transform(optim, matrices(params)).init(params)
    return TrainState(zero, zero, zero, zero, none_yet(spikes), params, balance, opt_state)


def abstract_state(cfg: ModelConfig, optim: OptimConfig, spikes: SpikesConfig = DEFAULT_SPIKES) -> TrainState:
    """init_state's result as shapes with shardings; needs a mesh, allocates nothing."""
    return jax.eval_shape(lambda: init_state(cfg, optim, 0, spikes))


def sharded_update(tx: optax.GradientTransformation, state: TrainState) -> Any:
    """tx.update on any mesh: some optax transforms know no explicit axes, so they run under automatic ones."""
    placement = jax.tree.map(lambda x: jax.typeof(x).sharding, (state.params, state.opt_state))
    return jax.sharding.auto_axes(tx.update, out_sharding=placement)
