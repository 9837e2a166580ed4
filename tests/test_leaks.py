"""A token sees what came before it in its own document and nothing else: by gradient, by perturbation, by the loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from llm_jax.batch import Batch, documents, place
from llm_jax.data.config import BOS_ID
from llm_jax.model import layers
from llm_jax.model.transformer import abstract_model, logits
from llm_jax.objective import causal
from llm_jax.objective import loss as objectives
from llm_jax.objective.config import CausalConfig
from tests.small import CFG, QUICKLY, B, mesh_of, packed_row, put, put_weights, ragged_rows, weights_of

SHARDED = {"context": 2, "fsdp": 2, "tensor": 2}

# Long enough for the chunked backend to take two blocks.
T = 128
ASKED = (0, 1, 19, 20, 21, 63, 64, 65, 66, 90, 100, 101, 102, 103, 126, 127)
STARTS = (20, 64, 66, 101, 102)
# Every token of the batch has an id of its own, so that the embedding's gradient tells positions apart.
MANY_IDS = CFG.model_copy(update={"vocab_size": len(ASKED) * T})


def visible_BS() -> np.ndarray:
    """Whether the position that row b asks about may depend on position s."""
    segments_S = np.searchsorted(STARTS, np.arange(T), side="right")
    return np.stack([(np.arange(T) <= t) & (segments_S == segments_S[t]) for t in ASKED])


def wrong_dependences(backend: str, mesh: dict[str, int]) -> int:
    """How many (asked position, position) have a gradient where there must be none, or none where there must be one."""
    cfg = MANY_IDS.model_copy(update={"attention": backend})
    devices = mesh_of(**mesh)
    tokens = np.arange(len(ASKED) * T, dtype=np.int32).reshape(len(ASKED), T)
    segments = np.tile(np.searchsorted(STARTS, np.arange(T), side="right").astype(np.int32), (len(ASKED), 1))
    positions = np.tile(np.arange(T, dtype=np.int32) - np.array((0, *STARTS))[segments[0]], (len(ASKED), 1)).astype(
        np.int32
    )
    probe = np.zeros((len(ASKED), T, cfg.d_model), np.float32)
    probe[np.arange(len(ASKED)), ASKED] = np.random.default_rng(0).normal(size=(len(ASKED), cfg.d_model))

    def answer(params: nnx.State, tokens_BT: Array, segments_BT: Array, positions_BT: Array, probe_BTD: Array) -> Array:
        model = nnx.merge(abstract_model(cfg)[0], params, {})
        return jnp.sum(model(tokens_BT, segments_BT, positions_BT, cfg)[0] * probe_BTD)

    with jax.set_mesh(devices):
        arguments = [put(array, "BT", devices) for array in (tokens, segments, positions)]
        gradient = jax.jit(jax.grad(answer), compiler_options=QUICKLY)(
            put_weights(weights_of(cfg), cfg, devices), *arguments, put(probe, "BTD", devices)
        )
        embed_VD = np.asarray(gradient["embed"].get_value())
    depends_BS = np.any(embed_VD[: tokens.size] != 0, axis=1).reshape(tokens.shape)
    return int(np.sum(depends_BS != visible_BS()))


def change_outside(backend: str, mesh: dict[str, int]) -> float:
    """By how much other tokens of one document change the logits of the others; all of its own must change too."""
    cfg = CFG.model_copy(update={"attention": backend})
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
        return logits(model, model(tokens_BT, segments_BT, positions_BT, cfg)[0], cfg)

    with jax.set_mesh(devices):
        params = put_weights(weights_of(cfg), cfg, devices)
        forward = jax.jit(logits_of, compiler_options=QUICKLY)
        before, after = (
            np.asarray(forward(params, put(r, "BU", devices)))[..., : cfg.vocab_size] for r in (rows, perturbed)
        )
    change_BT = np.max(np.abs(after - before), axis=2)
    inside = np.zeros(change_BT.shape[1], bool)
    inside[18:26] = True
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


def loss_of_packing() -> float:
    """The difference between the packed rows' loss and that of their documents, each alone in a row; nats a token."""
    devices = mesh_of()

    def loss_sums(params: nnx.State, rows_ABU: Array) -> tuple[Array, Array]:
        batch: Batch = jax.tree.map(lambda x: x[0], causal.make_batch(rows_ABU, False))
        model = nnx.merge(abstract_model(CFG)[0], params, {})
        return objectives.sums(model, batch, CFG, CausalConfig())[1]["loss"], objectives.weights(batch, CFG)["loss"]

    with jax.set_mesh(devices):
        params = put_weights(weights_of(CFG), CFG, devices)
        forward = jax.jit(loss_sums, compiler_options=QUICKLY)
        packed = ragged_rows(0)
        loss, weight = forward(params, put(packed[None], "ABU", devices))
        apart = [
            forward(params, put(rows[None], "ABU", devices))
            for rows in np.split(alone(packed), len(alone(packed)) // B)
        ]
    return abs(float(loss / weight) - float(sum(a for a, _ in apart) / sum(w for _, w in apart)))


BACKENDS = pytest.mark.parametrize("backend", ["xla", "chunked"])
ON = pytest.mark.parametrize("mesh", [{}, SHARDED], ids=["one device", "sharded"])


@ON
@BACKENDS
def test_gradients_reach_exactly_what_is_visible(backend, mesh):
    assert wrong_dependences(backend, mesh) == 0


@ON
@BACKENDS
def test_another_document_changes_the_logits_by_exactly_nothing(backend, mesh):
    assert change_outside(backend, mesh) == 0


def test_packed_documents_have_the_loss_that_they_have_alone():
    assert loss_of_packing() < 2e-6


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


@pytest.mark.parametrize("defect", [no_segments, not_causal, keys_segments_shifted])
def test_planted_defect_is_seen_by_gradient(defect, monkeypatch):
    monkeypatch.setattr(layers, "attention", defect(layers.attention))
    assert wrong_dependences("xla", {}) > 0


def test_planted_defect_is_seen_by_perturbation(monkeypatch):
    monkeypatch.setattr(layers, "attention", no_segments(layers.attention))
    assert change_outside("chunked", {}) > 1e-3


@pytest.mark.parametrize("name", ["BOS_ID", "PAD_ID"])
def test_planted_loss_on_borders_or_padding_is_seen(name, monkeypatch):
    monkeypatch.setattr(causal, name, -1)
    assert loss_of_packing() > 1e-3


def test_planted_leak_is_seen_by_the_loss(monkeypatch):
    monkeypatch.setattr(layers, "attention", no_segments(layers.attention))
    assert loss_of_packing() > 1e-3
