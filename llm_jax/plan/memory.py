"""How much memory a step should need on a device, from its sizes alone: to compare layouts, never as the answer.

A compile is the answer. Estimates are scaled by what it said of the run as given, so what matters is how they change.
"""

import math
from collections.abc import Mapping, Sequence

from llm_jax.alphabet import ACT_AXES
from llm_jax.model.config import ModelConfig
from llm_jax.plan.account import Leaf
from llm_jax.run import Run

# Queries that the chunked backend looks at together, at most.
_BLOCK = 512


def estimate(run: Run, axes: Mapping[str, int], state: Sequence[Leaf]) -> int:
    """Bytes of a device: state, gradients, gathered weights, and what a microbatch's backward pass keeps.

    run: its model resolved for the platform; state: account.leaves of the run on these axes.
    """
    weights = sum(leaf.on_a_device for leaf in state if leaf.kind == "weights")
    gradients = weights * (2 if run.train.accumulation > 1 else 1)
    return round(sum(leaf.on_a_device for leaf in state) + gradients + _gathered(run, axes) + _activations(run, axes))


def width(cfg: ModelConfig) -> int:
    """Bytes of a number of the compute type."""
    return 2 if cfg.compute_dtype == "bfloat16" else 4


def products(cfg: ModelConfig) -> dict[str, int]:
    """How wide each of a layer's products with weights is over tensor, by the name that model.remat has for it."""
    moe = cfg.moe if cfg.n_moe_layers else None
    hidden = cfg.d_ff if moe is None else moe.top_k * moe.d_ff + moe.shared_d_ff
    heads, kv_heads = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    found = {"q": heads, "k": kv_heads, "v": kv_heads, "attention_out": heads, "mlp_up": hidden}
    return found | ({"mlp_gate": hidden} if cfg.gated else {})


def room(cfg: ModelConfig, axes: Mapping[str, int]) -> int:
    """Rows that experts' buffers have for each token of a device: enough for the worst routing. Without experts 0."""
    if cfg.moe is None or not cfg.n_moe_layers:
        return 0
    return axes["expert"] * min(cfg.moe.top_k, cfg.moe.experts // axes["expert"])


def kept(cfg: ModelConfig) -> frozenset[str]:
    """The products that the forward pass leaves to the backward pass, which makes the others again."""
    match cfg.remat:
        case "none" | "elementwise" | "dots":
            return frozenset(products(cfg))
        case "full":
            return frozenset()
        case names:
            return frozenset(names)


def _gathered(run: Run, axes: Mapping[str, int]) -> float:
    """A layer's weights whole over fsdp, twice since the next is on its way; the head; the embedding's gradient."""
    cfg = run.model
    parts, experts = axes["tensor"], (cfg.moe.experts / axes["expert"] if cfg.moe else 0)
    attention = 2 * (cfg.n_heads + cfg.n_kv_heads) * cfg.d_head * cfg.d_model
    matrices = (3 if cfg.gated else 2) * cfg.d_model
    of_experts = matrices * experts * cfg.moe.d_ff if cfg.moe and cfg.n_moe_layers else 0
    layer = attention + max(matrices * cfg.d_ff, of_experts)
    table = cfg.padded_vocab_size * cfg.d_model
    return (2 * layer * width(cfg) + table * (width(cfg) + 4)) / parts


def _activations(run: Run, axes: Mapping[str, int]) -> float:
    cfg = run.model
    rows = run.train.batch_rows / run.train.accumulation / math.prod(axes[axis] for axis in ACT_AXES["B"])
    tokens, each, parts = rows * run.data.seq_len / axes["context"], width(cfg), axes["tensor"]
    wide = products(cfg)
    stream, made = cfg.d_model * each, sum(wide.values()) / parts * each
    # What is kept is divided over tensor, but attention's output, which all heads have been added up to.
    left = sum(cfg.d_model if name == "attention_out" else wide[name] / parts for name in kept(cfg) if name in wide)
    # Of the scores, a mask's and a softmax's in float32 and shares in the compute type, forward and backward.
    queries = {"xla": tokens, "chunked": rows * min(_BLOCK, run.data.seq_len)}.get(cfg.attention, 0)
    scores = queries * run.data.seq_len * cfg.n_heads / parts * (2 * 4 + 2 * each)
    # A row of the experts' buffers is a token on its way in and out, and its hidden layer.
    buffers = room(cfg, axes) * (3 * cfg.d_model + 2 * (cfg.moe.d_ff if cfg.moe else 0) / parts) * each
    layer = tokens * (2 * stream + made + 8 * cfg.d_model + wide["mlp_up"] * each / parts + buffers) + scores
    held = layer if cfg.remat == "none" else tokens * (stream + left * each)
    logits = 3 * 4 * min(cfg.logit_chunk or 2**28, tokens * cfg.padded_vocab_size / parts)
    return cfg.n_layers * held + layer + logits
