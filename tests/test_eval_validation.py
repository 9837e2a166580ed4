"""The look at held-out rows during training: exact sums over the first rows, whatever the batch and the mesh."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from flax import nnx

from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.data.loader import Rows
from llm_jax.eval import validation as validation_module
from llm_jax.eval.config import EvalConfig
from llm_jax.eval.figures import Figures
from llm_jax.eval.scorer import make_score
from llm_jax.eval.validation import make_validation
from llm_jax.eval.windows import Rows as Asked
from llm_jax.model.backends import resolve
from llm_jax.model.config import LayerConfig, MoeConfig
from llm_jax.objective.config import CausalConfig, MlmConfig
from tests.small import CFG, U, mesh_of, put_weights, ragged_rows, weights_of

# No control id stands for text; here they do, so that counting one shows.
PIECE_BYTES = (1 + np.arange(CFG.vocab_size) % 7).astype(np.int32)
WORD_STARTS = np.stack([np.arange(CFG.vocab_size) % 3 == 0, np.arange(CFG.vocab_size) % 5 == 0], axis=1)
OBJECTIVE = CausalConfig(z_loss=1e-3)
ROWS_NU = np.concatenate([ragged_rows(0), ragged_rows(1)[:5]])


@dataclasses.dataclass(frozen=True)
class Records:
    """Rows as the bytes that the store has of them."""

    rows_NU: np.ndarray

    def __len__(self) -> int:
        return len(self.rows_NU)

    def __getitems__(self, numbers: Sequence[int]) -> list[bytes]:
        return [self.rows_NU[n].astype(np.uint16).tobytes() for n in numbers]


def validation(mesh, *, rows=64, batch_rows=8, cross_documents=False, objective=OBJECTIVE, seed=0, cfg=CFG):
    """(the function, weights to call it with); the mesh must be set."""
    stored = Rows(Records(ROWS_NU), U, np.dtype(np.uint16), None)
    config = EvalConfig(rows=rows, batch_rows=batch_rows)
    cfg = resolve(cfg, "cpu", 1)
    validate = make_validation(
        cfg,
        objective,
        config,
        stored,
        PIECE_BYTES,
        WORD_STARTS,
        seed=seed,
        cross_documents=cross_documents,
    )
    return validate, (put_weights(weights_of(cfg), cfg, mesh), nnx.State({}))


def look(mesh, **wanted) -> Figures:
    with jax.set_mesh(mesh):
        validate, params = validation(mesh, **wanted)
        figures = validate(params, lambda: False)
    assert figures is not None
    return figures


@functools.cache
def scores():
    """Targets, which of them are scored, and nats and first guesses by the scorer, of all rows."""
    rows_NU = ROWS_NU
    starts = rows_NU == BOS_ID
    targets = rows_NU[:, 1:]
    scored = (targets != BOS_ID) & (targets != PAD_ID)
    index = np.arange(U)[None]
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    asked = Asked(
        rows_NU[:, :-1],
        np.cumsum(starts, 1)[:, :-1].astype(np.int32),
        positions[:, :-1].astype(np.int32),
        targets,
        scored,
    )
    with jax.set_mesh(mesh_of()):
        told = make_score(CFG)((put_weights(weights_of(CFG), CFG, mesh_of()), nnx.State({})), asked)
    return targets, scored, *told


def by_the_scorer(n_rows):
    """The same figures from each token's score, added up by numpy."""
    targets, scored, nll, correct = (of_rows[:n_rows] for of_rows in scores())
    tokens, n_bytes = int(scored.sum()), int(PIECE_BYTES[targets[scored]].sum())
    loss = nll[scored].sum(dtype=np.float64) / tokens
    return {
        "loss": pytest.approx(loss, rel=1e-6),
        "perplexity": pytest.approx(math.exp(loss), rel=1e-5),
        "bits_per_byte": pytest.approx(loss * tokens / math.log(2) / n_bytes, rel=1e-6),
        "accuracy": correct[scored].sum() / tokens,
        "tokens": tokens,
        "bytes": n_bytes,
    }


@pytest.mark.parametrize("n_rows", [3, 8, 13, 64])
def test_figures_are_over_the_first_rows_and_the_same_by_the_scorer(n_rows):
    expected = by_the_scorer(n_rows)
    assert look(mesh_of(), rows=n_rows) == expected


MESHES = [
    ({"fsdp": 2}, 16),
    ({"context": 2, "tensor": 2}, 4),
    pytest.param({}, 1, marks=pytest.mark.slow),
    pytest.param({"fsdp": 8}, 8, marks=pytest.mark.slow),
    pytest.param({"context": 2, "fsdp": 2, "tensor": 2}, 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sizes", "batch_rows"), MESHES)
def test_neither_batch_nor_mesh_matters(sizes, batch_rows):
    assert look(mesh_of(**sizes), rows=13, batch_rows=batch_rows) == by_the_scorer(13)


def test_attention_across_documents_is_what_the_model_was_trained_with():
    assert look(mesh_of(), cross_documents=True)["loss"] != pytest.approx(look(mesh_of())["loss"], rel=1e-3)


def test_it_asks_once_before_each_batch_and_stops_when_told():
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == 6

    with jax.set_mesh(mesh_of()):
        validate, params = validation(mesh_of(), rows=13, batch_rows=4)
        assert validate(params, stop) is not None and len(asked) == 4
        assert validate(params, stop) is None and len(asked) == 6


def test_it_is_compiled_once(caplog):
    with jax.set_mesh(mesh_of()), jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        validate, params = validation(mesh_of(), rows=13, batch_rows=4)
        validate(params, lambda: False)
        validate(params, lambda: False)
    assert sum("Compiling jit(sums)" in record.getMessage() for record in caplog.records) == 1


@functools.cache
def hidden_words(seed=0, batch_rows=8, **sizes):
    objective = MlmConfig(unit="word", rate=0.3)
    return look(mesh_of(**sizes), rows=13, batch_rows=batch_rows, objective=objective, seed=seed)


@pytest.mark.parametrize(("sizes", "batch_rows"), MESHES[1:])
def test_masks_follow_from_the_row_whatever_the_batch_and_the_mesh(sizes, batch_rows):
    whole = hidden_words()
    assert whole["bits_per_byte"] is None and whole["loss"] is not None and whole["perplexity"] is not None
    close = {"loss": pytest.approx(whole["loss"], rel=1e-6), "perplexity": pytest.approx(whole["perplexity"], rel=1e-5)}
    assert hidden_words(batch_rows=batch_rows, **sizes) == whole | close


@pytest.mark.slow
def test_masks_follow_from_the_seed():
    whole, other = hidden_words(), hidden_words(seed=1)
    assert other["bytes"] != whole["bytes"] and other["loss"] != whole["loss"]


MOE = MoeConfig(experts=4, top_k=2, d_ff=8)


def test_experts_have_room_for_all(monkeypatch):
    models = []
    monkeypatch.setattr(validation_module, "make_row_sums", lambda cfg, *_: models.append(cfg))
    for capacity_factor in (None, 0.25):
        moe = MOE.model_copy(update={"capacity_factor": capacity_factor})
        with jax.set_mesh(mesh_of()):
            validation(mesh_of(), cfg=CFG.model_copy(update={"period": (LayerConfig(moe=True),), "moe": moe}))
    free, tight = models
    assert free == tight and free.moe.capacity_factor is None


@pytest.mark.slow
def test_experts_drop_nothing():
    free = CFG.model_copy(update={"period": (LayerConfig(moe=True),), "moe": MOE})
    tight = free.model_copy(update={"moe": MOE.model_copy(update={"capacity_factor": 0.25})})
    assert look(mesh_of(), cfg=tight) == look(mesh_of(), cfg=free)
