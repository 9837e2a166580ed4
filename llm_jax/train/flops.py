"""How much arithmetic a token needs, and which share of the hardware's peak a run reaches. Pure, and without jax."""

from typing import Literal, NamedTuple

from llm_jax.model.config import ModelConfig

# What an MFU counts, printed beside it: 6 for each weight a token is multiplied with (the output head in, the input
# embedding out, since a look-up multiplies nothing), and attention as if every token looked at its whole row (as in
# PaLM, Chowdhery et al. 2022). Recomputation under remat is not counted: it is a cost, not a result.
CONVENTION = "6N + full attention"

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

    weights: int
    """Products with weights: 6 N."""
    attention: int
    """Queries with keys and shares with values, every token with its whole row."""
    visible_attention: float
    """The same for the keys a token may see: half of them under a causal mask."""

    @property
    def full(self) -> int:
        """By CONVENTION, which MFU uses."""
        return self.weights + self.attention

    @property
    def visible(self) -> float:
        """By the stricter convention, which counts no product that the causal mask throws away."""
        return self.weights + self.visible_attention


def flops_per_token(cfg: ModelConfig, seq_len: int, causal: bool) -> FlopsPerToken:
    """FLOPs of training on one token of rows of seq_len; the backward pass costs twice the forward pass."""
    attention = 12 * cfg.n_layers * cfg.n_heads * cfg.d_head * seq_len
    return FlopsPerToken(6 * multiplied_weights(cfg), attention, attention / 2 if causal else attention)


def multiplied_weights(cfg: ModelConfig) -> int:
    """N: the weights that a token is multiplied with, the output head's padded vocabulary included."""
    return cfg.n_layers * _layer_matrices(cfg) + cfg.padded_vocab_size * cfg.d_model


def parameters(cfg: ModelConfig) -> int:
    """Every trained number of the model, embeddings with their padding included."""
    vectors = 2 * cfg.d_model + (2 * cfg.d_head if cfg.qk_norm else 0)
    tables = 1 if cfg.tied_embeddings else 2
    return cfg.n_layers * (_layer_matrices(cfg) + vectors) + cfg.d_model + tables * cfg.padded_vocab_size * cfg.d_model


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


def _layer_matrices(cfg: ModelConfig) -> int:
    attention = 2 * (cfg.n_heads + cfg.n_kv_heads) * cfg.d_head * cfg.d_model
    return attention + (3 if cfg.mlp == "swiglu" else 2) * cfg.d_model * cfg.d_ff
