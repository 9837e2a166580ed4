"""A token sees what its layers let it see of its own document and nothing else: by gradient, perturbation and loss."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from llm_jax.batch import Batch, documents, place, segments_and_positions
from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.model import attention, layers
from llm_jax.model.config import LayerConfig, ModelConfig
from llm_jax.model.sight import Sight
from llm_jax.model.transformer import abstract_model, logits
from llm_jax.objective import causal
from llm_jax.objective import loss as objectives
from llm_jax.objective.config import CausalConfig
from tests.reference_attention import places, sees
from tests.small import CFG, B, mesh_of, packed_row, put, put_weights, ragged_rows, slowly, weights_of

SHARDED = {"context": 2, "fsdp": 2, "tensor": 2}

# Long enough for the chunked backend to take two blocks.
T = 128
ASKED = (0, 1, 19, 20, 21, 63, 64, 65, 66, 90, 100, 101, 102, 103, 126, 127)
STARTS = (20, 64, 66, 101, 102)


class Kind(NamedTuple):
    """A model, and whether it reads from left to right."""

    cfg: ModelConfig
    causal: bool


# A layer of windows and one of blocks, over which a document's first tokens see and are seen.
LOCAL = CFG.model_copy(
    update={
        "period": (LayerConfig(window=5), LayerConfig(block=8)),
        "global_tokens": 2,
        "attention_soft_cap": 5.0,
        "attention_sinks": True,
    }
)
KINDS = {
    "causal": Kind(CFG, True),
    "bidirectional": Kind(CFG, False),
    "local": Kind(LOCAL, True),
    "local bidirectional": Kind(LOCAL, False),
}


def depends_BS(kind: Kind, segments_T: np.ndarray, positions_T: np.ndarray) -> np.ndarray:
    """Whether the position that row b asks about may depend on position s: by what layer after layer sees."""
    depends = np.eye(T, dtype=bool)
    for layer in kind.cfg.layers:
        sight = Sight(kind.causal, layer.window, layer.block, kind.cfg.global_tokens if layer.block else 0)
        depends = sees(sight, segments_T, positions_T) @ depends
    return depends[list(ASKED)]


def wrong_dependences(kind: Kind, backend: str, mesh: dict[str, int]) -> int:
    """How many (asked position, position) have a gradient where there must be none, or none where there must be one."""
    # Every token of the batch has an id of its own, so that the embedding's gradient tells positions apart.
    cfg = kind.cfg.model_copy(update={"attention": backend, "vocab_size": len(ASKED) * T})
    devices = mesh_of(**mesh)
    tokens = np.arange(len(ASKED) * T, dtype=np.int32).reshape(len(ASKED), T)
    segments, positions = places(np.tile(np.isin(np.arange(T), STARTS), (len(ASKED), 1)))
    probe = np.zeros((len(ASKED), T, cfg.d_model), np.float32)
    probe[np.arange(len(ASKED)), ASKED] = np.random.default_rng(0).normal(size=(len(ASKED), cfg.d_model))

    def answer(params: nnx.State, tokens_BT: Array, segments_BT: Array, positions_BT: Array, probe_BTD: Array) -> Array:
        model = nnx.merge(abstract_model(cfg)[0], params, {})
        return jnp.sum(model(tokens_BT, segments_BT, positions_BT, cfg, causal=kind.causal)[0] * probe_BTD)

    with jax.set_mesh(devices):
        arguments = [put(array, "BT", devices) for array in (tokens, segments, positions)]
        gradient = jax.jit(jax.grad(answer))(
            put_weights(weights_of(cfg), cfg, devices), *arguments, put(probe, "BTD", devices)
        )
        embed_VD = np.asarray(gradient["embed"].get_value())
    depends = np.any(embed_VD[: tokens.size] != 0, axis=1).reshape(tokens.shape)
    return int(np.sum(depends != depends_BS(kind, segments[0], positions[0])))


def change_outside(kind: Kind, backend: str, mesh: dict[str, int]) -> float:
    """By how much other tokens of one document change the logits of the others; all of its own must change too."""
    cfg = kind.cfg.model_copy(update={"attention": backend})
    devices = mesh_of(**mesh)
    rng = np.random.default_rng(1)
    rows = np.stack([packed_row(rng, 10, 9, 7, first=7) for _ in range(B)])
    perturbed = rows.copy()
    perturbed[:, 18:26] = rng.integers(BOS_ID + 1, cfg.vocab_size, (B, 8))
    perturbed[:, 18] = rows[:, 18] + 1

    def logits_of(params: nnx.State, rows_BU: Array) -> Array:
        segments_BU, positions_BU = documents(rows_BU)
        model = nnx.merge(abstract_model(cfg)[0], params, {})
        tokens_BT, segments_BT, positions_BT = (place(x[None, :, :-1])[0] for x in (rows_BU, segments_BU, positions_BU))
        return logits(model, model(tokens_BT, segments_BT, positions_BT, cfg, causal=kind.causal)[0], cfg)

    with jax.set_mesh(devices):
        params = put_weights(weights_of(cfg), cfg, devices)
        forward = jax.jit(logits_of)
        before, after = (
            np.asarray(forward(params, put(r, "BU", devices)))[..., : cfg.vocab_size] for r in (rows, perturbed)
        )
    change_BT = np.max(np.abs(after - before), axis=2)
    inside = np.zeros(change_BT.shape[1], bool)
    # The document's BOS, which stays, sees the others where it may look ahead.
    inside[18 if kind.causal else 17 : 26] = True
    assert change_BT[:, inside].min() > 0
    return float(change_BT[:, ~inside].max())


def alone(rows: np.ndarray) -> np.ndarray:
    """Every document of the rows, each in a row of its own; padded with rows of padding to a multiple of B."""
    parts = []
    for row in rows:
        cuts = np.flatnonzero(row == BOS_ID)
        parts += [part for part in np.split(row, cuts) if part.any()]
    apart = np.zeros((-(-len(parts) // B) * B, rows.shape[1]), np.int32)
    for i, part in enumerate(parts):
        apart[i, : len(part)] = part
    return apart


def loss_of_packing(cfg: ModelConfig = CFG) -> float:
    """The difference between the packed rows' loss and that of their documents, each alone in a row; nats a token."""
    devices = mesh_of()

    def loss_sums(params: nnx.State, rows_ABU: Array) -> tuple[Array, Array]:
        batch: Batch = jax.tree.map(lambda x: x[0], causal.make_batch(rows_ABU, False))
        model = nnx.merge(abstract_model(cfg)[0], params, {})
        return objectives.sums(model, batch, cfg, CausalConfig())[1]["loss"], objectives.weights(batch, cfg)["loss"]

    with jax.set_mesh(devices):
        params = put_weights(weights_of(cfg), cfg, devices)
        forward = jax.jit(loss_sums)
        packed = ragged_rows(0)
        loss, weight = forward(params, put(packed[None], "ABU", devices))
        apart = [
            forward(params, put(rows[None], "ABU", devices))
            for rows in np.split(alone(packed), len(alone(packed)) // B)
        ]
    return abs(float(loss / weight) - float(sum(a for a, _ in apart) / sum(w for _, w in apart)))


# What is tried every day; compiling takes what time there is.
DAILY = ("chunked", SHARDED)


@pytest.mark.parametrize(
    ("backend", "mesh"), [DAILY, ("xla", {}), slowly("xla", SHARDED), slowly("chunked", {})], ids=str
)
def test_gradients_reach_exactly_what_is_visible(backend, mesh):
    assert wrong_dependences(KINDS["causal"], backend, mesh) == 0


# That attention itself reaches exactly what it sees is proved beside it, for more sights and both backends.
@pytest.mark.parametrize("name", [slowly("bidirectional"), slowly("local"), "local bidirectional"])
def test_gradients_reach_exactly_what_layers_of_any_kind_see(name):
    assert wrong_dependences(KINDS[name], *DAILY) == 0


@pytest.mark.parametrize(
    ("name", "backend", "mesh"),
    [
        pytest.param(name, backend, mesh, marks=[] if (backend, mesh) == DAILY else pytest.mark.slow)
        for name in KINDS
        for backend in ("xla", "chunked")
        for mesh in ({}, SHARDED)
    ],
)
def test_another_document_changes_the_logits_by_exactly_nothing(name, backend, mesh):
    assert change_outside(KINDS[name], backend, mesh) == 0


@pytest.mark.parametrize("cfg", [CFG, LOCAL], ids=["causal", "local"])
def test_packed_documents_have_the_loss_that_they_have_alone(cfg):
    assert loss_of_packing(cfg) < 2e-6


def test_nobody_looks_at_padding_and_a_segment_shared_with_it_is_seen():
    """By the gradient, by the embedding of padding, of what documents' tokens become where all look both ways."""
    devices = mesh_of()

    def seen(params: nnx.State, rows_ABU: Array, segments_ABT: Array) -> Array:
        batch: Batch = jax.tree.map(lambda x: x[0], causal.make_batch(rows_ABU, False))
        model = nnx.merge(abstract_model(CFG).graph, params, {})
        segments_BT = segments_ABT[0]
        x_BTD, _ = model(batch.tokens_BT, segments_BT, batch.positions_BT, CFG, causal=False)
        return jnp.sum(jnp.where((batch.tokens_BT != PAD_ID)[..., None], jnp.square(x_BTD), 0))

    def segments(rows_ABU: Array) -> tuple[Array, ...]:
        of = [segments_and_positions(rows_ABU, crosses)[0] for crosses in (False, True)]
        return *of, place(documents(rows_ABU)[0][..., :-1])

    with jax.set_mesh(devices):
        params, rows_ABU = put_weights(weights_of(CFG), CFG, devices), put(ragged_rows(0)[None], "ABU", devices)
        gradient = jax.jit(jax.grad(seen))
        weights = [
            np.abs(gradient(params, rows_ABU, segments_ABT)["embed"].get_value()[PAD_ID]).max()
            for segments_ABT in jax.jit(segments)(rows_ABU)
        ]
    assert weights[0] == weights[1] == 0 and weights[2] > 1e-3


# Planted defects.


def no_segments(attention: Callable) -> Callable:
    def defective(q, k, v, here, there, **how):
        blind = (places._replace(segments=jnp.zeros_like(places.segments)) for places in (here, there))
        return attention(q, k, v, *blind, **how)

    return defective


def not_causal(attention: Callable) -> Callable:
    return lambda *arguments, sight, **how: attention(*arguments, sight=sight._replace(causal=False), **how)


def keys_segments_shifted(attention: Callable) -> Callable:
    def defective(q, k, v, here, there, **how):
        return attention(q, k, v, here, there._replace(segments=jnp.roll(there.segments, 1, axis=1)), **how)

    return defective


def window_off_by_one(attention: Callable) -> Callable:
    def defective(*arguments, sight, **how):
        window = sight.window and sight.window + 1
        return attention(*arguments, sight=sight._replace(window=window), **how)

    return defective


def positions_of_the_row(attention: Callable) -> Callable:
    """Blocks and global tokens are counted from the row's beginning."""

    def defective(q, k, v, here, there, **how):
        counted = (p._replace(positions=jnp.cumsum(jnp.ones_like(p.positions), axis=1) - 1) for p in (here, there))
        return attention(q, k, v, *counted, **how)

    return defective


@pytest.mark.parametrize("defect", [no_segments, slowly(not_causal), slowly(keys_segments_shifted)])
def test_planted_defect_is_seen_by_gradient(defect, monkeypatch):
    monkeypatch.setattr(layers, "attention", defect(layers.attention))
    assert wrong_dependences(KINDS["causal"], "xla", {}) > 0


def test_planted_defect_is_seen_by_perturbation(monkeypatch):
    monkeypatch.setattr(layers, "attention", no_segments(layers.attention))
    assert change_outside(KINDS["causal"], "chunked", {}) > 1e-3


@pytest.mark.slow
def test_planted_window_is_seen_by_gradient(monkeypatch):
    monkeypatch.setattr(layers, "attention", window_off_by_one(layers.attention))
    assert wrong_dependences(KINDS["local"], "xla", {}) > 0


@pytest.mark.slow
def test_planted_global_tokens_of_other_documents_are_seen_by_perturbation(monkeypatch):
    visible = attention.visible

    def leaking(here, there, t_T, s_S, sight):
        return visible(here, there, t_T, s_S, sight) | (there.positions < sight.global_tokens)[:, None, :]

    monkeypatch.setattr(attention, "visible", leaking)
    assert change_outside(KINDS["local bidirectional"], "xla", {}) > 1e-4


@pytest.mark.parametrize("name", ["BOS_ID", slowly("PAD_ID")])
def test_planted_loss_on_borders_or_padding_is_seen(name, monkeypatch):
    monkeypatch.setattr(causal, name, -1)
    assert loss_of_packing() > 1e-3


def test_planted_leak_is_seen_by_the_loss(monkeypatch):
    monkeypatch.setattr(layers, "attention", no_segments(layers.attention))
    assert loss_of_packing() > 1e-3


@pytest.mark.slow
def test_planted_count_of_positions_is_seen_by_the_loss(monkeypatch):
    monkeypatch.setattr(layers, "attention", positions_of_the_row(layers.attention))
    assert loss_of_packing(LOCAL) > 1e-4
