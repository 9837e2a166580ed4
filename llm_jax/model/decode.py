"""Decoding with a cache: a prompt's keys and values are made once, then every new token looks back at them.

Prompts are aligned at their ends, so that all rows write at the same place; what stands before a row's first token is
padding that nobody sees. A layer that looks back a window only has a cache of a window's length.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, P

from llm_jax.batch import PADDING
from llm_jax.config import ConfigError
from llm_jax.mesh import acts
from llm_jax.model.attention import dense
from llm_jax.model.config import LayerConfig, ModelConfig
from llm_jax.model.layers import Attention, Block, Rows, sight_of
from llm_jax.model.rope import Angles
from llm_jax.model.sight import Places, Sight, reach, visible
from llm_jax.model.transformer import Transformer, angles_by_theta, logits


class Pair(NamedTuple):
    """Keys and values of a layer; slot i % S holds the row's place i.

    They lie as the products of one query want to read them: else every token would have all of them turned first.
    """

    keys_BKCS: Array
    values_BKSC: Array


class Cache(NamedTuple):
    """What a row's new tokens look back at."""

    pairs: dict[str, Pair]
    """By the layer's name."""
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
    x_BTD, pairs = model.embedded(tokens_BT, here.positions, cfg), {}
    for name, block, layer in layers_of(model, cfg):
        by, sight = by_theta.get(layer.rope_theta or cfg.rope_theta), sight_of(layer, cfg, causal=True)
        attend = functools.partial(_read, block.attention, by, sight, rows, slots, cfg)
        x_BTD, _, pairs[name] = block.around(x_BTD, attend, rows.real_BT, cfg, layer)
    return _last_logits(model, x_BTD[:, -1:], cfg), Cache(pairs, start_B)


def step(model: Transformer, token_B: Array, t: Array, cache: Cache, cfg: ModelConfig) -> tuple[Array, Cache]:
    """The logits after one more token, float32 [B, V], and the cache with it; t: its place in the row, int32 scalar."""
    token_BT = token_B[:, None]
    here = _places(jnp.zeros_like(token_BT) + t, cache.start_B)
    by_theta = angles_by_theta(here.positions, cfg)
    x_BTD, pairs = model.embedded(token_BT, here.positions, cfg), {}
    for name, block, layer in layers_of(model, cfg):
        by, sight = by_theta.get(layer.rope_theta or cfg.rope_theta), sight_of(layer, cfg, causal=True)
        attend = functools.partial(
            _look_back, block.attention, by, sight, here, t, cache.pairs[name], cache.start_B, cfg
        )
        x_BTD, _, pairs[name] = block.around(x_BTD, attend, jnp.ones_like(token_BT, bool), cfg, layer)
    return _last_logits(model, x_BTD, cfg), Cache(pairs, cache.start_B)


def _read(
    attention: Attention, by: Angles | None, sight: Sight, rows: Rows, slots: int, cfg: ModelConfig, x_BTD: Array
) -> tuple[Array, Pair]:
    """Attention inside the prompts, and what new tokens are going to look back at."""
    q_BTHC, k_BTKC, v_BTKC = attention.projected(x_BTD, by, cfg)
    behind, _ = reach(sight, slots)
    n = min(slots, behind + 1)
    kept = Pair(jnp.moveaxis(_into_slots(k_BTKC, n), 1, 3), jnp.swapaxes(_into_slots(v_BTKC, n), 1, 2))
    return attention.over(q_BTHC, k_BTKC, v_BTKC, rows, sight, cfg), kept


def _look_back(
    attention: Attention,
    by: Angles | None,
    sight: Sight,
    here: Places,
    t: Array,
    pair: Pair,
    start_B: Array,
    cfg: ModelConfig,
    x_BTD: Array,
) -> tuple[Array, Pair]:
    """Attention of one token a row, at place t, and the cache with it."""
    q_BTHC, k_BTKC, v_BTKC = attention.projected(x_BTD, by, cfg)
    B, _, _, n = pair.keys_BKCS.shape
    keys_BKCS = jax.lax.dynamic_update_slice_in_dim(pair.keys_BKCS, jnp.moveaxis(k_BTKC, 1, 3), t % n, axis=3)
    values_BKSC = jax.lax.dynamic_update_slice_in_dim(pair.values_BKSC, jnp.swapaxes(v_BTKC, 1, 2), t % n, axis=2)
    # The latest place whose slot this is, up to now.
    place_S = t - (t - jnp.arange(n)) % n
    there = _places(jnp.broadcast_to(place_S[None], (B, n), out_sharding=acts("BS")), start_B)
    visible_BTS = visible(here, there, t[None], place_S, sight)
    sinks_H = None if attention.sinks is None else jax.reshard(attention.sinks[...], acts("H"))
    k_BSKC, v_BSKC = jnp.moveaxis(keys_BKCS, 3, 1), jnp.swapaxes(values_BKSC, 1, 2)
    o_BTHC = dense(q_BTHC, k_BSKC, v_BSKC, sinks_H, visible_BTS, cfg.attention_soft_cap)
    return attention.added(o_BTHC, cfg), Pair(keys_BKCS, values_BKSC)


def layers_of(model: Transformer, cfg: ModelConfig) -> Iterator[tuple[str, Block, LayerConfig]]:
    """The layers of an unrolled model, each with its place's name."""
    for place in cfg.leading_places:
        yield place.name, model.layers[place.name], place.layer
    (place,) = cfg.period_places
    yield place.name, jax.tree.map(lambda x: x[0], model.layers[place.name]), place.layer


def rows_of(tree: Any, from_B: Array) -> Any:
    """Row from_B[b] of every array, as row b: texts that begin alike, or beams that go on from one another.

    Arrays are [B, ...]. Rows may move between devices.
    """

    def taken(x: Array) -> Array:
        sharding = jax.typeof(x).sharding.spec
        whole = jax.reshard(x, P(None, *sharding[1:]))
        return whole.at[jax.reshard(from_B, P())].get(mode="clip", out_sharding=sharding)

    return jax.tree.map(taken, tree)


def _places(place_BT: Array, start_B: Array) -> Places:
    """Segment 0 from a row's first token on; what is before it, or was never written, is padding."""
    position_BT = place_BT - start_B[:, None]
    return Places(jnp.where(position_BT >= 0, 0, PADDING), jnp.maximum(position_BT, 0))


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
