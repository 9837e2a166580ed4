"""One update, as a pure function: a batch's rows in, the next state and what to report out."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from llm_jax.batch import Batch
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import abstract_model
from llm_jax.model.weights import matrices
from llm_jax.objective import causal
from llm_jax.objective.config import ObjectiveConfig
from llm_jax.optim.config import OptimConfig
from llm_jax.optim.optimizer import clip_scale, learning_rate, transform
from llm_jax.train.state import TrainState, sharded_update

Metrics = dict[str, Array]
Sums = dict[str, Array]


def make_step(
    cfg: ModelConfig, objective: ObjectiveConfig, optim: OptimConfig, *, steps: int, cross_documents: bool
) -> Callable[[TrainState, Array], tuple[TrainState, Metrics]]:
    """The function (state, rows_ABU) -> (state, metrics), to be jitted under the mesh it is called for.

    rows_ABU: int32 rows of U = T + 1 tokens. Metrics are replicated scalars: loss (nats a token), accuracy, z_loss,
    grad_norm (before clipping), lr, tokens (weighted), batch_hash (uint32), finite (bool) and skipped (so far).
    A non-finite loss or gradient leaves weights and optimizer as they were.
    """

    def step(state: TrainState, rows_ABU: Array) -> tuple[TrainState, Metrics]:
        batch_A = causal.make_batch(rows_ABU, cross_documents)
        weights = causal.weights(batch_A)
        gradient, sums = gradient_sums(state.params, batch_A, weights, cfg, objective)

        norm = optax.tree.norm(gradient)
        gradient = jax.tree.map(lambda g: g * clip_scale(norm, optim).astype(g.dtype), gradient)
        update = sharded_update(transform(optim, matrices(state.params)), state)
        direction, opt_state = update(gradient, state.opt_state, state.params)
        lr = learning_rate(optim, state.step, steps)
        params = jax.tree.map(lambda p, d: p - lr * d, state.params, direction)

        metrics = {name: divide(value, weights[name]) for name, value in sums.items()}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = state.skipped + ~finite
        metrics |= {
            "grad_norm": norm,
            "lr": lr,
            "tokens": weights["loss"].astype(jnp.int32),
            "finite": finite,
            "skipped": skipped,
        }
        metrics["batch_hash"] = batch_hash(rows_ABU, state.batch_index)
        return TrainState(state.step + 1, state.batch_index + 1, skipped, params, opt_state), metrics

    return step


def gradient_sums(
    params: nnx.State, batch_A: Batch, weights: Sums, cfg: ModelConfig, objective: ObjectiveConfig
) -> tuple[nnx.State, Sums]:
    """The gradient of the whole batch's loss, of the parameters' types, and the statistics' sums.

    Every term is divided by its weight over the whole batch, causal.weights(batch_A), before differentiating: so the
    gradients of the microbatches simply add.
    """
    graph, _ = abstract_model(cfg)

    def loss(params: nnx.State, batch: Batch) -> tuple[Array, Sums]:
        losses, statistics = causal.sums(nnx.merge(graph, params), batch, cfg, objective)
        shares = [divide(value, weights[name]) for name, value in losses.items()]
        return functools.reduce(jnp.add, shares), statistics

    gradient_of = jax.grad(loss, has_aux=True)
    first = jax.tree.map(lambda x: x[0], batch_A)
    if batch_A.tokens_BT.shape[0] == 1:
        return gradient_of(params, first)

    def add(total: tuple[nnx.State, Sums], batch: Batch) -> tuple[tuple[nnx.State, Sums], None]:
        return jax.tree.map(jnp.add, total, gradient_of(params, batch)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient_of, params, first))
    total, _ = jax.lax.scan(add, zeros, batch_A)
    return total


def divide(value: Array, weight: Array) -> Array:
    """value / weight; a term without weight contributes 0."""
    return value * jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)


def batch_hash(rows_ABU: Array, batch_index: Array) -> Array:
    """A uint32 checksum over (row index, position, token) of the global batch, the same for any number of processes."""
    A, B, U = rows_ABU.shape

    def index(axis: int) -> Array:
        return jax.lax.broadcasted_iota(jnp.uint32, (A, B, U), axis, out_sharding=acts("ABU"))

    row_ABU = batch_index.astype(jnp.uint32) * jnp.uint32(A * B) + index(0) * jnp.uint32(B) + index(1)
    return jnp.sum(_mix(_mix(_mix(row_ABU) + index(2)) + rows_ABU.astype(jnp.uint32)), dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """A bijection of uint32 in which every input bit moves every output bit (MurmurHash3's finaliser, Appleby 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
