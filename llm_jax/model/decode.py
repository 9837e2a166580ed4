"""Decoding with a cache: a prompt's keys and values are made once, then every new token looks back at them.

Prompts are aligned at their ends, so that all rows write at the same place; what stands before a row's first token is
padding that nobody sees. A layer that looks back a window only has a cache of a window's length.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, P

from llm_jax.batch import PADDING
from llm_jax.config import ConfigError
from llm_jax.mesh import acts
from llm_jax.model.attention import dense
from llm_jax.model.config import LayerConfig, ModelConfig
from llm_jax.model.layers import Block, Rows, sight_of
from llm_jax.model.sight import Places, Sight, reach, visible
from llm_jax.model.transformer import Transformer, angles_by_theta, logits


class Pair(NamedTuple):
    """Keys and values of the layers of a place: [L, B, S, K, C]; slot i % S holds the row's place i."""

    keys: Array
    values: Array


class Cache(NamedTuple):
    """What a row's new tokens look back at."""

    pairs: dict[str, Pair]
    """By the name of the layers' place."""
    start_B: Array
    """Where in the row its first token stands, int32."""


def unrolled(cfg: ModelConfig) -> ModelConfig:
    """The same model with every layer by itself: a scan would copy each layer's weights and cache for every token."""
    *before, last = cfg.layers
    return cfg.model_copy(update={"leading": tuple(before), "period": (last,), "unroll": 1, "remat": "none"})


def check_mesh(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
    """Raises ConfigError where new tokens cannot be divided: one at a time has no positions to share."""
    if mesh.shape["context"] > 1:
        raise ConfigError(
            f"mesh.context = {mesh.shape['context']}: decoding has no positions to divide; use another axis"
        )


def prefill(model: Transformer, tokens_BT: Array, start_B: Array, slots: int, cfg: ModelConfig) -> tuple[Array, Cache]:
    """The last token's logits, float32 [B, V], and the cache, with room for `slots` places in all.

    tokens_BT: int32, aligned at their ends; before start_B they are PAD. Each row sees its own tokens alone.
    """
    B, T = tokens_BT.shape
    place_BT = jax.lax.broadcasted_iota(jnp.int32, (B, T), 1, out_sharding=acts("BT"))
    here = _places(place_BT, start_B)
    rows = Rows(here, here, here.segments != PADDING)
    by_theta = angles_by_theta(here.positions, cfg)

    def apply(x_BTD: Array, block: Block, layer: LayerConfig, nothing: None, *, in_scan: bool) -> tuple[Array, Pair]:
        sight, angles = sight_of(layer, cfg, causal=True), by_theta.get(layer.rope_theta or cfg.rope_theta)

        def attend(x_BTD: Array) -> tuple[Array, Pair]:
            q_BTHC, k_BTKC, v_BTKC = block.attention.projected(x_BTD, angles, cfg)
            n = _slots(sight, slots)
            kept = Pair(_into_slots(k_BTKC, n), _into_slots(v_BTKC, n))
            return block.attention.over(q_BTHC, k_BTKC, v_BTKC, rows, sight, cfg), kept

        x_BTD, _, pair = block.around(x_BTD, attend, rows.real_BT, cfg, layer)
        return x_BTD, pair

    x_BTD = model.embedded(tokens_BT, here.positions, cfg)
    x_BTD, pairs = model.through_layers(x_BTD, apply, dict.fromkeys(model.layers), cfg)
    return _last_logits(model, x_BTD[:, -1:], cfg), Cache(pairs, start_B)


def step(model: Transformer, token_B: Array, t: Array, cache: Cache, cfg: ModelConfig) -> tuple[Array, Cache]:
    """The logits after one more token, float32 [B, V], and the cache with it; t: its place in the row, int32 scalar."""
    token_BT = token_B[:, None]
    here = _places(jnp.zeros_like(token_BT) + t, cache.start_B)
    by_theta = angles_by_theta(here.positions, cfg)

    def apply(x_BTD: Array, block: Block, layer: LayerConfig, pair: Pair, *, in_scan: bool) -> tuple[Array, Pair]:
        sight, angles = sight_of(layer, cfg, causal=True), by_theta.get(layer.rope_theta or cfg.rope_theta)

        def attend(x_BTD: Array) -> tuple[Array, Pair]:
            q_BTHC, k_BTKC, v_BTKC = block.attention.projected(x_BTD, angles, cfg)
            n = pair.keys.shape[1]
            after = Pair(
                *(
                    jax.lax.dynamic_update_slice_in_dim(x, new, t % n, axis=1)
                    for x, new in zip(pair, (k_BTKC, v_BTKC), strict=True)
                )
            )
            # The latest place whose slot this is, up to now.
            place_S = t - (t - jnp.arange(n)) % n
            there = _places(
                jnp.broadcast_to(place_S[None], (x_BTD.shape[0], n), out_sharding=acts("BS")), cache.start_B
            )
            visible_BTS = visible(here, there, t[None], place_S, sight)
            sinks = block.attention.sinks
            sinks_H = None if sinks is None else jax.reshard(sinks[...], acts("H"))
            o_BTHC = dense(q_BTHC, after.keys, after.values, sinks_H, visible_BTS, cfg.attention_soft_cap)
            return block.attention.added(o_BTHC, cfg), after

        x_BTD, _, pair = block.around(x_BTD, attend, jnp.ones_like(token_BT, bool), cfg, layer)
        return x_BTD, pair

    x_BTD = model.embedded(token_BT, here.positions, cfg)
    x_BTD, pairs = model.through_layers(x_BTD, apply, cache.pairs, cfg)
    return _last_logits(model, x_BTD, cfg), Cache(pairs, cache.start_B)


def rows_of(tree: Any, from_B: Array) -> Any:
    """Row from_B[b] of every array, as row b: texts that begin alike, or beams that go on from one another.

    Arrays are [B, ...], those of a cache [L, B, S, K, C]. Rows may move between devices.
    """

    def taken(x: Array) -> Array:
        axis = 1 if x.ndim == 5 else 0
        sharding = jax.typeof(x).sharding.spec
        whole = jax.reshard(x, P(*(None if i == axis else part for i, part in enumerate(sharding))))
        index_B = jax.reshard(from_B, P())
        return whole.at[(slice(None),) * axis + (index_B,)].get(mode="clip", out_sharding=sharding)

    return jax.tree.map(taken, tree)


def _places(place_BT: Array, start_B: Array) -> Places:
    """Segment 0 from a row's first token on; what is before it, or was never written, is padding."""
    position_BT = place_BT - start_B[:, None]
    return Places(jnp.where(position_BT >= 0, 0, PADDING), jnp.maximum(position_BT, 0))


def _slots(sight: Sight, slots: int) -> int:
    """How many places back a layer needs, the present one included."""
    behind, _ = reach(sight, slots)
    return min(slots, behind + 1)


def _into_slots(x_BTKC: Array, n: int) -> Array:
    """The last n of T places, place i in slot i % n; slots of places to come are zero."""
    T = x_BTKC.shape[1]
    if n >= T:
        return jnp.pad(x_BTKC, ((0, 0), (0, n - T), (0, 0), (0, 0)))
    return jnp.roll(x_BTKC[:, T - n :], (T - n) % n, axis=1)


def _last_logits(model: Transformer, x_BTD: Array, cfg: ModelConfig) -> Array:
    """Float32 logits_BV, the vocabulary whole on every device, of hidden states [B, 1, D]."""
    if model.norm is not None:
        x_BTD = model.norm(x_BTD, cfg)
    return jax.reshard(logits(model, x_BTD, cfg)[:, 0], P(*acts("B"), None))
