"""Pseudo-log-likelihoods: sums over single masks, whatever shares a row, a batch, a mesh or a job."""

import functools
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.config import BOS_ID, MASK_ID, PAD_ID, TokenizerConfig
from llm_jax.eval import pseudo
from llm_jax.eval.perplexity import HeldOut, NotFinite
from llm_jax.eval.pseudo import (
    Inside,
    MaskedScore,
    Questions,
    Told,
    drawn_places,
    make_masked_score,
    masked_scores,
    pseudo_log_likelihoods,
    pseudo_perplexity,
    word_ends,
)
from llm_jax.eval.requests import Likelihood, Pair, pair_of
from llm_jax.model.transformer import abstract_model, logits
from llm_jax.objective.config import MlmConfig
from llm_jax.objective.mlm import unit_numbers
from tests.conftest import LaunchProcesses
from tests.small import CFG as SMALL
from tests.small import mesh_of, put_weights

SEQ_LEN = 64
V = 300
CFG = SMALL.model_copy(update={"vocab_size": V})
WORD_STARTS_V = np.arange(2 * V).reshape(V, 2) % 3 == 0
WORDS = {"original": None, "within_word_l2r": WORD_STARTS_V}


@functools.cache
def drawn_weights() -> nnx.State:
    """Numpy weights that no device has made, so that every process has them."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh_of()):
        shapes = abstract_model(CFG).params
    return jax.tree.map(lambda x: rng.normal(float(x.ndim == 1), 0.2, x.shape).astype(x.dtype), shapes)


@functools.cache
def score_of(sizes: tuple[tuple[str, int], ...]) -> tuple[MaskedScore, jax.sharding.Mesh]:
    mesh = mesh_of(**dict(sizes))
    with jax.set_mesh(mesh):
        return make_masked_score(CFG), mesh


def asked(pairs, words_V2=None, *, batch_rows=8, seq_len=SEQ_LEN, params=None, stop=lambda: False, **sizes):
    score, mesh = score_of(tuple(sizes.items()))
    with jax.set_mesh(mesh):
        weights = (put_weights(drawn_weights() if params is None else params, CFG, mesh), {})
        return pseudo_log_likelihoods(
            score, weights, pairs, words_V2, seq_len=seq_len, batch_rows=batch_rows, stop=stop
        )


@functools.cache
def drawn_pairs() -> list[Pair]:
    """Of every kind of length: nothing asked, one token, a few that share a row, just the window, and more than it."""
    rng = np.random.default_rng(0)
    sizes = [(0, 0), (5, 0), (0, 1), (3, 4), (30, 2), (2, 9), (1, 1), (59, 4), (60, 4), (100, 3), (0, 90)]
    return [Pair([BOS_ID, *rng.integers(5, V, a).tolist()], rng.integers(5, V, b).tolist()) for a, b in sizes]


@functools.cache
def alone():
    """Log-probabilities [V] at a place of ids [T], from a row that holds nothing else: no batch, no sharing."""
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        graph = abstract_model(CFG).graph

    def of(weights, tokens_BT, n, place):
        model = nnx.merge(graph, *weights)
        index_BT = jnp.arange(SEQ_LEN)[None]
        x_BTD, _ = model(tokens_BT, jnp.where(index_BT < n, 0, -1), index_BT, CFG, causal=False)
        return jax.nn.log_softmax(logits(model, x_BTD, CFG)[0, place])

    with jax.set_mesh(mesh):
        return jax.jit(of), (put_weights(drawn_weights(), CFG, mesh), {}), mesh


def one_mask_at_a_time(pair: Pair, words_V2) -> tuple[float, bool, int]:
    """The plain loop."""
    ids = [*pair.context, *pair.continuation]
    forward, weights, mesh = alone()
    nats, greedy = 0.0, True
    for place in range(len(pair.context), len(ids)):
        hidden = [place]
        while words_V2 is not None and hidden[-1] + 1 < len(ids):
            last, following = ids[hidden[-1]], ids[hidden[-1] + 1]
            if words_V2[last, 1] or words_V2[following, 0]:
                break
            hidden.append(hidden[-1] + 1)
        start = 0 if len(ids) <= SEQ_LEN else min(max(place - SEQ_LEN // 2, 0), len(ids) - SEQ_LEN)
        seen = [MASK_ID if n in hidden else i for n, i in enumerate(ids)][start : start + SEQ_LEN]
        tokens_BT = np.array([seen + [PAD_ID] * (SEQ_LEN - len(seen))], np.int32)
        with jax.set_mesh(mesh):
            told_V = np.asarray(forward(weights, tokens_BT, np.int32(len(seen)), np.int32(place - start)))
        nats += float(told_V[ids[place]])
        greedy &= int(told_V.argmax()) == ids[place]
    return nats, greedy, len(pair.continuation)


@functools.cache
def expected(variant: str) -> list[tuple[float, bool, int]]:
    return [one_mask_at_a_time(pair, WORDS[variant]) for pair in drawn_pairs()]


def assert_alike(ours, theirs):
    assert [answer[1:] for answer in ours] == [tuple(answer[1:]) for answer in theirs]
    nats = [answer[0] for answer in ours]
    assert nats == pytest.approx([answer[0] for answer in theirs], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("variant", WORDS)
def test_it_is_the_sum_of_a_plain_loop_over_single_masks(variant):
    answers = asked(drawn_pairs(), WORDS[variant])
    assert_alike(answers, expected(variant))
    assert answers[0] == answers[1] == Likelihood(0.0, True, 0)


def test_the_two_variants_differ_where_words_have_several_tokens():
    both = zip(drawn_pairs(), expected("original"), expected("within_word_l2r"), strict=True)
    assert sum(abs(first[0] - second[0]) > 1e-3 for pair, first, second in both if len(pair.continuation) > 3) >= 4


@pytest.mark.parametrize("defect", ["later tokens seen", "BOS hidden", "neighbours seen"])
def test_a_defect_is_another_number(defect, monkeypatch):
    made = pseudo._questions

    def questions(rows, texts, *shape):
        right = made(rows, texts, *shape)
        match defect:
            case "later tokens seen":
                rows = [[copy._replace(hidden_to=copy.place + 1) for copy in copies] for copies in rows]
                return made(rows, texts, *shape)
            case "BOS hidden":
                return right._replace(tokens_BT=np.where(right.tokens_BT == BOS_ID, MASK_ID, right.tokens_BT))
            case "neighbours seen":
                return right._replace(segments_BT=np.minimum(right.segments_BT, 1))

    monkeypatch.setattr(pseudo, "_questions", questions)
    answers = asked(drawn_pairs(), WORD_STARTS_V)
    with pytest.raises(AssertionError):
        assert_alike(answers, expected("within_word_l2r"))


def test_neither_batch_nor_order_nor_mesh_matters():
    pairs, right = drawn_pairs(), expected("within_word_l2r")
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    assert_alike(asked([pairs[n] for n in order], WORD_STARTS_V), [right[n] for n in order])
    for n in (3, 9):
        assert_alike(asked([pairs[n]], WORD_STARTS_V), [right[n]])
    for sizes, batch_rows in ({"fsdp": 2, "tensor": 2, "data": 2}, 4), ({"tensor": 2, "context": 2, "data": 2}, 2):
        assert_alike(asked(pairs, WORD_STARTS_V, batch_rows=batch_rows, **sizes), right)


def test_scores_that_are_not_numbers_are_an_error_and_nothing_asked_is_none():
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), drawn_weights())
    with pytest.raises(NotFinite, match=r"^1 of 2 texts have a score that is not a number: the weights are broken"):
        asked([Pair([BOS_ID], []), Pair([BOS_ID], [5, 6])], params=broken)
    assert asked([Pair([BOS_ID], [])], params=broken) == [Likelihood(0.0, True, 0)]
    assert asked([], params=broken) == []


def test_it_stops_between_batches():
    answers = iter([False, True])
    assert asked(drawn_pairs(), stop=lambda: next(answers)) is None


def test_words_are_those_that_training_hides():
    rng = np.random.default_rng(1)
    for _ in range(20):
        ids_T = rng.integers(0, V, 40)
        unit_T = np.asarray(unit_numbers(jnp.asarray(ids_T), jax.random.key(0), MlmConfig(unit="word"), WORD_STARTS_V))
        for place, end in enumerate(word_ends(ids_T, WORD_STARTS_V)):
            same = range(place, end) if unit_T[place] else [place]
            assert len(set(unit_T[list(same)])) == 1
            assert end == len(ids_T) or not unit_T[end] or unit_T[end] != unit_T[place]


class Counting:
    """Not a model: it says how much work it was given, and answers with a token's number and its place."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.places = 0

    def __call__(self, weights: object, asked: Questions) -> Told:
        self.shapes.append((*asked.tokens_BT.shape, asked.places_BN.shape[1]))
        self.places += int((asked.segments_BT > 0).sum())
        return Told(asked.targets_BN.astype(np.float32), asked.targets_BN > 9)


def counted(texts, seq_len, batch_rows=4):
    count = Counting()
    with jax.set_mesh(mesh_of()):
        return count, masked_scores(count, None, texts, None, seq_len=seq_len, batch_rows=batch_rows)


def test_many_texts_cost_few_shapes_and_little_padding():
    rng = np.random.default_rng(2)
    texts = []
    for _ in range(200):
        n = int(rng.integers(8, 128))
        texts.append(Inside(rng.integers(5, V, n), np.sort(rng.permutation(n)[: n // 3])))
    count, told = counted(texts, 128)
    assert set(count.shapes) <= {(8, 64, 8), (4, 128, 16)}
    assert count.places > 0.85 * sum(B * T for B, T, _ in count.shapes)
    for text, answer in zip(texts, told, strict=True):
        np.testing.assert_array_equal(answer.nll_N, np.asarray(text.ids)[text.places])


def test_windows_and_texts_of_any_size_hold_what_is_asked():
    for seq_len in (4, 8, 100):
        for n in (1, 2, 3, 7, 8, 9, 150):
            ids = np.arange(5, 5 + n)
            _, (told,) = counted([Inside(ids, range(n))], seq_len)
            np.testing.assert_array_equal(told.nll_N, ids)
            np.testing.assert_array_equal(told.correct_N, ids > 9)


def test_every_token_but_bos_may_be_drawn_for_the_pseudo_perplexity():
    held_out = [HeldOut(str(n), "", np.array([BOS_ID, *range(5, 5 + n)], np.int32)) for n in (3, 0, 40)]
    every = drawn_places(held_out, 1000, 0)
    assert [list(text.places) for text in every] == [[1, 2, 3], [], list(range(1, 41))]
    some = drawn_places(held_out, 20, 0)
    assert sum(len(text.places) for text in some) == 20 == len({(n, p) for n, t in enumerate(some) for p in t.places})
    assert all(0 < place < len(text.ids) for text in some for place in text.places)
    again, other = drawn_places(held_out, 20, 0), drawn_places(held_out, 20, 1)
    assert repr(again) == repr(some) != repr(other)


def test_pseudo_perplexity_is_of_all_tokens_together():
    told = [Told(np.array(nats, np.float32), np.ones(len(nats), bool)) for nats in ([1.0, 2.0], [], [4.0])]
    figure = pseudo_perplexity(told)
    assert figure is not None and figure["value"] == pytest.approx(math.exp(7 / 3))
    assert math.exp(1) <= figure["low"] < figure["value"] < figure["high"] <= math.exp(4) + 1e-6
    assert pseudo_perplexity([told[1]]) is None
    assert pseudo_perplexity([Told(np.array([800.0], np.float32), np.ones(1, bool))]) is None


def test_text_of_any_kind_is_scored():
    tokenizer = tokenizers.train(["the cat sat on the mat.\nthe dog ran to the cat.\n" * 30], TokenizerConfig(), V)
    texts = [("", ""), ("", " "), (" ", "\n"), ("the \u6f22", "\u5b57\U0001f600"), ("the c", "at sat"), ("", "x")]
    pairs = [pair_of(tokenizer, *text) for text in texts]
    answers = asked(pairs, tokenizer.word_starts)
    assert_alike(answers, [one_mask_at_a_time(pair, tokenizer.word_starts) for pair in pairs])
    assert [answer.tokens for answer in answers[:4]] == [0, 1, 1, 7]


PROGRAM = """
import json, os
import tests.conftest
os.environ["JAX_NUM_CPU_DEVICES"] = "2"
from llm_jax.distributed import join_processes
join_processes(100, 100)
from tests.test_eval_pseudo import WORD_STARTS_V, asked, drawn_pairs
print("answers", json.dumps(asked(drawn_pairs(), WORD_STARTS_V, fsdp=2, data=2)))
"""


@pytest.mark.slow
def test_two_processes_answer_as_one(launch_processes: LaunchProcesses):
    for done in launch_processes(2, 2, ["-c", PROGRAM]):
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("answers")]
        assert_alike(
            [Likelihood(*answer) for answer in json.loads(line.removeprefix("answers"))],
            asked(drawn_pairs(), WORD_STARTS_V),
        )
