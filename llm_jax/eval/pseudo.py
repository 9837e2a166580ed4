"""Pseudo-log-likelihoods of masked language models: how likely is each token of a text, given the others?

Every token asked for is a forward of its own, over a copy of its text in which it is hidden. Copies share rows.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array, P

from llm_jax.data.config import MASK_ID, PAD_ID, SPECIAL_PIECES
from llm_jax.eval.bootstrap import Estimate, mean
from llm_jax.eval.perplexity import HeldOut, NotFinite, job_progress
from llm_jax.eval.requests import Likelihood, Pair, lengths, packed
from llm_jax.eval.scorer import on_mesh
from llm_jax.guards import Stop, never
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Weights, abstract_model
from llm_jax.objective.cross_entropy import token_scores
from llm_jax.objective.loss import at_places

# A row is asked about one in so many of its tokens at most, so that the head sees few: a shorter copy takes as many.
TOKENS_A_PLACE = 8


class Inside(NamedTuple):
    """Ids of a whole text, and the places among them that are asked for, each given all the others."""

    ids: Sequence[int] | np.ndarray
    places: Sequence[int] | np.ndarray


class Told(NamedTuple):
    """Of a text's places: nats (float32 [N]) and whether each token is the first guess (bool [N])."""

    nll_N: np.ndarray
    correct_N: np.ndarray


class Questions(NamedTuple):
    """A batch as a masked model reads it, and its places asked for, each row's own first; int32 [B, T] and [B, N]."""

    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    places_BN: np.ndarray
    targets_BN: np.ndarray


MaskedScore = Callable[[Weights, Questions], Told]


class _Copy(NamedTuple):
    """A window of a text, in which what is asked for is hidden, and what of its word may not be seen with it."""

    text: int
    nth: int
    """Among the text's places."""
    place: int
    hidden_to: int
    start: int
    stop: int
    size: int
    """Tokens of a row that it takes."""


def make_masked_score(cfg: ModelConfig) -> MaskedScore:
    """The function (weights, questions) -> nats and first guesses [B, N], compiled once for each shape.

    Every process gets those of all rows. cfg's attention is resolved, the mesh is set, and its row axes divide B.
    """
    graph = abstract_model(cfg).graph

    @jax.jit
    def forward(
        weights: Weights, tokens_BT: Array, segments_BT: Array, positions_BT: Array, places_BN: Array, targets_BN: Array
    ) -> tuple[Array, Array]:
        model = nnx.merge(graph, *weights)
        x_BTD, _ = model(tokens_BT, segments_BT, positions_BT, cfg, causal=False)
        nll_BN, correct_BN = token_scores(at_places(x_BTD, places_BN), model.head(cfg), targets_BN, cfg)
        return jax.reshard((nll_BN, correct_BN > 0), P())

    def score(weights: Weights, asked: Questions) -> Told:
        return Told(*jax.device_get(forward(weights, *map(on_mesh, asked))))

    return score


def masked_scores(
    score: MaskedScore,
    weights: Weights,
    asked: Sequence[Inside],
    words_V2: np.ndarray | None,
    *,
    seq_len: int,
    batch_rows: int,
    stop: Stop = never,
) -> list[Told] | None:
    """Every text's places, each token given the others, in the order of the texts; None where it was stopped.

    words_V2: None hides the token alone (Salazar et al. 2020, "original"); Tokenizer.word_starts hides the later
    tokens of its word with it (Kauf and Ivanova 2023, "within-word left-to-right"), since they give it away.
    Of a text longer than seq_len a token sees seq_len tokens, as many on either side as there are. batch_rows rows of
    seq_len tokens, or as many tokens in shorter rows, are scored at once; the mesh, which is set, divides batch_rows.
    Neither it nor the batch nor the order matters to an answer. stop is asked once before each batch, and must answer
    alike on all processes. Raises NotFinite where a token's score is not a number.
    """
    context_parts = dict(jax.sharding.get_mesh().shape).get("context", 1)
    texts = [np.asarray(text.ids, np.int32) for text in asked]
    copies = [copy for n, text in enumerate(asked) for copy in _copies(n, texts[n], text.places, words_V2, seq_len)]
    told = [Told(np.zeros(len(text.places), np.float32), np.ones(len(text.places), bool)) for text in asked]
    with job_progress("asking", len(copies)) as advance:
        for length, rows in sorted(packed(copies, lengths(seq_len, context_parts)).items(), reverse=True):
            n_places = -(-length // TOKENS_A_PLACE // context_parts) * context_parts
            size = batch_rows * (seq_len // length)
            for first in range(0, len(rows), size):
                if stop():
                    return None
                held = rows[first : first + size]
                scores = score(weights, _questions(held, texts, size, length, n_places))
                for copies_here, nll_N, correct_N in zip(held, *scores, strict=False):
                    for n, copy in enumerate(copies_here):
                        told[copy.text].nll_N[copy.nth] = nll_N[n]
                        told[copy.text].correct_N[copy.nth] = correct_N[n]
                advance(sum(map(len, held)))
    bad = sum(not np.isfinite(text.nll_N).all() for text in told)
    if bad:
        raise NotFinite(f"{bad} of {len(told)} texts have a score that is not a number: the weights are broken")
    return told


def pseudo_log_likelihoods(
    score: MaskedScore,
    weights: Weights,
    pairs: Sequence[Pair],
    words_V2: np.ndarray | None,
    *,
    seq_len: int,
    batch_rows: int,
    stop: Stop = never,
) -> list[Likelihood] | None:
    """Every pair's continuation: the sum over its tokens, each given the context and the others. See masked_scores."""
    asked = [
        Inside(
            np.array([*pair.context, *pair.continuation], np.int32),
            range(len(pair.context), len(pair.context) + len(pair.continuation)),
        )
        for pair in pairs
    ]
    told = masked_scores(score, weights, asked, words_V2, seq_len=seq_len, batch_rows=batch_rows, stop=stop)
    if told is None:
        return None
    return [
        Likelihood(-float(text.nll_N.sum(dtype=np.float64)), bool(text.correct_N.all()), len(text.nll_N))
        for text in told
    ]


def drawn_places(held_out: Sequence[HeldOut], n_tokens: int, seed: int) -> list[Inside]:
    """At most n_tokens of the documents' tokens, any as likely as any other; the same each time. BOS is not one."""
    borders = np.cumsum([0, *(len(document.tokens) - 1 for document in held_out)])
    total = int(borders[-1])
    drawn_N = np.sort(random.Random(f"{seed} pseudo-perplexity").sample(range(total), min(n_tokens, total)))
    return [
        Inside(document.tokens, drawn_N[(start <= drawn_N) & (drawn_N < end)] - start + 1)
        for document, start, end in zip(held_out, borders[:-1], borders[1:], strict=True)
    ]


def pseudo_perplexity(told: Sequence[Told]) -> Estimate | None:
    """exp(mean nats a token) with its error bar (Salazar et al. 2020); None where that overflows, or of nothing."""
    nll_N = np.concatenate([np.zeros(0, np.float32), *(text.nll_N for text in told)])
    nats = mean(nll_N) if len(nll_N) else None
    if nats is None or nats["high"] > 700:
        return None
    return {name: math.exp(value) for name, value in nats.items()}


def word_ends(ids_T: np.ndarray, words_V2: np.ndarray) -> np.ndarray:
    """int [T]: of each token the place after the last one of its word; words are those that training hides as a whole.

    words_V2: Tokenizer.word_starts. A control token ends a word, and is one by itself.
    """
    free_T = ids_T >= len(SPECIAL_PIECES)
    begins_T = words_V2[ids_T, 0] | ~free_T
    begins_T[1:] |= words_V2[ids_T[:-1], 1] | ~free_T[:-1]
    starts_N = np.append(np.flatnonzero(begins_T), len(ids_T))
    return starts_N[np.searchsorted(starts_N, np.arange(len(ids_T)), side="right")]


def _copies(
    n: int, ids_T: np.ndarray, places: Sequence[int] | np.ndarray, words_V2: np.ndarray | None, seq_len: int
) -> Iterator[_Copy]:
    ends_T = np.arange(len(ids_T)) + 1 if words_V2 is None else word_ends(ids_T, words_V2)
    for nth, place in enumerate(map(int, places)):
        start = max(min(place - seq_len // 2, len(ids_T) - seq_len), 0)
        stop = min(start + seq_len, len(ids_T))
        size = min(max(stop - start, TOKENS_A_PLACE), seq_len)
        yield _Copy(n, nth, place, min(int(ends_T[place]), stop), start, stop, size)


def _questions(
    rows: Sequence[Sequence[_Copy]], texts: Sequence[np.ndarray], n_rows: int, length: int, n_places: int
) -> Questions:
    """Rows of copies, each a segment of its own, padding being segment 0; what fills up the batch holds none."""
    tokens_BT = np.full((n_rows, length), PAD_ID, np.int32)
    segments_BT, positions_BT = np.zeros((2, n_rows, length), np.int32)
    places_BN, targets_BN = np.zeros((2, n_rows, n_places), np.int32)
    for b, copies in enumerate(rows):
        at = 0
        for n, copy in enumerate(copies):
            text, size = texts[copy.text], copy.stop - copy.start
            moved = at - copy.start
            tokens_BT[b, at : at + size] = text[copy.start : copy.stop]
            tokens_BT[b, copy.place + moved : copy.hidden_to + moved] = MASK_ID
            segments_BT[b, at : at + size] = n + 1
            positions_BT[b, at : at + size] = np.arange(size)
            places_BN[b, n], targets_BN[b, n] = copy.place + moved, text[copy.place]
            at += size
    return Questions(tokens_BT, segments_BT, positions_BT, places_BN, targets_BN)
