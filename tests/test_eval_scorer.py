"""Scores: in closed form, independent of batch, packing and mesh, and equal to one document at a time."""

import functools
import lzma
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_jax.data.config import BOS_ID
from llm_jax.data.errors import DataError
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.figures import Sums, figures
from llm_jax.eval.perplexity import HeldOut, NotFinite, compressed, held_out_of, score_held_out
from llm_jax.eval.scorer import make_score
from llm_jax.model.transformer import abstract_model, logits
from tests.small import CFG as SMALL
from tests.small import mesh_of, put_weights, weights_of

# So few pieces that some first guesses are right.
CFG = SMALL.model_copy(update={"vocab_size": 20})
T = 32
# Lengths after BOS: empty, short, as long as a window, longer, and much longer.
LENGTHS = (0, 1, 7, 32, 33, 90, 3, 12, 40, 5)
# What an id stands for, in bytes; control ids stand for none.
PIECE_BYTES = np.where(np.arange(CFG.vocab_size) < 5, 0, 1 + np.arange(CFG.vocab_size) % 7).astype(np.int32)


def documents(seed=0):
    rng = np.random.default_rng(seed)
    tokens = [np.array([BOS_ID, *rng.integers(5, CFG.vocab_size, n)], np.int32) for n in LENGTHS]
    return [HeldOut(f"{n}", "", ids) for n, ids in enumerate(tokens)]


def score_all(params, held_out, *, mesh, stride=16, batch_rows=8):
    with jax.set_mesh(mesh):
        placed = (put_weights(params, CFG, mesh), {})
        return score_held_out(
            make_score(CFG), placed, held_out, PIECE_BYTES, seq_len=T, stride=stride, batch_rows=batch_rows
        )


@functools.cache
def forward():
    """Logits of one document at a time, in one shape; on one device."""
    with jax.set_mesh(mesh_of()):
        graph = abstract_model(CFG).graph

    @jax.jit
    def all_logits(params, tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(T)[None], tokens_BT.shape)
        model = nnx.merge(graph, params, {})
        return logits(model, model(tokens_BT, jnp.zeros_like(tokens_BT), positions_BT, CFG)[0], CFG)

    return all_logits


def one_by_one(params, tokens):
    """Nats and first guesses of every token but the first, the softmax being numpy's in float64."""
    n = len(tokens) - 1
    with jax.set_mesh(mesh_of()):
        tokens_BT = np.pad(tokens[:-1], (0, T - n))[None]
        logits_TV = np.asarray(forward()(put_weights(params, CFG, mesh_of()), tokens_BT)[0], np.float64)
    logits_TV = logits_TV[:n, : CFG.vocab_size]
    log_z_T = np.log(np.exp(logits_TV).sum(1))
    return log_z_T - logits_TV[np.arange(n), tokens[1:]], logits_TV.argmax(1) == tokens[1:]


def test_a_uniform_model_loses_log_v_a_token_and_its_bits_a_byte_follow_by_hand():
    zero = jax.tree.map(np.zeros_like, weights_of(CFG))
    sums = score_all(zero, documents(), mesh=mesh_of())
    scored = np.concatenate([document.tokens[1:] for document in documents()])
    n_bytes = PIECE_BYTES[scored].sum()
    told = figures(sums)
    assert told["loss"] == pytest.approx(math.log(20), rel=1e-6)
    assert told["perplexity"] == pytest.approx(20, rel=1e-5)
    assert told["tokens"] == sum(LENGTHS) and told["bytes"] == n_bytes
    assert told["bits_per_byte"] == pytest.approx(sum(LENGTHS) * math.log2(20) / n_bytes, rel=1e-6)
    assert told["accuracy"] == 0  # the lowest id among equals is padding


def test_documents_that_fit_into_a_window_score_as_one_by_one():
    weights = weights_of(CFG)
    fitting = [document for document in documents() if 1 < len(document.tokens) <= T + 1]
    expected = [one_by_one(weights, document.tokens) for document in fitting]
    sums = score_all(weights, fitting, mesh=mesh_of())
    assert sums.nll == pytest.approx(sum(nll.sum() for nll, _ in expected), rel=1e-5)
    assert sums.correct == sum(correct.sum() for _, correct in expected)


@pytest.mark.parametrize("stride", [1, 16, T])
def test_a_longer_document_scores_as_its_windows_one_by_one(stride):
    weights = weights_of(CFG)
    tokens = documents()[5].tokens
    nll = 0.0
    for start in range(0, len(tokens) - 1, stride):
        nll_N, _ = one_by_one(weights, tokens[start : start + T + 1])
        fresh = len(nll_N) if start == 0 else start + len(nll_N) - min(start - stride + T, len(tokens) - 1)
        nll += nll_N[len(nll_N) - fresh :].sum()
        if start + T >= len(tokens) - 1:
            break
    sums = score_all(weights, documents()[5:6], mesh=mesh_of(), stride=stride)
    assert sums.tokens == 90
    assert sums.nll == pytest.approx(nll, rel=1e-5)


@functools.cache
def one_row_at_a_time():
    return score_all(weights_of(CFG), documents(), mesh=mesh_of(), batch_rows=1)


@pytest.mark.parametrize(
    ("sizes", "batch_rows"),
    [
        ({}, 8),
        ({"context": 2, "fsdp": 2, "tensor": 2}, 2),
        pytest.param({}, 16, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, 8, marks=pytest.mark.slow),
        pytest.param({"tensor": 4, "data": 2}, 4, marks=pytest.mark.slow),
    ],
)
def test_neither_batch_nor_mesh_matters(sizes, batch_rows):
    alone = one_row_at_a_time()
    assert alone.tokens == sum(LENGTHS) and alone.correct > 0
    sums = score_all(weights_of(CFG), documents(), mesh=mesh_of(**sizes), batch_rows=batch_rows)
    assert sums.nll == pytest.approx(alone.nll, rel=1e-5)
    assert sums[1:] == alone[1:]


def test_a_shape_is_compiled_once(caplog):
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        score_all(weights_of(CFG), documents(), mesh=mesh_of(), batch_rows=2)
    assert sum("Compiling jit(forward)" in record.getMessage() for record in caplog.records) == 1


def test_weights_that_are_not_numbers_are_an_error():
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), weights_of(CFG))
    with pytest.raises(NotFinite, match="tokens have a loss that is not a number"):
        score_all(broken, documents(), mesh=mesh_of())


def test_figures_have_no_value_where_there_is_none():
    assert figures(Sums()) == dict.fromkeys(("loss", "perplexity", "bits_per_byte", "accuracy")) | {
        "tokens": 0,
        "bytes": 0,
    }
    assert figures(Sums(nll=math.nan, tokens=1, bytes=1))["loss"] is None
    assert figures(Sums(nll=5000.0, tokens=1, bytes=1))["perplexity"] is None


def test_compressors_see_all_texts_as_one():
    held_out = [HeldOut("a", "aé" * 500, np.empty(0)), HeldOut("b", "aé" * 500 + "\n", np.empty(0))]
    raw = ("aé" * 1000 + "\n").encode()
    assert compressed(held_out) == {
        "zlib_bits_per_byte": 8 * len(zlib.compress(raw, 9)) / len(raw),
        "lzma_bits_per_byte": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }


class Letters(Tokenizer):
    """One id a character."""

    def encode_many(self, texts, threads=None):
        return [np.array([ord(char) for char in text], np.int32) for text in texts]


def test_documents_are_read_in_the_order_of_their_names_and_every_byte_has_its_token():
    tokenizer = Letters(b"", "bpe")
    tokenizer.__dict__["piece_bytes"] = np.ones(300, np.int32)
    texts = [("b.txt", "hj"), ("a.txt", "abc"), ("a.txt.gz", "")]
    held_out = held_out_of(texts, tokenizer)
    assert [document[:2] for document in held_out] == sorted(texts)
    assert [document.tokens.tolist() for document in held_out] == [[BOS_ID, 97, 98, 99], [BOS_ID], [BOS_ID, 104, 106]]
    with pytest.raises(
        DataError, match=r"^c\.txt has 2 bytes, and its tokens stand for 1; bits per byte would be wrong"
    ):
        held_out_of([*texts, ("c.txt", "\u00e9")], tokenizer)
