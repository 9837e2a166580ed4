"""How much arithmetic a token needs, and which share of the hardware's peak a run reaches. Pure, and without jax."""

import math
from fractions import Fraction
from typing import Literal, NamedTuple

from llm_jax.model.config import LayerConfig, ModelConfig
from llm_jax.objective.config import CausalConfig, ObjectiveConfig

# What an MFU counts, printed beside it: 6 for each weight a token is multiplied with (as in PaLM, Chowdhery et al.
# 2022), so of experts the chosen ones, no embedding, since a look-up multiplies nothing, and the head as often as there
# is something to predict; and attention to the whole row, or to all of a local layer's window or block, whatever mask
# lies over it. Recomputation under remat is not counted: it is a cost, not a result.
CONVENTION = "6N active + attention to the row or window"

# Dense bfloat16 peak of one device in FLOP/s, by the name that JAX gives the device (`device_kind`). GPUs: NVIDIA's
# data sheets, whose figures since the H100 are with sparsity: twice these. TPUs: Google Cloud's page of each version;
# a device of JAX's is a chip since v4, and one of a chip's two cores before.
_BFLOAT16_PEAKS: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5e": 197e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6e": 918e12,
    "TPU v6 lite": 918e12,
}


class FlopsPerToken(NamedTuple):
    """FLOPs of one token's forward and backward pass, a multiplication and an addition counted as two."""

    weights: float
    """Products with weights: 6 N."""
    attention: float
    """Queries with keys and shares with values, every token with its whole row, window or block."""
    visible_attention: float
    """The same without the keys that a causal mask hides: half of a row or block."""

    @property
    def full(self) -> float:
        """By CONVENTION, which MFU uses."""
        return self.weights + self.attention

    @property
    def visible(self) -> float:
        """By the stricter convention, which counts no product that the causal mask throws away."""
        return self.weights + self.visible_attention


def flops_per_token(cfg: ModelConfig, seq_len: int, objective: ObjectiveConfig) -> FlopsPerToken:
    """FLOPs of training on one token of rows of seq_len; the backward pass costs twice the forward pass."""
    causal = isinstance(objective, CausalConfig)
    # As objective/mlm.py has it: the share as it is written, since 0.15 * 40 is a little more than 6 in binary.
    predicted = 1.0 if causal else math.ceil(Fraction(str(objective.rate)) * seq_len) / seq_len
    keys = [_keys(cfg, layer, seq_len, causal) for layer in cfg.layers]
    for_a_key = 12 * cfg.n_heads * cfg.d_head
    return FlopsPerToken(
        weights=6 * (_body_weights(cfg) + predicted * _head_weights(cfg)),
        attention=for_a_key * sum(in_reach for in_reach, _ in keys),
        visible_attention=for_a_key * sum(visible for _, visible in keys),
    )


def parameters(cfg: ModelConfig, *, padded: bool = True) -> int:
    """Every trained number of the model; with padded=False vocab_size rows of each table, as papers count."""
    return _parameters(cfg, cfg.moe.experts if cfg.moe else 0, padded)


def active_parameters(cfg: ModelConfig, *, padded: bool = True) -> int:
    """The parameters that one token uses: all of them but the experts that it does not choose."""
    return _parameters(cfg, cfg.moe.top_k if cfg.moe else 0, padded)


def peak_flops(device_kind: str, dtype: Literal["bfloat16", "float32"]) -> float | None:
    """Dense peak of one device in FLOP/s for products of dtype; None where it is not known."""
    peak = _BFLOAT16_PEAKS.get(device_kind)
    if peak is None or dtype == "bfloat16":
        return peak
    # JAX's default precision multiplies float32 in TF32 on NVIDIA GPUs, at half the rate, and in bfloat16 on TPUs.
    return peak / 2 if device_kind.startswith("NVIDIA") else peak


def mfu(tokens_per_s: float, flops: FlopsPerToken, peak: float | None, n_devices: int) -> float | None:
    """Share of the devices' peak that the model's FLOPs by CONVENTION amount to, 0 to 1; None without a peak.

    tokens_per_s: of all devices together; peak: FLOP/s of one device.
    """
    return None if peak is None else tokens_per_s * flops.full / (peak * n_devices)


def _body_weights(cfg: ModelConfig) -> int:
    """The weights that every token is multiplied with, the output head's left out."""
    return sum(_matrices(cfg, layer, cfg.moe.top_k if cfg.moe else 0) for layer in cfg.layers)


def _head_weights(cfg: ModelConfig) -> int:
    """The weights that a predicted position's hidden state is multiplied with, padded vocabulary included."""
    return cfg.padded_vocab_size * cfg.d_model + (cfg.d_model**2 if cfg.head_transform else 0)


def _keys(cfg: ModelConfig, layer: LayerConfig, seq_len: int, causal: bool) -> tuple[int, float]:
    """Keys in a query's reach, and how many of them are left by a causal mask on the mean over a row's queries."""
    if layer.window is not None:
        # A causal window is the mask's own; only queries near the row's start have fewer keys than it holds.
        width = min(layer.window if causal else 2 * (layer.window // 2) + 1, seq_len)
        return width, width - width * width / (2 * seq_len) if causal else width
    width = min(layer.block or seq_len, seq_len)
    everywhere = min(cfg.global_tokens if layer.block else 0, seq_len - width)
    return width + everywhere, width / 2 + everywhere if causal else width + everywhere


def _parameters(cfg: ModelConfig, experts: int, padded: bool) -> int:
    """Every number outside of experts, and those of so many experts a layer."""
    rows = cfg.padded_vocab_size if padded else cfg.vocab_size
    tables = (1 if cfg.tied_embeddings else 2) * rows + cfg.learned_positions + cfg.token_types
    norms = cfg.embedding_norm + cfg.head_transform + (cfg.norm_place != "post")
    total = tables * cfg.d_model + norms * _norm(cfg) + (rows if cfg.output_bias else 0)
    if cfg.head_transform:
        total += cfg.d_model * (cfg.d_model + (cfg.bias == "all"))
    return total + sum(_matrices(cfg, layer, experts) + _vectors(cfg, layer) for layer in cfg.layers)


def _matrices(cfg: ModelConfig, layer: LayerConfig, experts: int) -> int:
    """A layer's matrices, with so many experts where it has any."""
    attention = 2 * (cfg.n_heads + cfg.n_kv_heads) * cfg.d_head * cfg.d_model
    of_mlp = (3 if cfg.gated else 2) * cfg.d_model
    if not layer.moe:
        return attention + of_mlp * cfg.d_ff
    assert cfg.moe is not None
    router = cfg.d_model * cfg.moe.experts
    return attention + router + of_mlp * (experts * cfg.moe.d_ff + cfg.moe.shared_d_ff)


def _vectors(cfg: ModelConfig, layer: LayerConfig) -> int:
    """A layer's norms, biases and sinks."""
    H, K, C, D = cfg.n_heads, cfg.n_kv_heads, cfg.d_head, cfg.d_model
    before = layer.attention_norm + 1 if cfg.norm_place != "post" else 0
    after = 2 if cfg.norm_place != "pre" else 0
    total = (before + after) * _norm(cfg)
    if cfg.qk_norm:
        total += 2 * C if cfg.qk_norm_over == "head" else (H + K) * C
    if cfg.attention_sinks:
        total += H
    if cfg.bias != "none":
        total += (H + 2 * K) * C
    if cfg.bias == "all":
        # Experts have none.
        total += D + (0 if layer.moe else (2 if cfg.gated else 1) * cfg.d_ff + D)
    return total


def _norm(cfg: ModelConfig) -> int:
    return cfg.d_model * (2 if cfg.norm_bias else 1)
