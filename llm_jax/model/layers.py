"""A layer: attention, and an MLP or experts, each added to the residual stream, with norms before or after."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar, get_args

import jax
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llm_jax.mesh import acts
from llm_jax.model.attention import attention
from llm_jax.model.config import LayerConfig, ModelConfig, TensorName
from llm_jax.model.experts import ROUTED
from llm_jax.model.mlp import Mlp
from llm_jax.model.moe import Moe, Routing
from llm_jax.model.norms import Norm, rms_norm
from llm_jax.model.rope import Angles, rotate
from llm_jax.model.sight import ATTENDED, Places, Sight
from llm_jax.model.weights import Weight, matrix, ones, plus, project, residual_scale, stored, zeros

Kept = TypeVar("Kept")


class Rows(NamedTuple):
    """What layers know of a batch beside its hidden states."""

    here: Places
    """Of queries, T sharded over context."""
    there: Places
    """Of keys, on every context rank those of the whole row."""
    real_BT: Array
    """Whether a token belongs to a document, and is no padding."""


class Attention(nnx.Module):
    """Grouped-query attention with rotary or no positions of its own, optional biases, norms and sinks."""

    q_bias: Weight | None
    k_bias: Weight | None
    v_bias: Weight | None
    o_bias: Weight | None

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        dims, biased = cfg.dims, cfg.bias != "none"
        self.q = matrix("DHC", dims, rngs, fan_in="D")
        self.k = matrix("DKC", dims, rngs, fan_in="D")
        self.v = matrix("DKC", dims, rngs, fan_in="D")
        self.o = matrix("HCD", dims, rngs, fan_in="HC", scale=residual_scale(cfg))
        self.q_bias = zeros("HC", dims) if biased else None
        self.k_bias = zeros("KC", dims) if biased else None
        self.v_bias = zeros("KC", dims) if biased else None
        self.o_bias = zeros("D", dims) if cfg.bias == "all" else None
        if cfg.qk_norm:
            over_all = cfg.qk_norm_over == "all"
            self.q_norm = ones("HC" if over_all else "C", dims)
            self.k_norm = ones("KC" if over_all else "C", dims)
        self.sinks = zeros("H", dims) if cfg.attention_sinks else None

    def __call__(self, x_BTD: Array, rows: Rows, by: Angles | None, sight: Sight, cfg: ModelConfig) -> Array:
        """x_BTD in the compute type, by the angles that turn queries and keys; returns attention's part of the sum."""
        return self.over(*self.projected(x_BTD, by, cfg), rows, sight, cfg)

    def over(self, q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, rows: Rows, sight: Sight, cfg: ModelConfig) -> Array:
        """Attention's part of the sum, of what was projected."""
        # Keys and values of the whole row on every context rank: the one all-gather of context parallelism.
        k_BSKC, v_BSKC = jax.reshard((k_BTKC, v_BTKC), acts("BSKC"))
        o_BTHC = attention(
            q_BTHC,
            k_BSKC,
            v_BSKC,
            rows.here,
            rows.there,
            sight=sight,
            soft_cap=cfg.attention_soft_cap,
            sinks_H=None if self.sinks is None else self.sinks[...],
            backend=cfg.attention,
        )
        return self.added(o_BTHC, cfg)

    def projected(self, x_BTD: Array, by: Angles | None, cfg: ModelConfig) -> tuple[Array, Array, Array]:
        """Queries, keys and values, as they meet each other: normed and turned."""
        q_BTHC = plus(project("BTD,DHC->BTHC", x_BTD, stored(self.q, cfg)), self.q_bias)
        k_BTKC = plus(project("BTD,DKC->BTKC", x_BTD, stored(self.k, cfg)), self.k_bias)
        v_BTKC = plus(project("BTD,DKC->BTKC", x_BTD, stored(self.v, cfg)), self.v_bias)
        if cfg.qk_norm:
            q_BTHC = rms_norm(q_BTHC, self.q_norm, cfg.norm_eps)
            k_BTKC = rms_norm(k_BTKC, self.k_norm, cfg.norm_eps)
        if by is not None:
            q_BTHC, k_BTKC = rotate(q_BTHC, by), rotate(k_BTKC, by)
        q_BTHC, k_BTKC = checkpoint_name(q_BTHC, "q"), checkpoint_name(k_BTKC, "k")
        return q_BTHC, k_BTKC, checkpoint_name(v_BTKC, "v")

    def added(self, o_BTHC: Array, cfg: ModelConfig) -> Array:
        """What all heads' outputs add to the residual stream."""
        o_BTD: Array = project("BTHC,HCD->BTD", o_BTHC, stored(self.o, cfg), out_sharding=acts("BTD"))
        return checkpoint_name(plus(o_BTD, self.o_bias), "attention_out")


class Block(nnx.Module):
    """One layer: attention, then an MLP or experts.

    Norms come before each of the two (pre), after its addition to the residual stream (post; Vaswani et al. 2017), or
    before it and once more before the addition (sandwich; Gemma 2, 2024).
    """

    attention_norm: Norm | None
    attention_out_norm: Norm | None
    mlp_norm: Norm | None
    mlp_out_norm: Norm | None

    def __init__(self, cfg: ModelConfig, layer: LayerConfig, rngs: nnx.Rngs):
        before, after = cfg.norm_place != "post", cfg.norm_place != "pre"
        self.attention_norm = Norm(cfg) if before and layer.attention_norm else None
        self.attention = Attention(cfg, rngs)
        self.attention_out_norm = Norm(cfg) if after else None
        self.mlp_norm = Norm(cfg) if before else None
        if layer.moe:
            self.moe = Moe(cfg, rngs)
        else:
            self.mlp = Mlp(cfg, cfg.d_ff, rngs, biased=cfg.bias == "all")
        self.mlp_out_norm = Norm(cfg) if after else None

    def __call__(
        self, x_BTD: Array, rows: Rows, by: Angles | None, cfg: ModelConfig, layer: LayerConfig, *, causal: bool
    ) -> tuple[Array, Routing | None]:
        """The residual stream after this layer, and what its router did, if it has experts."""

        def attend(x_BTD: Array) -> tuple[Array, None]:
            return self.attention(x_BTD, rows, by, sight_of(layer, cfg, causal=causal), cfg), None

        x_BTD, routing, _ = self.around(x_BTD, attend, rows.real_BT, cfg, layer)
        return x_BTD, routing

    def around(
        self,
        x_BTD: Array,
        attend: Callable[[Array], tuple[Array, Kept]],
        real_BT: Array,
        cfg: ModelConfig,
        layer: LayerConfig,
    ) -> tuple[Array, Routing | None, Kept]:
        """This layer around any attention, which returns what it adds and what it wants to keep."""
        y_BTD, kept = attend(_normed(x_BTD, self.attention_norm, cfg))
        x_BTD = _added(x_BTD, y_BTD, self.attention_out_norm, cfg)
        inside_BTD, routing = _normed(x_BTD, self.mlp_norm, cfg), None
        if layer.moe:
            y_BTD, routing = self.moe(inside_BTD, real_BT, cfg)
        else:
            y_BTD = self.mlp(inside_BTD, cfg)
        return _added(x_BTD, y_BTD, self.mlp_out_norm, cfg), routing, kept


def sight_of(layer: LayerConfig, cfg: ModelConfig, *, causal: bool) -> Sight:
    """Whom a layer's queries see."""
    return Sight(causal, layer.window, layer.block, cfg.global_tokens if layer.block else 0)


def _normed(x_BTD: Array, norm: Norm | None, cfg: ModelConfig) -> Array:
    return x_BTD if norm is None else norm(x_BTD, cfg)


def _added(x_BTD: Array, y_BTD: Array, norm: Norm | None, cfg: ModelConfig) -> Array:
    """The residual stream with a half layer's y_BTD: normed as a whole (post), or after y was normed (sandwich)."""
    if cfg.norm_place == "post":
        return _normed(x_BTD + y_BTD, norm, cfg)
    return x_BTD + _normed(y_BTD, norm, cfg)


def rematerialised(body: Callable, cfg: ModelConfig, *, in_scan: bool) -> Callable:
    """The layer's function under the named policy: what the backward pass recomputes.

    in_scan: forward and backward pass are two loops, so XLA cannot find what is recomputed to be the same, and needs no
    barrier against it.
    """
    policies = jax.checkpoint_policies
    match cfg.remat:
        case "none":
            return body
        case "full":
            policy = None
        case "elementwise":
            policy = policies.save_only_these_names(*get_args(TensorName), ATTENDED, *ROUTED)
        case "dots":
            policy = policies.dots_with_no_batch_dims_saveable
        case names:
            policy = policies.save_only_these_names(*names)
    return jax.checkpoint(body, prevent_cse=not in_scan, policy=policy)
