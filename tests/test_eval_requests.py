"""Requests: a bigram model's answers are sums over its table, whatever shares a row, a batch, a mesh or a job."""

import functools
import json
import math
import random

import jax
import numpy as np
import pytest

from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.config import BOS_ID, TokenizerConfig
from llm_jax.data.tokenizer import SPACE
from llm_jax.eval import requests
from llm_jax.eval.perplexity import NotFinite
from llm_jax.eval.requests import Likelihood, Pair, lengths, log_likelihoods, pair_of, rolling
from llm_jax.eval.scorer import Score, Scores, make_score
from llm_jax.eval.windows import Rows
from llm_jax.model.config import ModelConfig
from tests.bigram import config_of, drawn_table, log_softmax, weights_for
from tests.conftest import LaunchProcesses
from tests.small import CFG as SMALL
from tests.small import mesh_of, put_weights, weights_of

V = 20
# Rows of 64 and 128 tokens, and where many programs are compared, of 64 alone.
SEQ_LEN, SHORT = 128, 64
BIGRAM = config_of(V)
# A model that looks at all that it is shown.
SEEING = SMALL.model_copy(update={"vocab_size": V})


@functools.cache
def score_of(cfg: ModelConfig, sizes: tuple[tuple[str, int], ...]) -> tuple[Score, jax.sharding.Mesh]:
    mesh = mesh_of(**dict(sizes))
    with jax.set_mesh(mesh):
        return make_score(cfg), mesh


def asked(params, pairs, cfg=BIGRAM, *, seq_len=SEQ_LEN, batch_rows=8, stop=lambda: False, **sizes):
    score, mesh = score_of(cfg, tuple(sizes.items()))
    with jax.set_mesh(mesh):
        weights = (put_weights(params, cfg, mesh), {})
        return log_likelihoods(score, weights, pairs, seq_len=seq_len, batch_rows=batch_rows, stop=stop)


def some_pairs(seed=0, n=40):
    """Contexts and continuations of every kind of length: none, one token, and more than two windows."""
    rng = np.random.default_rng(seed)
    sizes = [(0, 0), (0, 1), (0, 300), (5, 0), (400, 1), (400, 300), (127, 1), (128, 1), (1, 127), (1, 128), (1, 129)]
    # Every other one is short: several share a row.
    longest = [(150, 40) if k % 2 else (12, 8) for k in range(n - len(sizes))]
    sizes += [(int(rng.integers(0, a)), int(rng.integers(1, b))) for a, b in longest]
    ids = [(rng.integers(5, V, a).tolist(), rng.integers(5, V, b).tolist()) for a, b in sizes]
    return [Pair([BOS_ID, *context], continuation) for context, continuation in ids]


def greedy_pair(table):
    """A continuation that the bigram model itself would write."""
    ids = [7]
    for _ in range(9):
        ids.append(int(table[ids[-1]].argmax()))
    return Pair([BOS_ID, 7], ids[1:])


def by_table(pair, table):
    """The closed form."""
    before = [pair.context[-1], *pair.continuation][: len(pair.continuation)]
    nats = log_softmax(table)[before, pair.continuation].sum()
    greedy = all(table[a].argmax() == b for a, b in zip(before, pair.continuation, strict=True))
    return nats, greedy, len(pair.continuation)


def assert_alike(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[0] == pytest.approx(other[0], rel=tolerance, abs=tolerance)
        assert mine[1:] == other[1:]


def test_a_bigram_models_answers_are_sums_over_its_table():
    table = drawn_table(V)
    pairs = [*some_pairs(), greedy_pair(table)]
    answers = asked(weights_for(table), pairs)
    assert_alike(answers, [by_table(pair, table) for pair in pairs])
    assert answers[-1].greedy and answers[-1].tokens == 9 and sum(answer.greedy for answer in answers) < 10
    assert answers[0] == Likelihood(0.0, True, 0)


def seen(pairs, batch_rows, **sizes):
    return asked(weights_of(SEEING), pairs, SEEING, seq_len=SHORT, batch_rows=batch_rows, **sizes)


@functools.cache
def each_alone():
    return [seen([pair], 1)[0] for pair in some_pairs()]


def test_neither_batch_nor_order_matters():
    alone, pairs = each_alone(), some_pairs()
    assert_alike(seen(pairs, 8), alone)
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    assert_alike(seen([pairs[n] for n in order], 8), [alone[n] for n in order])


@pytest.mark.parametrize(
    ("sizes", "batch_rows"),
    [({"tensor": 2, "data": 2, "context": 2}, 2), pytest.param({"fsdp": 8}, 8, marks=pytest.mark.slow)],
)
def test_no_mesh_matters(sizes, batch_rows):
    assert_alike(seen(some_pairs(), batch_rows, **sizes), each_alone())


def test_neighbours_that_are_seen_are_noticed(monkeypatch):
    weights, pairs = weights_of(SEEING), some_pairs()
    right = asked(weights, pairs, SEEING, seq_len=SHORT)
    apart = requests.row_of

    def together(held, length):
        row = apart(held, length)
        return row._replace(segments_BT=np.minimum(row.segments_BT, 1))

    monkeypatch.setattr(requests, "row_of", together)
    leaked = asked(weights, pairs, SEEING, seq_len=SHORT)
    assert sum(abs(a[0] - b[0]) > 1e-3 for a, b in zip(right, leaked, strict=True)) > 5


def test_what_is_asked_is_given_all_the_context_that_fits():
    """A window that lost a token of context, or a neighbour that is seen, is another number."""
    weights = weights_of(SEEING)
    pairs = [pair for pair in some_pairs() if 0 < len(pair.continuation) <= SHORT]
    cut = [Pair(pair.context[-(SHORT + 1 - len(pair.continuation)) :], pair.continuation) for pair in pairs]
    assert cut != pairs
    answers = asked(weights, pairs, SEEING, seq_len=SHORT)
    assert_alike(answers, asked(weights, cut, SEEING, seq_len=SHORT))
    fewer = [(n, Pair(pair.context[1:], pair.continuation)) for n, pair in enumerate(cut) if len(pair.context) > 1]
    others = asked(weights, [pair for _, pair in fewer], SEEING, seq_len=SHORT)
    for (n, _), other in zip(fewer, others, strict=True):
        assert abs(answers[n].log_likelihood - other.log_likelihood) > 1e-5


def test_a_long_continuation_is_asked_in_windows_that_share_no_token():
    weights = weights_of(SEEING)
    ids = some_pairs()[5].continuation[:150]
    # 64 after one token of context, 64 after one, the last 22 after 43.
    whole = [9, *ids]
    parts = [Pair(whole[:1], whole[1:65]), Pair(whole[64:65], whole[65:129]), Pair(whole[86:129], whole[129:])]
    (answer,) = asked(weights, [Pair([BOS_ID, 6, 9], ids)], SEEING, seq_len=SHORT)
    apart = asked(weights, parts, SEEING, seq_len=SHORT)
    assert answer.tokens == 150 == sum(part.tokens for part in apart)
    assert answer.log_likelihood == pytest.approx(sum(part.log_likelihood for part in apart), rel=1e-6)


def test_rolling_scores_every_token_of_a_text_once():
    table = drawn_table(V)
    rng = np.random.default_rng(3)
    texts = [rng.integers(5, V, n).tolist() for n in (0, 1, 127, 128, 129, 500)]
    score, mesh = score_of(BIGRAM, ())
    with jax.set_mesh(mesh):
        weights = (put_weights(weights_for(table), BIGRAM, mesh), {})
        answers = rolling(score, weights, texts, seq_len=SEQ_LEN, batch_rows=8)
    assert answers == pytest.approx([by_table(Pair([BOS_ID], text), table)[0] for text in texts], rel=1e-5, abs=1e-5)


def test_of_equal_logits_the_lowest_id_is_the_first_guess():
    constant = np.zeros((V, V), np.float32)
    answers = asked(weights_for(constant), [Pair([BOS_ID], [0, 0]), Pair([BOS_ID], [7]), Pair([BOS_ID], [])])
    assert [answer.greedy for answer in answers] == [True, False, True]
    assert answers[0].log_likelihood == pytest.approx(-2 * math.log(V), rel=1e-6)


def test_scores_that_are_not_numbers_are_an_error_and_nothing_asked_is_none():
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), weights_for(drawn_table(V)))
    with pytest.raises(NotFinite, match=r"^1 of 2 requests have a score that is not a number: the weights are broken"):
        asked(broken, [Pair([BOS_ID], []), Pair([BOS_ID], [5, 6])])
    assert asked(broken, [Pair([BOS_ID], [])]) == [Likelihood(0.0, True, 0)]
    assert asked(broken, []) == []


def test_it_stops_between_batches():
    answers = iter([False, True])
    assert asked(weights_for(drawn_table(V)), some_pairs(), stop=lambda: next(answers)) is None


class Counting:
    """Not a model: it says how much work it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.places = 0

    def __call__(self, weights: object, rows: Rows) -> Scores:
        self.shapes.append(rows.tokens_BT.shape)
        self.places += int((rows.segments_BT > 0).sum())
        assert not (rows.scored_BT & (rows.segments_BT == 0)).any()
        return Scores(rows.positions_BT.astype(np.float32), rows.targets_BT > 5)


def test_many_requests_cost_few_shapes_and_little_padding():
    count = Counting()
    pairs = some_pairs(n=2000)
    answers = log_likelihoods(count, None, pairs, seq_len=SEQ_LEN, batch_rows=4)
    assert set(count.shapes) <= {(8, 64), (4, 128)}
    assert count.places > 0.95 * sum(B * T for B, T in count.shapes)
    assert sum(answer.tokens for answer in answers) == sum(len(pair.continuation) for pair in pairs)


def test_rows_are_halved_as_long_as_the_context_axis_divides_them():
    assert lengths(1024) == (64, 128, 256, 512, 1024)
    assert lengths(1000) == (125, 250, 500, 1000)
    assert lengths(32) == (32,) and lengths(96) == (96,)
    assert lengths(264, context_parts=4) == (132, 264) and lengths(264, context_parts=8) == (264,)


@pytest.fixture(scope="module")
def tokenizer():
    text = "the cat sat on the mat.\nthe dog ran to the cat.\n" * 30
    return tokenizers.train([text], TokenizerConfig(), 300)


def test_two_texts_are_cut_where_their_bytes_meet(tokenizer):
    for context, continuation in [
        ("the cat", " sat"),
        ("", "the cat"),
        ("", ""),
        ("the cat", ""),
        ("the cat", " "),
        (" ", " "),
        ("the \u6f22", "\u5b57 cat"),
        (f"the {SPACE}", f"{SPACE}cat"),
        ("the\n", "cat"),
    ]:
        pair = pair_of(tokenizer, context, continuation)
        assert pair.context[0] == BOS_ID
        assert [*pair.context[1:], *pair.continuation] == tokenizer.encode(context + continuation).tolist()
        if tokenizer.encode(context).tolist() == pair.context[1:]:  # no token spans the border
            assert tokenizer.decode(pair.continuation) == continuation
    # A token across the border is asked for, so that what is asked is never lost in what is given.
    pair = pair_of(tokenizer, "th", "e")
    assert tokenizer.decode(pair.continuation) == "the" and pair.context == [BOS_ID]


def test_spelled_bytes_are_scored_each(tokenizer):
    table = drawn_table(300)
    cfg = config_of(300)
    pairs = [pair_of(tokenizer, "the \u6f22", "\u5b57\U0001f600"), pair_of(tokenizer, "", " ")]
    answers = asked(weights_for(table), pairs, cfg, seq_len=32)
    assert_alike(answers, [by_table(pair, table) for pair in pairs])
    assert answers[0].tokens == 7


PROGRAM = """
import json, os
import tests.conftest
os.environ["JAX_NUM_CPU_DEVICES"] = "2"
from llm_jax.distributed import join_processes
join_processes(100, 100)
from tests.test_eval_requests import V, asked, drawn_table, some_pairs, weights_for
print("answers", json.dumps(asked(weights_for(drawn_table(V)), some_pairs(), fsdp=2, data=2)))
"""


@pytest.mark.slow
def test_two_processes_answer_as_one(launch_processes: LaunchProcesses):
    here = asked(weights_for(drawn_table(V)), some_pairs())
    for done in launch_processes(2, 2, ["-c", PROGRAM]):
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("answers")]
        assert_alike([Likelihood(*answer) for answer in json.loads(line.removeprefix("answers"))], here)
