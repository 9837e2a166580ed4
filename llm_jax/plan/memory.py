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


def _width(cfg: ModelConfig) -> int:
    return 2 if cfg.compute_dtype == "bfloat16" else 4


def _gathered(run: Run, axes: Mapping[str, int]) -> float:
    """A layer's weights whole over fsdp, twice since the next is on its way; the head; the embedding's gradient."""
    cfg = run.model
    parts, experts = axes["tensor"], (cfg.moe.experts / axes["expert"] if cfg.moe else 0)
    attention = 2 * (cfg.n_heads + cfg.n_kv_heads) * cfg.d_head * cfg.d_model
    matrices = (3 if cfg.gated else 2) * cfg.d_model
    of_experts = matrices * experts * cfg.moe.d_ff if cfg.moe and cfg.n_moe_layers else 0
    layer = attention + max(matrices * cfg.d_ff, of_experts)
    table = cfg.padded_vocab_size * cfg.d_model
    return (2 * layer * _width(cfg) + table * (_width(cfg) + 4)) / parts


def _activations(run: Run, axes: Mapping[str, int]) -> float:
    cfg = run.model
    rows = run.train.batch_rows / run.train.accumulation / math.prod(axes[axis] for axis in ACT_AXES["B"])
    tokens, width, parts = rows * run.data.seq_len / axes["context"], _width(cfg), axes["tensor"]
    hidden = (cfg.moe.d_ff * cfg.moe.top_k + cfg.moe.shared_d_ff) if cfg.moe and cfg.n_moe_layers else cfg.d_ff
    copies = cfg.moe.top_k * axes["expert"] if cfg.moe and cfg.n_moe_layers else 1
    stream = tokens * cfg.d_model * width
    heads = (2 * cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head
    products = tokens * (2 * cfg.d_model + (heads + (2 if cfg.gated else 1) * hidden) / parts) * width
    # Of the scores, a mask's and a softmax's in float32 and shares in the compute type, forward and backward.
    queries = tokens if cfg.attention == "xla" else rows * min(_BLOCK, run.data.seq_len)
    scores = queries * run.data.seq_len * cfg.n_heads / parts * (2 * 4 + 2 * width)
    layer = products + tokens * (8 * cfg.d_model * copies + hidden * width / parts) + scores
    match cfg.remat:
        case "full":
            kept = stream
        case "none":
            kept = layer
        case _:
            kept = stream + products
    logits = 3 * 4 * min(cfg.logit_chunk or 2**28, tokens * cfg.padded_vocab_size / parts)
    return cfg.n_layers * kept + layer + logits
