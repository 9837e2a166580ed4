"""Requests: how likely is this text after that one? Many share a row, each a segment; answers come in their order."""

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from llm_jax.data.config import BOS_ID
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.perplexity import NotFinite, job_progress
from llm_jax.eval.scorer import Score, Scores
from llm_jax.eval.windows import Rows, Window, batched, row_of
from llm_jax.guards import Stop, never
from llm_jax.model.transformer import Weights

# Rows are as long as the model's window, half of it, a quarter ..., and no shorter than this: few shapes, few compiles.
SHORTEST = 64


class Pair(NamedTuple):
    """Ids of what is given and of what is asked; a context begins with BOS where it begins a document, so has an id."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """Of a continuation: nats, whether each of its tokens is the first guess (the lowest id of equals), and tokens."""

    log_likelihood: float
    greedy: bool
    tokens: int


def log_likelihoods(
    score: Score, weights: Weights, pairs: Sequence[Pair], *, seq_len: int, batch_rows: int, stop: Stop = never
) -> list[Likelihood] | None:
    """Every pair's continuation given its context, in the order of the pairs; None where it was stopped.

    Of a context that is too long the last tokens count. A continuation longer than seq_len is asked in windows that
    share no token of it, each with as much of what comes before as fits; an empty one has 0 nats and is greedy.
    batch_rows rows of seq_len tokens, or as many tokens in shorter rows, are scored at once; the mesh, which is set,
    divides batch_rows. Neither it nor the batch nor the order matters to an answer. stop is asked once before each
    batch, and must answer alike on all processes.
    Raises NotFinite where a continuation's score is not a number.
    """
    context_parts = dict(jax.sharding.get_mesh().shape).get("context", 1)
    asked = [window for n, pair in enumerate(pairs) for window in _windows(n, pair, seq_len)]
    totals = [0.0] * len(pairs)
    greedy = [True] * len(pairs)
    with job_progress("asking", sum(len(pair.continuation) for pair in pairs)) as advance:
        for length, rows in sorted(packed(asked, lengths(seq_len, context_parts)).items(), reverse=True):
            for windows, batch in _batches(rows, length, batch_rows * (seq_len // length)):
                if stop():
                    return None
                for window, nll_N, correct_N in _answers(windows, batch, score(weights, batch)):
                    totals[window.pair] -= float(nll_N.sum(dtype=np.float64))
                    greedy[window.pair] &= bool(correct_N.all())
                advance(int(batch.scored_BT.sum()))
    bad = sum(not math.isfinite(total) for total in totals)
    if bad:
        raise NotFinite(f"{bad} of {len(pairs)} requests have a score that is not a number: the weights are broken")
    tokens = [len(pair.continuation) for pair in pairs]
    return [Likelihood(*answer) for answer in zip(totals, greedy, tokens, strict=True)]


def rolling(
    score: Score,
    weights: Weights,
    texts: Sequence[Sequence[int]],
    *,
    seq_len: int,
    batch_rows: int,
    stop: Stop = never,
) -> list[float] | None:
    """Every text's log-likelihood as a document of its own, in nats; each token is scored once. See log_likelihoods.

    texts are ids without BOS. Windows are those of lm-evaluation-harness: they share no scored token, so the first
    token of each but the last sees one token; the last has as much context as fits.
    """
    pairs = [Pair((BOS_ID,), ids) for ids in texts]
    answers = log_likelihoods(score, weights, pairs, seq_len=seq_len, batch_rows=batch_rows, stop=stop)
    return None if answers is None else [answer.log_likelihood for answer in answers]


def pair_of(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The two texts as one document; a token across their border is asked for. Raises UnicodeEncodeError."""
    ids = tokenizer.encode(context + continuation)
    n = int(np.searchsorted(np.cumsum(tokenizer.piece_bytes[ids]), len(context.encode()), side="right"))
    return Pair([tokenizer.bos_id, *ids[:n].tolist()], ids[n:].tolist())


def lengths(seq_len: int, context_parts: int = 1) -> tuple[int, ...]:
    """The lengths that rows may have, ascending: seq_len and its halves that the mesh's context axis divides."""
    found = [seq_len]
    while found[0] % (2 * context_parts) == 0 and found[0] // 2 >= SHORTEST:
        found.insert(0, found[0] // 2)
    return tuple(found)


class Sized(Protocol):
    """What takes so many places of a row."""

    @property
    def size(self) -> int:
        """Places."""
        ...


S = TypeVar("S", bound=Sized)


class _Asked(NamedTuple):
    """A window of a pair: its ids, and the place of the first of them that is asked for."""

    pair: int
    tokens: np.ndarray
    first: int

    @property
    def size(self) -> int:
        """Places of a row that it takes: the last id is only asked for."""
        return len(self.tokens) - 1


def _windows(n: int, pair: Pair, seq_len: int) -> Iterator[_Asked]:
    assert len(pair.context), "a context has at least BOS"
    tokens = np.array([*pair.context, *pair.continuation], np.int32)
    for first in range(len(pair.context), len(tokens), seq_len):
        stop = min(first + seq_len, len(tokens))
        start = max(stop - seq_len - 1, 0)
        yield _Asked(n, tokens[start:stop], first - start)


def packed(windows: Sequence[S], lengths: Sequence[int]) -> dict[int, list[list[S]]]:
    """Rows by their length, as the windows that they hold: the longest window first, each to where it fits best."""
    rows: dict[int, list[list[S]]] = {}
    open_rows: dict[int, list[list[S]]] = {}
    rooms: list[int] = []

    def has_room(held: list[S], room: int) -> None:
        if room not in open_rows:
            open_rows[room] = []
            bisect.insort(rooms, room)
        open_rows[room].append(held)

    for window in sorted(windows, key=lambda window: -window.size):
        at = bisect.bisect_left(rooms, window.size)
        if at < len(rooms):
            room = rooms[at]
            held = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        else:
            held, room = [], lengths[bisect.bisect_left(lengths, window.size)]
            rows.setdefault(room, []).append(held)
        held.append(window)
        if room > window.size:
            has_room(held, room - window.size)
    return rows


def _batches(
    rows: Sequence[Sequence[_Asked]], length: int, batch_rows: int
) -> Iterator[tuple[Sequence[Sequence[_Asked]], Rows]]:
    """Batches of rows, and the windows that each row holds; what fills up the last batch holds none."""
    made = (
        row_of([(window.tokens, Window(0, window.size, window.first)) for window in windows], length)
        for windows in rows
    )
    for n, batch in enumerate(batched(made, batch_rows)):
        yield rows[n * batch_rows : (n + 1) * batch_rows], batch


def _answers(
    windows: Sequence[Sequence[_Asked]], batch: Rows, scores: Scores
) -> Iterator[tuple[_Asked, np.ndarray, np.ndarray]]:
    """Every window of a batch, with the nats and the right first guesses of what it asks for."""
    for held, nll_T, correct_T, scored_T in zip(windows, *scores, batch.scored_BT, strict=False):
        at = 0
        for window in held:
            here_T = slice(at, at + window.size)
            mine_T = scored_T[here_T]
            yield window, nll_T[here_T][mine_T], correct_T[here_T][mine_T]
            at += window.size
