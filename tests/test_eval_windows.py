"""Windows over documents and their rows: every token is scored once, with the most context, and none is lost."""

import random

import numpy as np
import pytest

from llm_jax.config import ConfigError
from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.eval.config import EvalConfig
from llm_jax.eval.windows import batched, pack, windows


def cases(n=300):
    draw = random.Random(0)
    for _ in range(n):
        length = draw.randint(1, 20)
        yield draw.randint(1, 90), length, draw.randint(1, length)


def documents_of(rng, sizes):
    """Documents of so many tokens after BOS; no two tokens are alike, so that each tells its place."""
    ids = iter(range(10, 10 + sum(sizes)))
    return [np.array([BOS_ID, *(next(ids) for _ in range(size))], np.int32) for size in sizes]


def test_every_token_but_the_first_is_new_in_exactly_one_window():
    for n_tokens, length, stride in cases():
        new = [i for w in windows(n_tokens, length, stride) for i in range(w.first, w.stop + 1)]
        assert new == list(range(1, n_tokens)), (n_tokens, length, stride)


def test_no_window_gives_a_token_more_context_than_the_one_it_is_scored_in():
    for n_tokens, length, stride in cases():
        all_windows = list(windows(n_tokens, length, stride))
        assert all(1 <= w.stop - w.start <= length for w in all_windows)
        for w in all_windows:
            for token in range(w.first, w.stop + 1):
                # The grid of windows goes on past the document, but no window on it begins earlier.
                earliest = min(s for s in range(0, n_tokens, stride) if s < token <= s + length)
                assert w.start == earliest


def test_a_token_has_at_least_length_minus_stride_tokens_before_it_where_the_document_has_them():
    for n_tokens, length, stride in cases():
        for w in windows(n_tokens, length, stride):
            assert w.first - w.start >= min(w.first, length - stride + 1)


def test_windows_by_hand():
    assert list(windows(10, 4, 2)) == [(0, 4, 1), (2, 6, 5), (4, 8, 7), (6, 9, 9)]
    assert list(windows(5, 4, 2)) == [(0, 4, 1)]
    assert list(windows(1, 4, 2)) == []


@pytest.mark.parametrize("batch_rows", [1, 3, 8])
def test_rows_ask_for_every_token_of_every_document_once_and_in_order(batch_rows):
    rng = random.Random(batch_rows)
    for _ in range(50):
        length = rng.randint(1, 16)
        documents = documents_of(rng, [rng.choice((0, 1, 2, 5, 17, 60)) for _ in range(rng.randint(1, 8))])
        asked = []
        for rows in batched(pack(documents, length, rng.randint(1, length)), batch_rows):
            assert all(field.shape == (batch_rows, length) for field in rows)
            asked += rows.targets_BT[rows.scored_BT].tolist()
        assert asked == [token for document in documents for token in document[1:].tolist()]


def test_a_rows_windows_are_segments_that_begin_at_position_0():
    documents = documents_of(random, [3, 2, 0, 4, 9])
    (row, second, *_) = pack(documents, 8, 4)
    pad = PAD_ID
    assert row.tokens_BT.tolist() == [BOS_ID, 10, 11, BOS_ID, 13, pad, pad, pad]
    assert row.targets_BT.tolist() == [10, 11, 12, 13, 14, pad, pad, pad]
    assert row.segments_BT.tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row.positions_BT.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert row.scored_BT.tolist() == [True] * 5 + [False] * 3
    assert second.targets_BT.tolist() == [15, 16, 17, 18, pad, pad, pad, pad]


def test_what_an_earlier_window_scored_is_context():
    (_, second) = pack(documents_of(random, [10]), 8, 4)
    assert second.tokens_BT.tolist()[:6] == [13, 14, 15, 16, 17, 18]
    assert second.scored_BT.tolist() == [False, False, False, False, True, True, False, False]


def test_a_stride_that_leaves_tokens_out_is_refused():
    EvalConfig(stride=32).check(seq_len=32)
    with pytest.raises(ConfigError, match=r"^eval.stride = 33 is more than data.seq_len = 32; windows would leave"):
        EvalConfig(stride=33).check(seq_len=32)
