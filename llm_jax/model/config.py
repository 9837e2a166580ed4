"""The model's section of a run."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt

from llm_jax.alphabet import VOCAB_MULTIPLE
from llm_jax.config import Config, ConfigError

TensorName = Literal["q", "k", "v", "attention_out", "mlp_gate", "mlp_up"]


class ModelConfig(Config):
    """A pre-norm decoder: RMSNorm, rotary positions, grouped-query attention, gated or plain MLP."""

    d_model: Annotated[int, Ge(1)] = 256
    """Width of the residual stream (D)."""
    d_ff: Annotated[int, Ge(1)] = 688
    """Width of the MLP's hidden layer (F)."""
    n_layers: Annotated[int, Ge(1)] = 4
    """Number of layers (L)."""
    n_heads: Annotated[int, Ge(1)] = 4
    """Query heads (H)."""
    n_kv_heads: Annotated[int, Ge(1)] = 4
    """Key and value heads (K); fewer than n_heads is grouped-query attention."""
    d_head: Annotated[int, Ge(2)] = 64
    """Channels of one head (C); even, because rotary positions turn pairs."""
    vocab_size: Annotated[int, Ge(8)] = 8192
    """Pieces of the vocabulary, special tokens included (V, before padding to a multiple of 128)."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu: gated by SiLU (three matrices); gelu: plain (two matrices)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head."""
    tied_embeddings: bool = False
    """The output head is the embedding table."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: Annotated[float, Gt(0)] = 1e-6
    """Added to the mean square inside RMSNorm."""
    logit_soft_cap: Annotated[float, Gt(0)] | None = None
    """Logits become cap * tanh(logits / cap); null is off."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; master weights stay float32."""
    gather_dtype: Literal["compute", "float32"] = "compute"
    """Type in which fsdp gathers weights and reduces their gradients."""
    attention: Literal["auto", "xla", "chunked"] = "auto"
    """Attention backend; auto is chunked on a CPU and xla elsewhere, and the choice is printed."""
    logit_chunk: Annotated[int, Ge(1)] | None = None
    """Logits a device holds at a time for the loss; null is 2**21 on a CPU, for its caches, and 2**28 elsewhere."""
    unroll: Annotated[int, Ge(1)] = 1
    """Layers in one turn of the scan: more can be faster on a CPU, and compiles longer."""
    remat: Literal["none", "dots", "full"] | tuple[TensorName, ...] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, everything, or all but the named tensors."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def dims(self) -> dict[str, int]:
        """The size of every letter that a weight can have."""
        return {
            "D": self.d_model,
            "F": self.d_ff,
            "H": self.n_heads,
            "K": self.n_kv_heads,
            "C": self.d_head,
            "V": self.padded_vocab_size,
        }

    def check(self) -> None:
        """Raises ConfigError where two fields contradict each other."""
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model.n_heads = {self.n_heads} is not divisible by model.n_kv_heads = {self.n_kv_heads}"
            )
        if self.n_layers % self.unroll:
            raise ConfigError(f"model.n_layers = {self.n_layers} is not divisible by model.unroll = {self.unroll}")
        if self.d_head % 2:
            raise ConfigError(f"model.d_head = {self.d_head} is odd; rotary positions need an even number of channels")
