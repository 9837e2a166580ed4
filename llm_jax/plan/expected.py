"""What a step should multiply, move and send, from its sizes alone: to compare layouts, never as the answer.

A compile is the answer. Estimates are scaled by what it said of one run, so what matters is how they change.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llm_jax.alphabet import ROW_AXES
from llm_jax.model.config import ModelConfig
from llm_jax.plan.account import Leaf
from llm_jax.plan.collectives import Collective, sent_share
from llm_jax.plan.memory import kept, products, room, width
from llm_jax.run import Run
from llm_jax.train.flops import flops_per_token

# Below so many numbers of a weight's last dimension a TPU gathers by adding up all of it, which sends twice as much.
LANES = 128


class Expected(NamedTuple):
    """The amounts that a roofline is made of."""

    flops: float
    """Of all devices, recomputation included."""
    moved_bytes: float
    """Main memory's, on a device."""
    collectives: tuple[Collective, ...]
    """Their runs are not counted."""


def expected(run: Run, axes: Mapping[str, int], weights: Sequence[Leaf], slow: frozenset[str]) -> Expected:
    """The amounts of a step.

    run: its model resolved for the platform; weights: account.leaves of them on these axes; slow: the axes that cross
    the network between slices or hosts.
    """
    cfg = run.model
    per_token = flops_per_token(cfg, run.data.seq_len, run.objective)
    # A kernel that keeps no scores makes them again: nine products of queries' size where six are due.
    attention = per_token.attention * (1.5 if cfg.attention in ("splash", "flash", "chunked") else 1)
    again = _recomputed(cfg, per_token.attention / 3)
    flops = run.tokens_per_step * (per_token.weights + attention + again)
    return Expected(flops, _moved(run, axes, weights), (*_of_weights(run, axes, weights, slow), *_of_rows(run, axes)))


def _recomputed(cfg: ModelConfig, attention: float) -> float:
    """FLOPs of a token that the backward pass makes a second time; attention: a forward pass's scores and shares."""
    if cfg.remat == "none":
        return 0
    # Each product is of the model's width and its own.
    again = sum(wide for name, wide in products(cfg).items() if name not in kept(cfg))
    if cfg.remat == "elementwise" and cfg.attention != "xla":
        attention = 0
    return attention + 2 * cfg.n_layers * cfg.d_model * again


def _tokens(run: Run, axes: Mapping[str, int]) -> float:
    """Positions of an update on a device, of all its microbatches."""
    return run.tokens_per_step / math.prod(axes[axis] for axis in ROW_AXES)


def _moved(run: Run, axes: Mapping[str, int], weights: Sequence[Leaf]) -> float:
    """Weights in every microbatch, gradients and the optimizer; the layers' activations; scores and logits."""
    cfg, parts, bytes_each = run.model, axes["tensor"], width(run.model)
    passes = 2 if cfg.remat == "none" else 3
    used = sum(_in_use(leaf, axes) for leaf in weights) * bytes_each
    of_weights = run.train.accumulation * used * (passes + 3) + 8 * sum(leaf.on_a_device for leaf in weights)
    stream, outputs = 6 * cfg.d_model, 3 * sum(products(cfg).values()) / parts
    scores = run.data.seq_len * cfg.n_heads / parts * 4 * 3 if cfg.attention == "xla" else 0
    buffers = 8 * room(cfg, axes) * (cfg.d_model + (cfg.moe.d_ff if cfg.moe else 0) / parts)
    layer = (stream + outputs + buffers) * bytes_each + scores
    logits = 3 * 4 * cfg.padded_vocab_size / parts
    return of_weights + _tokens(run, axes) * (cfg.n_layers * (passes + 1) * layer + logits)


def _in_use(leaf: Leaf, axes: Mapping[str, int]) -> float:
    """Numbers of a weight on a device while it is used: whole over fsdp."""
    return math.prod(leaf.shape) / math.prod(axes[axis] for axis in leaf.axes if axis != "fsdp")


def _of_weights(run: Run, axes: Mapping[str, int], weights: Sequence[Leaf], slow: frozenset[str]) -> list[Collective]:
    """Weights gathered over fsdp for both passes, and gradients added up over it, then over what else divides rows."""
    gathered = reduced = 0.0
    sums: dict[tuple[str, ...], float] = {}
    for leaf in weights:
        bytes_used = _in_use(leaf, axes) * width(run.model) * run.train.accumulation
        over = tuple(axis for axis in ROW_AXES if axes[axis] > 1 and axis not in leaf.axes)
        if axes["fsdp"] > 1 and "fsdp" in leaf.axes:
            gathered += 2 * bytes_used * (2 if leaf.shape[-1] == run.model.d_model < LANES * axes["fsdp"] else 1)
            reduced += bytes_used
            bytes_used /= axes["fsdp"]
        sums[over] = sums.get(over, 0) + bytes_used
    found = [
        _one("all-gather", ("fsdp",), gathered, axes, slow),
        _one("reduce-scatter", ("fsdp",), reduced, axes, slow),
    ]
    return found + [_one("all-reduce", over, payload, axes, slow) for over, payload in sums.items() if over]


def _of_rows(run: Run, axes: Mapping[str, int]) -> list[Collective]:
    """Activations: partial sums over tensor, keys and values over context, tokens to their experts and back."""
    cfg, none = run.model, frozenset[str]()
    each = _tokens(run, axes) * width(cfg)
    again = 0 if cfg.remat == "none" else 1
    sums = each * cfg.d_model * (cfg.n_layers * (4 + again) + 3)
    keys = each * axes["context"] * 2 * cfg.n_kv_heads * cfg.d_head / axes["tensor"] * cfg.n_layers * (2 + again)
    exchanged = 0.0
    if cfg.moe is not None:
        copies = axes["expert"] if cfg.moe.exchange == "all_gather" else cfg.moe.top_k  # of each token
        exchanged = each * copies * cfg.d_model * cfg.n_moe_layers * (4 + again)
    return [
        _one("all-reduce", ("tensor",), sums, axes, none),
        _one("all-gather", ("context",), keys, axes, none),
        _one("all-to-all", ("expert",), exchanged, axes, none),
    ]


def _one(kind: str, over: tuple[str, ...], payload: float, axes: Mapping[str, int], slow: frozenset[str]) -> Collective:
    n = math.prod(axes[axis] for axis in over)
    sent = round(payload * sent_share(kind, n))
    return Collective(kind, over, n, 0, round(payload), sent, slow=not slow.isdisjoint(over))
