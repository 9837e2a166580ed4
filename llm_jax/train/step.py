"""One update, as a pure function: a batch's rows in, the next state and what to report out."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from llm_jax.batch import Batch, row_keys
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import abstract_model
from llm_jax.model.weights import matrices
from llm_jax.objective import loss as objectives
from llm_jax.objective.config import ObjectiveConfig
from llm_jax.optim.config import OptimConfig
from llm_jax.optim.optimizer import clip_scale, learning_rate, transform
from llm_jax.train.config import DEFAULT_SPIKES, SpikesConfig
from llm_jax.train.spikes import judge
from llm_jax.train.state import TrainState, sharded_update

Metrics = dict[str, Array]
Sums = dict[str, Array]
Loads = dict[str, Array]

# What a key is for: draws for different purposes share nothing.
MASKING = 1


class Summed(NamedTuple):
    """What simply adds up over microbatches."""

    gradient: nnx.State
    statistics: Sums
    loads: Loads
    """Tokens that chose each expert, int32 [L, E], by the layers' place."""


def make_step(
    cfg: ModelConfig,
    objective: ObjectiveConfig,
    optim: OptimConfig,
    *,
    steps: int,
    cross_documents: bool,
    seed: int,
    word_starts_V: np.ndarray,
    spikes: SpikesConfig = DEFAULT_SPIKES,
) -> Callable[[TrainState, Array], tuple[TrainState, Metrics]]:
    """The function (state, rows_ABU) -> (state, metrics), to be jitted under the mesh it is called for.

    rows_ABU: int32 rows of U = T + 1 tokens; word_starts_V: Tokenizer.word_starts. Metrics are replicated
    scalars: loss (nats a token), accuracy, z_loss, grad_norm (before clipping), lr, tokens (weighted), batch_index,
    batch_hash (uint32), finite and spike (bool), skipped and rollbacks (so far), skips and first_skip (spikes.Judged);
    with experts those of `health` too.
    An update that is not finite, or a spike, leaves weights, balance and optimizer as they were.
    """
    gradient_of = make_gradient(cfg, objective, cross_documents=cross_documents, seed=seed, word_starts_V=word_starts_V)

    def step(state: TrainState, rows_ABU: Array) -> tuple[TrainState, Metrics]:
        (gradient, sums, loads), weights = gradient_of(state, rows_ABU)
        norm = optax.tree.norm(gradient)
        gradient = jax.tree.map(lambda g: g * clip_scale(norm, optim).astype(g.dtype), gradient)
        update = sharded_update(transform(optim, matrices(state.params)), state)
        direction, opt_state = update(gradient, state.opt_state, state.params)
        lr = learning_rate(optim, state.step, steps)
        params = jax.tree.map(lambda p, d: p - lr * d, state.params, direction)

        metrics = {name: divide(value, weights[name]) for name, value in sums.items()}
        judged = judge(state.recent, state.step, metrics["loss"], norm, spikes)
        before = (state.params, state.balance, state.opt_state)
        after = (params, rebalanced(state.balance, loads, cfg), opt_state)
        kept = jax.tree.map(lambda new, old: jnp.where(judged.healthy, new, old), after, before)
        skipped = state.skipped + ~judged.healthy
        metrics |= {
            "grad_norm": norm,
            "lr": lr,
            "tokens": weights["loss"].astype(jnp.int32),
            "batch_index": state.batch_index,
            "batch_hash": batch_hash(rows_ABU, state.batch_index),
            "finite": judged.finite,
            "spike": judged.spike,
            "skipped": skipped,
            "rollbacks": state.rollbacks,
            "skips": judged.skips,
            "first_skip": judged.first_skip,
        }
        if loads:
            metrics |= health(loads)
        counts = (state.step + 1, state.batch_index + 1, skipped, state.rollbacks)
        return TrainState(*counts, judged.recent, *kept), metrics

    return step


def make_gradient(
    cfg: ModelConfig, objective: ObjectiveConfig, *, cross_documents: bool, seed: int, word_starts_V: np.ndarray
) -> Callable[[TrainState, Array], tuple[Summed, Sums]]:
    """The function (state, rows_ABU) -> (gradient and statistics, what each term was divided by)."""

    def gradient_of(state: TrainState, rows_ABU: Array) -> tuple[Summed, Sums]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.batch_index), MASKING)
        keys_AB = row_keys(key, 0, *rows_ABU.shape[:2])
        batch_A = objectives.make_batch(rows_ABU, keys_AB, objective, word_starts_V, cross_documents=cross_documents)
        weights = objectives.weights(batch_A, cfg)
        return gradient_sums(state.params, state.balance, batch_A, weights, cfg, objective), weights

    return gradient_of


def gradient_sums(
    params: nnx.State, balance: nnx.State, batch_A: Batch, weights: Sums, cfg: ModelConfig, objective: ObjectiveConfig
) -> Summed:
    """The gradient of the whole batch's loss, of the parameters' types, and the statistics' and the loads' sums.

    Every term is divided by its weight over the whole batch, which is objectives.weights(batch_A, cfg), before
    differentiating: so the gradients of the microbatches simply add.
    """
    graph = abstract_model(cfg).graph

    def loss(params: nnx.State, batch: Batch) -> tuple[Array, tuple[Sums, Loads]]:
        losses, statistics, loads = objectives.sums(nnx.merge(graph, params, balance), batch, cfg, objective)
        shares = [divide(value, weights[name]) for name, value in losses.items()]
        return functools.reduce(jnp.add, shares), (statistics, loads)

    def summed(batch: Batch) -> Summed:
        gradient, (statistics, loads) = jax.grad(loss, has_aux=True)(params, batch)
        return Summed(gradient, statistics, loads)

    first = jax.tree.map(lambda x: x[0], batch_A)
    if batch_A.tokens_BT.shape[0] == 1:
        return summed(first)

    def add(total: Summed, batch: Batch) -> tuple[Summed, None]:
        return jax.tree.map(jnp.add, total, summed(batch)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(summed, first))
    total, _ = jax.lax.scan(add, zeros, batch_A)
    return total


def rebalanced(balance: nnx.State, loads: Loads, cfg: ModelConfig) -> nnx.State:
    """Each expert's choice bias, one step nearer to even load (Wang et al. 2024).

    Loads are whole numbers over all microbatches and devices, so the direction is exact on every mesh.
    """

    def moved(path: tuple, bias: Array) -> Array:
        assert cfg.moe is not None
        # The bias of a layer's place is found under the place's name, stacked as the place's loads are.
        names = [str(getattr(key, "key", key)) for key in path]
        load = loads[next(name for name in names if name in loads)].reshape(bias.shape)
        # Above or below the mean, without a division: E * load against the sum of loads.
        excess = load * cfg.moe.experts - jnp.sum(load, axis=-1, keepdims=True)
        return bias - cfg.moe.balance_rate * jnp.sign(excess).astype(bias.dtype)

    return jax.tree_util.tree_map_with_path(moved, balance)


def health(loads: Loads) -> Metrics:
    """load_max_over_mean, of the worst layer, and expert_load [E], each expert's share of all layers' choices."""
    load_LE = jnp.concatenate(list(loads.values())).astype(jnp.float32)
    total_L = jnp.sum(load_LE, axis=-1)
    worst = jnp.max(jnp.max(load_LE, axis=-1) * load_LE.shape[-1] * divide(jnp.ones(()), total_L))
    return {
        "load_max_over_mean": worst,
        "expert_load": jnp.sum(load_LE, axis=0) * divide(jnp.ones(()), jnp.sum(total_L)),
    }


def divide(value: Array, weight: Array) -> Array:
    """value / weight; a term without weight contributes 0."""
    return value * jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)


def batch_hash(rows_ABU: Array, batch_index: Array) -> Array:
    """A uint32 checksum over (row index, position, token) of the global batch, the same for any number of processes."""
    A, B, U = rows_ABU.shape

    def index(axis: int) -> Array:
        return jax.lax.broadcasted_iota(jnp.uint32, (A, B, U), axis, out_sharding=acts("ABU"))

    row_ABU = batch_index.astype(jnp.uint32) * jnp.uint32(A * B) + index(0) * jnp.uint32(B) + index(1)
    return jnp.sum(mix(mix(mix(row_ABU) + index(2)) + rows_ABU.astype(jnp.uint32)), dtype=jnp.uint32)


def mix(x: Array) -> Array:
    """A bijection of uint32 in which every input bit moves every output bit (MurmurHash3's finaliser, Appleby 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
