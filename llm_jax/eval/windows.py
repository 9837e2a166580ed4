"""Documents become windows, windows become rows: every token is scored once, with as much context as a window gives it.

Short windows share a row, each a segment of its own, so that many short documents cost few rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.data.config import PAD_ID


class Window(NamedTuple):
    """tokens[start:stop] of a document predict tokens[start + 1 : stop + 1], of which those from `first` on are new."""

    start: int
    stop: int
    first: int


class Rows(NamedTuple):
    """What a model reads and is asked: int32 [B, T], scored bool [B, T]; T alone for a single row.

    Padding is segment 0; a window's tokens are a segment of their own, its positions begin at 0.
    """

    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    targets_BT: np.ndarray
    scored_BT: np.ndarray


def windows(n_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` over a document of n_tokens; they move on by `stride`, which is at most length.

    Each token but the first is new in the first window that predicts it: no other gives it more context.
    """
    assert 1 <= stride <= length
    start, first = 0, 1
    while first < n_tokens:
        stop = min(start + length, n_tokens - 1)
        yield Window(start, stop, first)
        start, first = start + stride, stop + 1


def pack(documents: Iterable[np.ndarray], length: int, stride: int) -> Iterator[Rows]:
    """Rows of `length`, one after the other, of documents' tokens (int32 [n], BOS first); in order, none is split."""
    held: list[tuple[np.ndarray, Window]] = []
    room = length
    for tokens in documents:
        for window in windows(len(tokens), length, stride):
            size = window.stop - window.start
            if size > room:
                yield row_of(held, length)
                held, room = [], length
            held.append((tokens, window))
            room -= size
    if held:
        yield row_of(held, length)


def batched(rows: Iterable[Rows], batch_rows: int) -> Iterator[Rows]:
    """Rows in batches of batch_rows; the last is filled up with rows of padding."""
    held: list[Rows] = []
    for row in rows:
        held.append(row)
        if len(held) == batch_rows:
            yield Rows(*map(np.stack, zip(*held, strict=True)))
            held = []
    if held:
        nothing = row_of([], len(held[0].tokens_BT))
        held += [nothing] * (batch_rows - len(held))
        yield Rows(*map(np.stack, zip(*held, strict=True)))


def row_of(held: Sequence[tuple[np.ndarray, Window]], length: int) -> Rows:
    """One row, of documents' windows: the first of them is segment 1."""
    tokens_T, targets_T = np.full((2, length), PAD_ID, np.int32)
    segments_T, positions_T = np.zeros((2, length), np.int32)
    scored_T = np.zeros(length, bool)
    at = 0
    for segment, (tokens, (start, stop, first)) in enumerate(held, 1):
        here = slice(at, at + stop - start)
        tokens_T[here] = tokens[start:stop]
        targets_T[here] = tokens[start + 1 : stop + 1]
        segments_T[here] = segment
        positions_T[here] = np.arange(stop - start)
        scored_T[here] = np.arange(start + 1, stop + 1) >= first
        at += stop - start
    return Rows(tokens_T, segments_T, positions_T, targets_T, scored_T)
