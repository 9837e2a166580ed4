"""Beam search: what it finds is what a plain search by full forward passes finds, and its scores are teacher-forced."""

import functools
import math

import jax
import numpy as np
import pytest

from llm_jax.config import ConfigError
from llm_jax.data.config import BOS_ID, EOS_ID
from llm_jax.eval import generate
from llm_jax.eval.beam import Finder, Searching, Text, make_finder, search
from llm_jax.eval.generate import Prompt, decoding, make_decoder
from llm_jax.eval.restore import for_decoding
from llm_jax.eval.sampling import Sampling
from llm_jax.model.transformer import abstract_model, logits
from tests.small import CFG as SMALL
from tests.small import mesh_of, put_weights, weights_of

CFG = SMALL.model_copy(update={"logit_soft_cap": None})
SEQ_LEN, N = 32, 10
WIDE = Searching(beams=3, length_penalty=0.6, max_tokens=N)
LONG = WIDE._replace(length_penalty=2.0)
ONE = Searching(beams=1, length_penalty=0.0, max_tokens=N)


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    monkeypatch.setattr(generate, "SHORTEST", 8)


@functools.cache
def weights():
    """Weights under which texts end now and then."""
    params = jax.tree.map(np.copy, weights_of(CFG))
    unembed_VD = params["unembed"][...]
    unembed_VD *= 2
    unembed_VD[EOS_ID] *= 3
    return params


@functools.cache
def on(sizes: tuple[tuple[str, int], ...]):
    mesh = mesh_of(**dict(sizes))
    with jax.set_mesh(mesh), for_decoding((put_weights(weights(), CFG, mesh), {}), CFG) as (placed, cfg):
        return placed, cfg, jax.sharding.get_mesh()


@functools.cache
def finder_on(searching: Searching, sizes: tuple[tuple[str, int], ...]) -> Finder:
    _, cfg, mesh = on(sizes)
    with jax.set_mesh(mesh):
        return make_finder(cfg, SEQ_LEN, searching)


@functools.cache
def found(searching: Searching, rows: range = range(5), **sizes: int) -> list[list[Text]]:
    """The best texts of these of the prompts."""
    placed, _, mesh = on(tuple(sizes.items()))
    with jax.set_mesh(mesh):
        *_, texts = search(finder_on(searching, tuple(sizes.items())), placed, [prompts()[row] for row in rows])
    return texts


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(2)
    return [Prompt([BOS_ID, *rng.integers(8, 250, n).tolist()], row) for row, n in enumerate((2, 9, 5, 7, 1))]


@functools.cache
def forward():
    with jax.set_mesh(mesh_of()):
        graph, params = abstract_model(CFG).graph, put_weights(weights(), CFG, mesh_of())

        def log_shares(tokens_BT):
            model = generate.nnx.merge(graph, params, {})
            positions_BT = jax.numpy.arange(tokens_BT.shape[1])[None]
            hidden_BTD, _ = model(tokens_BT, jax.numpy.zeros_like(tokens_BT), positions_BT, CFG)
            return jax.nn.log_softmax(logits(model, hidden_BTD, CFG))

        return jax.jit(log_shares)


@functools.cache
def next_nats(ids: tuple[int, ...]) -> np.ndarray:
    """Log-likelihood of every next token, by a full forward pass."""
    tokens_BT = np.asarray([[*ids] + [0] * (SEQ_LEN - len(ids))], np.int32)
    with jax.set_mesh(mesh_of()):
        return np.asarray(forward()(tokens_BT)[0, len(ids) - 1], np.float64)


def plain_search(prompt: Prompt, searching: Searching) -> list[Text]:
    """The same search in a few lines of Python."""
    W, alpha, longest = searching

    def score(nats: float, n: int) -> float:
        return nats / ((5 + n) / 6) ** alpha

    live: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[Text] = []
    for n in range(1, longest + 1):
        candidates = []
        for nats, ids in live:
            more_V = next_nats((*prompt.ids, *ids))
            candidates += [(nats + more_V[v], [*ids, int(v)]) for v in np.argsort(-more_V)[: 2 * W]]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * W]
        ended += [
            Text(ids[:-1], nats, score(nats, n), True) for nats, ids in candidates[:W] if ids[-1] in (EOS_ID, BOS_ID)
        ]
        ended = sorted(ended, key=lambda text: -text.score)[:W]
        live = [c for c in candidates if c[1][-1] not in (EOS_ID, BOS_ID)][:W]
        if len(ended) == W and score(live[0][0], longest) <= ended[-1].score:
            return ended
    ended += [Text(ids, nats, score(nats, longest), False) for nats, ids in live]
    return sorted(ended, key=lambda text: -text.score)[:W]


def same(texts: list[Text], expected: list[Text]) -> None:
    """The same texts in the same order; where two scores are closer than 1e-4, in either."""
    np.testing.assert_allclose([t.score for t in texts], [t.score for t in expected], atol=1e-4)
    np.testing.assert_allclose([t.log_likelihood for t in texts], [t.log_likelihood for t in expected], atol=1e-4)
    scores = [t.score for t in expected]
    for n, (one, other) in enumerate(zip(texts, expected, strict=True)):
        if all(abs(scores[n] - score) > 1e-4 for m, score in enumerate(scores) if m != n):
            assert (one.ids, one.ended) == (other.ids, other.ended)


@pytest.mark.parametrize("searching", [WIDE, pytest.param(LONG, marks=pytest.mark.slow)])
def test_it_finds_what_a_plain_search_finds_and_some_texts_end(searching: Searching) -> None:
    texts = found(searching)
    for prompt, best in zip(prompts(), texts, strict=True):
        assert len(best) == searching.beams
        same(best, plain_search(prompt, searching))
    kinds = {text.ended for best in texts for text in best}
    assert kinds == {True, False}, "choose other weights: all texts end, or none does"


def test_likelihoods_are_teacher_forced_sums() -> None:
    """An end may be spelled by two tokens."""
    for prompt, best in zip(prompts(), found(WIDE), strict=True):
        for text in best:
            ids = [*prompt.ids]
            nats = 0.0
            for i in text.ids:
                nats += next_nats(tuple(ids))[i]
                ids.append(i)
            ends = [next_nats(tuple(ids))[end] for end in (EOS_ID, BOS_ID)] if text.ended else [0.0]
            assert min(abs(nats + end - text.log_likelihood) for end in ends) < 1e-4
            n = len(text.ids) + text.ended
            assert math.isclose(text.score, text.log_likelihood / ((5 + n) / 6) ** 0.6, rel_tol=1e-5)


@pytest.mark.slow
def test_one_beam_is_greedy_decoding() -> None:
    placed, cfg, mesh = on(())
    with jax.set_mesh(mesh):
        decoder = make_decoder(cfg, SEQ_LEN, Sampling(max_tokens=N, temperature=0.0))
        pieces = list(decoding(decoder, placed, prompts()))
    for best, parts in zip(found(ONE), zip(*pieces, strict=True), strict=True):
        (text,) = best
        assert text.ids == [i for piece in parts for i in piece.ids]
        assert text.ended == parts[-1].ended
        assert math.isclose(text.log_likelihood, sum(nats for piece in parts for nats in piece.nats), rel_tol=1e-4)


def test_one_beam_takes_the_likeliest_token_each_time() -> None:
    for prompt, (text,) in zip(prompts(), found(ONE), strict=True):
        ids, total, ended = list(prompt.ids), 0.0, False
        while not ended and len(ids) < len(prompt.ids) + N:
            nats_V = next_nats(tuple(ids))
            ids.append(int(nats_V.argmax()))
            total, ended = total + nats_V.max(), ids[-1] in (EOS_ID, BOS_ID)
        assert (text.ids, text.ended) == (ids[len(prompt.ids) : len(ids) - ended], ended)
        assert math.isclose(text.log_likelihood, total, rel_tol=1e-4)


def test_neither_mesh_nor_batch_changes_what_is_found() -> None:
    """Three of the five prompts on a mesh, with a row to fill it up."""
    for best, on_one_device in zip(found(WIDE, range(1, 4), fsdp=2, tensor=2), found(WIDE)[1:4], strict=True):
        same(best, on_one_device)


@pytest.mark.slow
def test_a_batch_changes_nothing() -> None:
    (alone,) = found(WIDE, range(1, 2))
    same(alone, found(WIDE)[1])


def test_more_beams_than_the_vocabulary_has_candidates_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"126 beams: at most half of model\.vocab_size = 250"):
        finder_on(Searching(beams=126), ())
