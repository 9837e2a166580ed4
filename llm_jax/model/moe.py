"""Mixtures of experts: a router chooses, tokens go to their experts' devices, experts multiply, results come back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, P

from llm_jax.config import ConfigError
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig, MoeConfig
from llm_jax.model.experts import Choices, ExpertWeights, apply_experts
from llm_jax.model.grouped_matmul import KERNELS
from llm_jax.model.mlp import Mlp
from llm_jax.model.weights import Balance, Weight, matrix, residual_scale, stored

# Added to a sum of scores before something is divided by it, as in DeepSeek-V3: scores can all be 0.
TINY = 1e-20


class Routing(NamedTuple):
    """What the routers of layers that share a place did, L layers stacked in front; tokens are those of documents.

    A layer makes its own without L, and whoever runs the layers stacks and adds up.
    """

    load_LE: Array
    """Tokens that chose each expert, int32."""
    load_balance: Array
    """The load-balance loss, a float32 sum over rows and layers; the only field with a gradient beside router_z."""
    router_z: Array
    """Squared log-normalisers of router logits, a float32 sum over tokens and layers."""
    entropy: Array
    """Entropies of the routers' scores in nats, a float32 sum over tokens and layers."""
    dropped: Array
    """Choices that found their expert full, an int32 sum over layers."""
    experts_LBTX: Array
    """The chosen experts, int32, best first; for who looks inside, and removed by XLA where nobody does."""
    gates_LBTX: Array
    """Their gates, float32, without a gradient; as experts_LBTX."""


def resolve_moe(moe: MoeConfig, platform: str, expert_axis: int) -> MoeConfig:
    """The section with what depends on platform (cpu, gpu, tpu) and mesh.expert settled.

    Raises ConfigError for what the platform does not have.
    """
    on_cpu = platform == "cpu"
    if on_cpu and moe.exchange == "ragged_all_to_all":
        raise ConfigError(
            "model.moe.exchange = 'ragged_all_to_all' does not run on a CPU; all_gather and all_to_all do"
        )
    kernel = KERNELS.get(platform)
    if moe.grouped_matmul in ("tiled", "mosaic") and moe.grouped_matmul != kernel:
        made_for = {"tiled": "GPUs", "mosaic": "TPUs"}[moe.grouped_matmul]
        there_are = ", ".join([kernel, "blocked"] if kernel else ["blocked"])
        raise ConfigError(
            f"model.moe.grouped_matmul = '{moe.grouped_matmul}' is a kernel for {made_for}, and this is a {platform}; "
            f"there are {there_are} and ragged"
        )
    grouped_matmul, exchange = moe.grouped_matmul, moe.exchange
    if moe.capacity_factor is not None:
        return moe.model_copy(update={"grouped_matmul": "einsum", "exchange": "all_to_all"})
    if grouped_matmul == "auto":
        grouped_matmul = kernel or "blocked"
    if exchange == "auto":
        # Gathering sends every token to every device of the group, and a token has top_k choices. Buffers that can drop
        # nothing are as large as all tokens for each device, so all_to_all never sends less than all_gather.
        exchange = "ragged_all_to_all" if platform == "tpu" and expert_axis > moe.top_k else "all_gather"
    return moe.model_copy(update={"grouped_matmul": grouped_matmul, "exchange": exchange})


class Moe(nnx.Module):
    """A router, experts, and perhaps an MLP beside them that every token passes."""

    bias: Balance | None

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        assert cfg.moe is not None
        dims = cfg.expert_dims
        self.router = matrix("DE", dims, rngs, fan_in="D")
        if cfg.gated:
            self.gate = matrix("EDF", dims, rngs, fan_in="D")
        self.up = matrix("EDF", dims, rngs, fan_in="D")
        self.down = matrix("EFD", dims, rngs, fan_in="F", scale=residual_scale(cfg))
        zeros_E = jnp.zeros((cfg.moe.experts,), jnp.float32, out_sharding=P(None))
        self.bias = Balance(zeros_E) if cfg.moe.balance_rate > 0 else None
        if cfg.moe.shared_d_ff > 0:
            self.shared = Mlp(cfg, cfg.moe.shared_d_ff, rngs, biased=False)

    def __call__(self, x_BTD: Array, real_BT: Array, cfg: ModelConfig) -> tuple[Array, Routing]:
        """The part that this adds to the residual stream, and what the router did, without L.

        x_BTD normed, in the compute type; real_BT: tokens that are no padding.
        """
        assert cfg.moe is not None
        logits_BTE = router_logits(x_BTD, self.router)
        scores_BTE = jax.nn.softmax(logits_BTE) if cfg.moe.scores == "softmax" else jax.nn.sigmoid(logits_BTE)
        choices = choose(scores_BTE, None if self.bias is None else self.bias[...], cfg.moe)
        weights = ExpertWeights(
            stored(self.gate, cfg) if cfg.gated else None, stored(self.up, cfg), stored(self.down, cfg)
        )
        y_BTD, dropped = apply_experts(x_BTD, choices, real_BT, weights, cfg)
        if cfg.moe.shared_d_ff > 0:
            y_BTD += self.shared(x_BTD, cfg)
        return y_BTD, routing(logits_BTE, scores_BTE, choices, real_BT, dropped)


def router_logits(x_BTD: Array, router: Weight) -> Array:
    """Logits_BTE, in float32 whatever the compute type: rounding would choose other experts."""
    # Small, and needed whole by every token: gathered over fsdp and expert alike.
    router_DE = jax.reshard(router[...], P(None, None))
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), router_DE, precision=precision)


def choose(scores_BTE: Array, bias_E: Array | None, moe: MoeConfig) -> Choices:
    """Each token's top_k experts and their gates; of equal scores the lowest expert's wins.

    The bias has a say in the choice alone. Gradients flow to the scores through the gates, not through the choice.
    """
    ranked_BTE = scores_BTE if bias_E is None else scores_BTE + bias_E[None, None]
    experts_BTX = _top_k(jax.lax.stop_gradient(ranked_BTE), moe.top_k)
    # Compared, not gathered: gathers are slow on a TPU, and their gradients slower.
    gates_BTX = jnp.sum(jnp.where(_is_chosen(experts_BTX, moe.experts), scores_BTE[:, :, None], 0), axis=-1)
    if moe.normalise_gates:
        gates_BTX /= jnp.sum(gates_BTX, axis=-1, keepdims=True) + TINY
    return Choices(experts_BTX, gates_BTX * moe.gate_scale)


def routing(logits_BTE: Array, scores_BTE: Array, choices: Choices, real_BT: Array, dropped: Array) -> Routing:
    """What one router did. The load-balance loss is that of each row, its documents together (DeepSeek-V3, 2024)."""
    experts_BTX, gates_BTX = choices
    X, E = experts_BTX.shape[2], scores_BTE.shape[2]
    real_BT1 = real_BT[:, :, None]
    chosen_BTE = jnp.any(_is_chosen(experts_BTX, E), axis=2) & real_BT1
    load_BE = jnp.sum(chosen_BTE, axis=1, dtype=jnp.int32)
    shares_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + TINY)
    share_BE = jnp.sum(jnp.where(real_BT1, shares_BTE, 0), axis=1)
    n_B1 = jnp.maximum(jnp.sum(real_BT, axis=1, dtype=jnp.float32)[:, None], 1)
    load_balance = jnp.sum(E / X * (load_BE / n_B1) * (share_BE / n_B1))
    z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(shares_BTE, shares_BTE), axis=-1)
    return Routing(
        load_LE=jnp.sum(load_BE, axis=0),
        load_balance=load_balance,
        router_z=jnp.sum(jnp.where(real_BT, jnp.square(z_BT), 0)),
        entropy=jax.lax.stop_gradient(jnp.sum(jnp.where(real_BT, entropy_BT, 0))),
        dropped=dropped,
        experts_LBTX=experts_BTX,
        gates_LBTX=jax.lax.stop_gradient(gates_BTX),
    )


def _top_k(ranked_BTE: Array, k: int) -> Array:
    """The k best experts of each token; behind a wall, since XLA gathers the whole batch for a bare top_k."""

    def local(ranked_BTE: Array) -> Array:
        return jax.lax.top_k(ranked_BTE, k)[1]

    return jax.shard_map(local, in_specs=acts("BTE"), out_specs=acts("BTX"))(ranked_BTE)


def _is_chosen(experts_BTX: Array, E: int) -> Array:
    """Whether expert e is a token's choice x, [B, T, X, E]."""
    return experts_BTX[..., None] == jnp.arange(E)[None, None, None]
