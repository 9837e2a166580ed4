"""A model from the inside on one text: what each head looks at, what each layer would say, whom the routers choose.

The forward pass is walked layer by layer, from the parts that training runs, in float32; nothing is kept on a module.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, P

from llm_jax.batch import PADDING
from llm_jax.data.config import MASK_ID, PAD_ID
from llm_jax.eval.perplexity import NotFinite
from llm_jax.eval.restore import row_parts
from llm_jax.eval.scorer import on_mesh
from llm_jax.guards import Stop, never
from llm_jax.mesh import acts
from llm_jax.model.attention import mixed, shares
from llm_jax.model.config import ModelConfig
from llm_jax.model.decode import layers_of
from llm_jax.model.layers import Attention, Rows, sight_of
from llm_jax.model.moe import Routing
from llm_jax.model.rope import Angles
from llm_jax.model.sight import Places, Sight, visible
from llm_jax.model.transformer import Transformer, Weights, abstract_model, angles_by_theta, logits
from llm_jax.objective.loss import at_places

# Guesses that are told of a token (X).
TOLD = 5
# Rows are this long, twice this, three times ...: few shapes, few compiles.
MULTIPLE = 64


class Guesses(NamedTuple):
    """What a model expects at N places, and what is there."""

    nats_N: np.ndarray
    """Of what is there, float32."""
    rank_N: np.ndarray
    """How many tokens are likelier, and one more; of equals the lowest id comes first."""
    best_NX: np.ndarray
    """The likeliest ids, best first."""
    probabilities_NX: np.ndarray
    """Theirs, float32."""


class Chosen(NamedTuple):
    """Whom a layer's router chose for each token, best first."""

    experts_TX: np.ndarray
    gates_TX: np.ndarray
    """Float32: the share of each expert's result."""


class Inside(NamedTuple):
    """Of a text's T tokens, BOS among them."""

    guesses: Guesses
    """Of every token but the first: from those before it, or from all others where the model is a masked one."""
    lens_LT: np.ndarray
    """The first guess of the embeddings (L = 0) and of every layer's residual stream, at each token."""
    lens_probabilities_LT: np.ndarray
    shares_LHTS: np.ndarray
    """Each key's share in what a query reads, float32."""
    chosen: dict[int, Chosen]
    """By the layer's number, of those with experts."""


class Walked(NamedTuple):
    """What a forward pass went through."""

    streams: list[Array]
    """The residual stream x_BTD before the first layer, and after each."""
    shares: list[Array]
    """shares_BKGTS of each layer."""
    routing: dict[int, Routing]
    """By the layer's number, without L."""


def walked(
    model: Transformer, tokens_BT: Array, segments_BT: Array, positions_BT: Array, cfg: ModelConfig, *, causal: bool
) -> Walked:
    """The forward pass of an unrolled model, on a mesh without a context axis; attention is what its shares make."""
    here = Places(segments_BT, positions_BT)
    rows = Rows(here, here, tokens_BT != PAD_ID)
    by_theta = angles_by_theta(positions_BT, cfg)
    x_BTD = model.embedded(tokens_BT, positions_BT, cfg)
    seen = Walked([x_BTD], [], {})
    for number, (_, block, layer) in enumerate(layers_of(model, cfg)):
        by, sight = by_theta.get(layer.rope_theta or cfg.rope_theta), sight_of(layer, cfg, causal=causal)
        attend = functools.partial(_watched, block.attention, by, sight, here, cfg)
        x_BTD, routing, shares_BKGTS = block.around(x_BTD, attend, rows.real_BT, cfg, layer)
        seen.streams.append(x_BTD)
        seen.shares.append(shares_BKGTS)
        if routing is not None:
            seen.routing[number] = routing
    return seen


def _watched(
    attention: Attention, by: Angles | None, sight: Sight, here: Places, cfg: ModelConfig, x_BTD: Array
) -> tuple[Array, Array]:
    """Attention's part of the sum, and the shares that made it."""
    q_BTHC, k_BSKC, v_BSKC = attention.projected(x_BTD, by, cfg)
    t_T = jnp.arange(x_BTD.shape[1])
    sinks_H = None if attention.sinks is None else jax.reshard(attention.sinks[...], acts("H"))
    shares_BKGTS = shares(q_BTHC, k_BSKC, sinks_H, visible(here, here, t_T, t_T, sight), cfg.attention_soft_cap)
    return attention.added(mixed(shares_BKGTS, v_BSKC), cfg), shares_BKGTS


def spoken(model: Transformer, x_BTD: Array, cfg: ModelConfig) -> Array:
    """The logits_BTV of a residual stream, as if it were the last one's: the logit lens (nostalgebraist 2020)."""
    return logits(model, x_BTD if model.norm is None else model.norm(x_BTD, cfg), cfg)


def in_float32(cfg: ModelConfig) -> ModelConfig:
    """The same model, its activations and products in float32."""
    return cfg.model_copy(update={"compute_dtype": "float32"})


def look_inside(
    weights: Weights, cfg: ModelConfig, ids: Sequence[int], *, causal: bool, batch_rows: int, stop: Stop = never
) -> Inside | None:
    """All that is shown of a text, BOS first; the same on every process, None where it was stopped.

    weights and cfg are restore.for_decoding's, in_float32, and its mesh is set; it divides batch_rows. stop is asked
    before each batch, and must answer alike on all processes. Raises NotFinite where a score is not a number.
    """
    T = -(-len(ids) // MULTIPLE) * MULTIPLE
    n = len(ids)
    text_T = np.pad(np.array(ids, np.int32), (0, T - n), constant_values=PAD_ID)
    if stop():
        return None
    read = _reader(cfg, causal=causal)
    rows = _rows(np.tile(text_T, (row_parts(jax.sharding.get_mesh()), 1)), n)
    guesses, lens, probabilities, shares_, chosen = jax.device_get(read(weights, *rows, np.roll(text_T, -1)))
    if causal:
        guesses = Guesses(*(x[: n - 1] for x in guesses))
    else:
        guesses = _each_hidden(weights, cfg, text_T, n, batch_rows, stop)
    if guesses is None:
        return None
    bad = int((~np.isfinite(guesses.nats_N)).sum())
    if bad:
        raise NotFinite(f"{bad} of {n - 1} tokens have a loss that is not a number: the weights are broken")
    experts = {number: Chosen(*(x[:n] for x in of_layer)) for number, of_layer in chosen.items()}
    lens_LT, probabilities_LT = (np.stack(of_layers)[:, :n] for of_layers in (lens, probabilities))
    return Inside(guesses, lens_LT, probabilities_LT, np.stack(shares_)[:, :, :n, :n], experts)


def _reader(cfg: ModelConfig, *, causal: bool):  # noqa: ANN202  jit's own type
    """The compiled program that reads a text in every row, tokens_BT, and tells what it saw in the first."""
    graph = abstract_model(cfg).graph

    @jax.jit
    def read(
        weights: Weights, tokens_BT: Array, segments_BT: Array, positions_BT: Array, targets_T: Array
    ) -> tuple[tuple[Array, ...], list[Array], list[Array], list[Array], dict[int, tuple[Array, Array]]]:
        model = nnx.merge(graph, *weights)
        seen = walked(model, tokens_BT, segments_BT, positions_BT, cfg, causal=causal)
        logits_LTV = [_of_first(spoken(model, x_BTD, cfg)) for x_BTD in seen.streams]
        lens = [jnp.argmax(logits_TV, axis=-1) for logits_TV in logits_LTV]
        probabilities = [jnp.max(jax.nn.softmax(logits_TV), axis=-1) for logits_TV in logits_LTV]
        maps = []
        for shares_BKGTS in seen.shares:
            shares_KGTS = _of_first(shares_BKGTS)
            maps.append(shares_KGTS.reshape(-1, *shares_KGTS.shape[2:]))
        chosen = {
            number: (_of_first(routing.experts_LBTX), _of_first(routing.gates_LBTX))
            for number, routing in seen.routing.items()
        }
        return _guesses(logits_LTV[-1], targets_T), lens, probabilities, maps, chosen

    return read


def _each_hidden(
    weights: Weights, cfg: ModelConfig, text_T: np.ndarray, n: int, batch_rows: int, stop: Stop
) -> Guesses | None:
    """What is expected at each of the n tokens but the first while it alone is hidden."""
    graph = abstract_model(cfg).graph

    @jax.jit
    def guess(
        weights: Weights, tokens_BT: Array, segments_BT: Array, positions_BT: Array, places_BN: Array, targets_B: Array
    ) -> tuple[Array, ...]:
        model = nnx.merge(graph, *weights)
        x_BTD, _ = model(tokens_BT, segments_BT, positions_BT, cfg, causal=False)
        logits_BNV = jax.reshard(logits(model, at_places(x_BTD, places_BN), cfg), P())
        return _guesses(logits_BNV[:, 0], targets_B)

    told = []
    for places_B in _in_batches(np.arange(1, n), batch_rows):
        if stop():
            return None
        tokens_BT = np.tile(text_T, (batch_rows, 1))
        tokens_BT[np.arange(batch_rows), places_B] = MASK_ID
        asked = guess(weights, *_rows(tokens_BT, n), on_mesh(places_B[:, None]), text_T[places_B])
        told.append(jax.device_get(asked))
    return Guesses(*(np.concatenate(parts)[: n - 1] for parts in zip(*told, strict=True)))


def _in_batches(places: np.ndarray, batch_rows: int) -> Iterator[np.ndarray]:
    """So many places at a time, the last batch filled up with its last one."""
    for first in range(0, len(places), batch_rows):
        batch = places[first : first + batch_rows].astype(np.int32)
        yield np.pad(batch, (0, batch_rows - len(batch)), mode="edge")


def _rows(tokens_BT: np.ndarray, n: int) -> tuple[Array, Array, Array]:
    """Tokens, segments and positions on the mesh, of rows whose first n tokens are a document."""
    place_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    segments_BT = np.where(place_BT < n, 1, PADDING).astype(np.int32)
    return on_mesh(tokens_BT), on_mesh(segments_BT), on_mesh(place_BT)


def _of_first(x: Array) -> Array:
    """The first row of an array [B, ...], whole on every device."""
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0, out_sharding=jax.typeof(x).sharding)
    return jax.reshard(jnp.sum(jnp.where(row == 0, x, 0), axis=0), P())


def _guesses(logits_NV: Array, targets_N: Array) -> tuple[Array, Array, Array, Array]:
    """The fields of Guesses; the vocabulary is whole on every device."""
    log_NV = jax.nn.log_softmax(logits_NV)
    v_1V = jnp.arange(logits_NV.shape[1])[None]
    is_target_NV = v_1V == targets_N[:, None]
    target_N1 = jnp.sum(jnp.where(is_target_NV, log_NV, 0), axis=-1, keepdims=True)
    before_NV = (log_NV > target_N1) | ((log_NV == target_N1) & (v_1V < targets_N[:, None]))
    best_NX, ids_NX = jax.lax.top_k(log_NV, TOLD)
    return -target_N1[:, 0], 1 + jnp.sum(before_NV, axis=-1, dtype=jnp.int32), ids_NX, jnp.exp(best_NX)
