"""The model's section of a run."""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import pydantic
from annotated_types import Ge, Gt, MinLen

from llm_jax.alphabet import VOCAB_MULTIPLE
from llm_jax.config import Config, ConfigError

TensorName = Literal["q", "k", "v", "attention_out", "mlp_gate", "mlp_up"]


class LinearScaling(Config):
    """Positions divided by a factor (Chen et al. 2023)."""

    name: Literal["linear"] = "linear"
    """How rotary frequencies are stretched."""
    factor: Annotated[float, Ge(1)]
    """How many times longer the context becomes."""


class NtkScaling(Config):
    """A larger theta, so that the slowest pair turns `factor` times slower and the fastest as before (bloc97 2023)."""

    name: Literal["ntk"] = "ntk"
    """How rotary frequencies are stretched."""
    factor: Annotated[float, Ge(1)]
    """How many times longer the context becomes."""


class YarnScaling(Config):
    """NTK by parts, and sharper attention (YaRN, Peng et al. 2023)."""

    name: Literal["yarn"] = "yarn"
    """How rotary frequencies are stretched."""
    factor: Annotated[float, Ge(1)]
    """How many times longer the context becomes."""
    original_length: Annotated[int, Ge(1)]
    """Positions of the context before stretching."""
    slow: Annotated[float, Gt(0)] = 1.0
    """Pairs that turn fewer times than this over the original context are divided by the factor."""
    fast: Annotated[float, Gt(0)] = 32.0
    """Pairs that turn more times than this stay as they are; in between it is blended."""


class Llama3Scaling(Config):
    """Low frequencies divided by a factor, high ones kept, a smooth band between (Llama 3.1, 2024)."""

    name: Literal["llama3"] = "llama3"
    """How rotary frequencies are stretched."""
    factor: Annotated[float, Ge(1)] = 8.0
    """How many times longer the context becomes."""
    original_length: Annotated[int, Ge(1)] = 8192
    """Positions of the context before stretching."""
    low: Annotated[float, Gt(0)] = 1.0
    """Pairs that turn fewer times than this over the original context are divided by the factor."""
    high: Annotated[float, Gt(0)] = 4.0
    """Pairs that turn more times than this stay as they are."""


RopeScaling = Annotated[LinearScaling | NtkScaling | YarnScaling | Llama3Scaling, pydantic.Field(discriminator="name")]


class LayerConfig(Config):
    """What a layer has of its own; all else is the model's."""

    window: Annotated[int, Ge(1)] | None = None
    """Positions a query sees: the last so many, itself included; without a causal mask half of it to either side."""
    block: Annotated[int, Ge(1)] | None = None
    """Queries see their own block of so many positions of their document, and model.global_tokens."""
    rope_theta: Annotated[float, Gt(0)] | None = None
    """Base of the rotary frequencies; null is the model's."""
    moe: bool = False
    """The MLP is a mixture of experts, as model.moe says."""
    attention_norm: bool = True
    """A norm before attention; ModernBERT's first layer has none, since embeddings are normed already."""


class MoeConfig(Config):
    """Mixtures of experts: which experts a token chooses, and how devices exchange tokens."""

    experts: Annotated[int, Ge(2)] = 8
    """Experts of a layer (E)."""
    top_k: Annotated[int, Ge(1)] = 2
    """Experts that a token chooses (X)."""
    d_ff: Annotated[int, Ge(1)] = 688
    """Width of an expert's hidden layer (F)."""
    shared_d_ff: Annotated[int, Ge(0)] = 0
    """Width of an MLP that every token passes beside its experts (DeepSeekMoE, Dai et al. 2024); 0 is off."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores."""
    normalise_gates: bool = True
    """A token's gates are its chosen scores divided by their sum."""
    gate_scale: Annotated[float, Gt(0)] = 1.0
    """Gates are multiplied by it at last."""
    capacity_factor: Annotated[float, Gt(0)] | None = None
    """An expert takes at most this many times its even share of a row's tokens and drops the rest; null drops none."""
    load_balance: Annotated[float, Ge(0)] = 0.01
    """Coefficient of the load-balance loss of each row (Fedus et al. 2021; per sequence as in DeepSeek-V3)."""
    router_z: Annotated[float, Ge(0)] = 0.001
    """Coefficient of the squared log-normaliser of router logits (ST-MoE, Zoph et al. 2022)."""
    balance_rate: Annotated[float, Ge(0)] = 0.0
    """Step by which each expert's choice bias moves towards even load after an update (Wang et al. 2024); 0 is off."""
    exchange: Literal["auto", "all_to_all", "all_gather", "ragged_all_to_all"] = "auto"
    """How tokens come to their experts' devices; auto depends on platform and mesh, and the choice is printed."""
    grouped_matmul: Literal["auto", "blocked", "ragged", "tiled", "mosaic", "einsum"] = "auto"
    """How experts multiply; auto is blocked on a CPU, tiled on a GPU, mosaic on a TPU, einsum with a capacity."""


class Place(NamedTuple):
    """Layers that share a LayerConfig and, if there are several, one turn of the scan: first, first + stride, ..."""

    first: int
    """The number of the first of them."""
    stride: int
    """From one to the next; 0 for a layer that stands alone, outside of the scan."""
    repeats: int
    """How many."""
    layer: LayerConfig

    @property
    def name(self) -> str:
        """How the weights' tree calls them: 5 for layer 5, 1+3 for layers 1, 4, 7, ... stacked."""
        return f"{self.first}+{self.stride}" if self.stride else str(self.first)


class ModelConfig(Config):
    """A transformer: attention and an MLP or experts in every layer, norms around them, an embedding and a head."""

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
    leading: tuple[LayerConfig, ...] = ()
    """The first layers, one by one, before the periods."""
    period: Annotated[tuple[LayerConfig, ...], MinLen(1)] = (LayerConfig(),)
    """The other layers repeat these in turn; what is left of n_layers at the end is a part of a period."""
    moe: MoeConfig | None = None
    """The mixture of experts of the layers that have one."""
    mlp: Literal["swiglu", "geglu", "gelu", "gelu_tanh"] = "swiglu"
    """swiglu and geglu are gated (three matrices); gelu and gelu_tanh, its approximation, are plain (two)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys."""
    qk_norm_over: Literal["head", "all"] = "head"
    """Whether qk_norm norms each head's channels, or those of all heads together (OLMoE)."""
    attention_soft_cap: Annotated[float, Gt(0)] | None = None
    """Attention scores become cap * tanh(scores / cap) (Gemma 2); null is off."""
    attention_sinks: bool = False
    """Each head has a learned score that takes its share of the softmax and brings nothing (gpt-oss)."""
    global_tokens: Annotated[int, Ge(0)] = 0
    """In layers with a block, a document's first so many tokens see all of it and are seen by all of it."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Projections that have a bias: none, queries, keys and values, or all of attention and of dense MLPs."""
    tied_embeddings: bool = False
    """The output head is the embedding table."""
    embedding_norm: bool = False
    """A norm on the embeddings, before the first layer."""
    token_types: Annotated[int, Ge(0)] = 0
    """Rows of a token-type embedding (BERT has 2, and plain text is all of the first type); 0 is off."""
    head_transform: bool = False
    """A dense layer, GELU and a norm before the output head (BERT)."""
    output_bias: bool = False
    """A bias on the logits."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are stretched for longer contexts: name=linear, ntk, yarn or llama3; null is not."""
    learned_positions: Annotated[int, Ge(0)] = 0
    """Rows of a table of learned absolute positions, in place of rotary ones; 0 is off."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Which norm."""
    norm_bias: bool = False
    """Norms have a bias."""
    norm_place: Literal["pre", "post", "sandwich"] = "pre"
    """Norms before each half layer and at the end, after each half layer's addition (BERT), or before and after it."""
    norm_eps: Annotated[float, Gt(0)] = 1e-6
    """Added to the mean square, or the variance, inside a norm."""
    logit_soft_cap: Annotated[float, Gt(0)] | None = None
    """Logits become cap * tanh(logits / cap); null is off."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; master weights stay float32."""
    gather_dtype: Literal["compute", "float32"] = "compute"
    """Type in which fsdp gathers weights and reduces their gradients."""
    attention: Literal["auto", "xla", "chunked", "splash", "flash"] = "auto"
    """Backend; auto is chunked on a CPU, splash on a TPU and flash on a GPU where they can, else xla; it is printed."""
    logit_chunk: Annotated[int, Ge(1)] | None = None
    """Logits a device holds at a time for the loss; null is 2**21 on a CPU, for its caches, and 2**28 elsewhere."""
    unroll: Annotated[int, Ge(1)] = 1
    """Periods in one turn of the scan: more can be faster on a CPU, and compiles longer."""
    remat: Literal["none", "elementwise", "dots", "full"] | tuple[TensorName, ...] = "elementwise"
    """What the backward pass recomputes: nothing; all but products with weights, attention and who sits where; all but
    matrix products; everything; or all but the named tensors. elementwise takes half of the memory of none, and less
    time on a CPU."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def dims(self) -> dict[str, int]:
        """The size of every letter that a weight outside of experts can have."""
        return {
            "D": self.d_model,
            "F": self.d_ff,
            "H": self.n_heads,
            "K": self.n_kv_heads,
            "C": self.d_head,
            "V": self.padded_vocab_size,
        }

    @property
    def expert_dims(self) -> dict[str, int]:
        """The size of every letter that an expert's weight can have."""
        assert self.moe is not None
        return {"D": self.d_model, "E": self.moe.experts, "F": self.moe.d_ff}

    @property
    def gated(self) -> bool:
        """Whether MLPs and experts have a gate: three matrices instead of two."""
        return self.mlp in ("swiglu", "geglu")

    @property
    def n_periods(self) -> int:
        """Whole periods, which one scan runs through."""
        return (self.n_layers - len(self.leading)) // len(self.period)

    @property
    def layers(self) -> Sequence[LayerConfig]:
        """Every layer's own, in order."""
        after = self.n_layers - len(self.leading)
        return [*self.leading, *(self.period[i % len(self.period)] for i in range(after))]

    @property
    def leading_places(self) -> Sequence[Place]:
        """The layers before the scan."""
        return [Place(i, 0, 1, layer) for i, layer in enumerate(self.leading)]

    @property
    def period_places(self) -> Sequence[Place]:
        """The layers of the scan: one place for each layer of a period."""
        first, stride = len(self.leading), len(self.period)
        return [Place(first + i, stride, self.n_periods, layer) for i, layer in enumerate(self.period)]

    @property
    def remaining_places(self) -> Sequence[Place]:
        """The layers after the scan, a part of a period."""
        start = len(self.leading) + self.n_periods * len(self.period)
        return [Place(i, 0, 1, self.layers[i]) for i in range(start, self.n_layers)]

    @property
    def n_moe_layers(self) -> int:
        """Layers with experts."""
        return sum(layer.moe for layer in self.layers)

    def check(self) -> None:
        """Raises ConfigError where two fields contradict each other."""
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model.n_heads = {self.n_heads} is not divisible by model.n_kv_heads = {self.n_kv_heads}"
            )
        after = len(self.leading) + len(self.period)
        if self.n_layers < after:
            raise ConfigError(
                f"model.n_layers = {self.n_layers}: model.leading and one model.period alone have {after} layers"
            )
        if self.n_periods % self.unroll:
            told = "n_layers" if after == 1 else "n_layers makes n_periods"
            raise ConfigError(f"model.{told} = {self.n_periods} is not divisible by model.unroll = {self.unroll}")
        if self.d_head % 2:
            raise ConfigError(f"model.d_head = {self.d_head} is odd; rotary positions need an even number of channels")
        self._check_layers()
        if self.moe is not None:
            self._check_moe(self.moe)

    def _check_layers(self) -> None:
        if any(layer.window is not None and layer.block is not None for layer in self.layers):
            raise ConfigError("model.period: a layer has window or block, and not both")
        if self.global_tokens and not any(layer.block for layer in self.layers):
            raise ConfigError(f"model.global_tokens = {self.global_tokens}, and no layer has a block")
        if self.n_moe_layers and self.moe is None:
            raise ConfigError("model.period: a layer has experts, and model.moe is null")
        if self.learned_positions and (self.rope_scaling or any(layer.rope_theta for layer in self.layers)):
            raise ConfigError(
                "model.learned_positions takes the place of rotary positions: no rope_theta, rope_scaling"
            )
        if self.norm_place == "post" and not all(layer.attention_norm for layer in self.layers):
            raise ConfigError("model.norm_place = 'post' has no norms before attention; leave attention_norm out")
        match self.rope_scaling:
            case YarnScaling(slow=seldom, fast=often) if often <= seldom:
                raise ConfigError(f"model.rope_scaling.fast = {often:g} must be more than slow = {seldom:g}")
            case Llama3Scaling(low=seldom, high=often) if often <= seldom:
                raise ConfigError(f"model.rope_scaling.high = {often:g} must be more than low = {seldom:g}")
            case _:
                pass

    def _check_moe(self, moe: MoeConfig) -> None:
        if not self.n_moe_layers:
            raise ConfigError("model.moe is set, and no layer of model.leading and model.period has moe = true")
        if moe.top_k > moe.experts:
            raise ConfigError(f"model.moe.top_k = {moe.top_k} is more than model.moe.experts = {moe.experts}")
        if moe.capacity_factor is None and moe.grouped_matmul == "einsum":
            raise ConfigError("model.moe.grouped_matmul = 'einsum' needs model.moe.capacity_factor; the others do not")
        if moe.capacity_factor is not None and moe.grouped_matmul not in ("auto", "einsum"):
            raise ConfigError(
                f"model.moe.grouped_matmul = {moe.grouped_matmul!r}: with model.moe.capacity_factor it is einsum"
            )
        if moe.capacity_factor is not None and moe.exchange not in ("auto", "all_to_all"):
            raise ConfigError(f"model.moe.exchange = {moe.exchange!r}: with model.moe.capacity_factor it is all_to_all")
