"""What a step minimises: every term a (sum, weight), and every weight a function of the batch alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llm_jax.batch import Batch
from llm_jax.data.config import PAD_ID
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.moe import Routing
from llm_jax.model.transformer import Transformer
from llm_jax.objective import causal, mlm
from llm_jax.objective.config import CausalConfig, MlmConfig, ObjectiveConfig
from llm_jax.objective.cross_entropy import cross_entropy_sums

Sums = dict[str, Array]


def make_batch(
    rows_ABU: Array, keys_AB: Array, objective: ObjectiveConfig, word_starts_V: np.ndarray, *, cross_documents: bool
) -> Batch:
    """Rows of U = T + 1 tokens as what the model reads and is asked.

    keys_AB: a key a row, from which everything random is drawn; word_starts_V: Tokenizer.word_starts.
    """
    match objective:
        case CausalConfig():
            return causal.make_batch(rows_ABU, cross_documents)
        case MlmConfig():
            return mlm.make_batch(rows_ABU, keys_AB, objective, word_starts_V, cross_documents)


def weights(batch: Batch, cfg: ModelConfig) -> Sums:
    """The weight of every loss and statistic, float32 scalars over all microbatches in the batch."""
    predicted = jnp.sum(batch.weights_BN)
    totals = {"cross_entropy": predicted, "loss": predicted, "z_loss": predicted, "accuracy": predicted}
    if cfg.n_moe_layers == 0:
        return totals
    real_BT = batch.tokens_BT != PAD_ID
    tokens = jnp.sum(real_BT.astype(jnp.float32)) * cfg.n_moe_layers
    rows = jnp.sum(jnp.any(real_BT, axis=-1).astype(jnp.float32)) * cfg.n_moe_layers
    return totals | {"load_balance": rows, "router_z": tokens, "router_entropy": tokens, "dropped": tokens * top_k(cfg)}


def sums(
    model: Transformer, batch: Batch, cfg: ModelConfig, objective: ObjectiveConfig
) -> tuple[Sums, Sums, dict[str, Array]]:
    """One microbatch's loss sums, coefficients included, to be differentiated; its statistics' sums; routers' loads.

    Losses: cross_entropy (nats plus the z-loss), and with experts load_balance and router_z. Statistics: loss (nats),
    z_loss (squared log-normalisers), accuracy (right first guesses), and with experts load_balance, router_z,
    router_entropy and dropped. Loads: tokens that chose each expert, int32 [L, E], by the layers' place.
    """
    is_causal = isinstance(objective, CausalConfig)
    x_BTD, routing = model(batch.tokens_BT, batch.segments_BT, batch.positions_BT, cfg, causal=is_causal)
    x_BND = x_BTD if batch.places_BN is None else at_places(x_BTD, batch.places_BN)
    total, parts = cross_entropy_sums(x_BND, model.head(cfg), batch.targets_BN, batch.weights_BN, cfg, objective.z_loss)
    losses = {"cross_entropy": total}
    statistics = {"loss": parts.nll, "z_loss": parts.z_squared, "accuracy": parts.correct}
    if cfg.moe is not None:
        health = routing_sums(routing)
        losses["load_balance"] = cfg.moe.load_balance * health["load_balance"]
        losses["router_z"] = cfg.moe.router_z * health["router_z"]
        statistics |= jax.lax.stop_gradient(health)
    return losses, statistics, {name: place.load_LE for name, place in routing.items()}


def routing_sums(routing: dict[str, Routing]) -> Sums:
    """Sums over all layers with experts; float32 scalars."""

    def total(field: str) -> Array:
        return sum((jnp.sum(getattr(place, field)).astype(jnp.float32) for place in routing.values()), jnp.zeros(()))

    fields = {"load_balance": "load_balance", "router_z": "router_z", "router_entropy": "entropy", "dropped": "dropped"}
    return {name: total(field) for name, field in fields.items()}


def at_places(x_BTD: Array, places_BN: Array) -> Array:
    """The hidden states x_BND at the predicted places, N sharded over context."""

    def local(x_BSD: Array, places_BN: Array) -> Array:
        return jax.vmap(lambda x_SD, places_N: x_SD.at[places_N].get(mode="clip"))(x_BSD, places_BN)

    # Any place may be predicted: here rows come together over context, and their gradients are added up over it.
    x_BSD = jax.reshard(x_BTD, acts("BSD"))
    return jax.shard_map(local, in_specs=(acts("BSD"), acts("BN")), out_specs=acts("BND"))(x_BSD, places_BN)


def top_k(cfg: ModelConfig) -> int:
    """Experts that a token chooses."""
    assert cfg.moe is not None
    return cfg.moe.top_k
