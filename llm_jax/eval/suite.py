"""The default suite: pairs of a held-out piece of Python and the same with one edit that makes it wrong.

The model should find the original likelier. A sum of log-probabilities favours what has fewer tokens, so pairs of
equally many are taken first, and of others as many in which the right text is the longer one as not. Each kind still
stands beside what an untrained model scores, and what "fewer tokens wins" does.
"""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.bootstrap import mean
from llm_jax.eval.requests import Pair
from llm_jax.eval.suite_edits import KINDS, Edit, Kind, Source, Unit, breaks, edited, read_source
from llm_jax.eval.task_scores import Likelihoods, pair_scores

# Pairs of a kind; of a masked model's, to which every token is a forward of its own; the fewest worth a figure.
PAIRS, MASKED_PAIRS = 100, 40
FEWEST = 20
# Tokens of the lines shown before the edited one, at most and at least.
CONTEXT = 80
SHORTEST_CONTEXT = 16
# Candidates looked at for each pair wanted.
TRIES = 20


# What is told where there is no suite.
NO_SUITE: Mapping[str, Any] = {"kinds": {}, "all": None, "left_out": {}}


class Corruption(NamedTuple):
    """A piece of a held-out document, and the same with one edit: ids, BOS first, `given` of them before the line."""

    document: str
    line: int
    given: int
    good: Sequence[int]
    bad: Sequence[int]


class Suite(NamedTuple):
    """Pairs by kind; and the kinds that have too few of them, each with why."""

    pairs: Mapping[str, Sequence[Corruption]]
    left_out: Mapping[str, str]


class Tokens(NamedTuple):
    """A document as Python, and the ids of its lines, each with its line end."""

    name: str
    source: Source
    ids: Sequence[np.ndarray]


class Candidate(NamedTuple):
    """An edit, not proved yet, and the pair that it makes."""

    text: Tokens
    unit: Unit
    edit: Edit
    pair: Corruption


def make_suite(
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, seq_len: int, seed: int, *, masked: bool = False
) -> Suite | None:
    """The suite of held-out documents, (name, text) each; the same whatever their order. None where none is Python.

    Every text has at most seq_len + 1 ids; one for a masked model one fewer, and there are fewer of them.
    """
    n_pairs, longest = (MASKED_PAIRS, seq_len - 1) if masked else (PAIRS, seq_len)
    read = [
        (name, source)
        for name, text in sorted(documents)
        if name.endswith(".py") and (source := read_source(text)) is not None
    ]
    if not read:
        return None
    ids = iter(tokenizer.encode_many([f"{line}\n" for _, source in read for line in source.lines]))
    texts = [Tokens(name, source, [next(ids) for _ in source.lines]) for name, source in read]
    pairs: dict[str, Sequence[Corruption]] = {}
    left_out: dict[str, str] = {}
    for name, kind in KINDS.items():
        found = _pairs_of(kind, texts, tokenizer, longest, random.Random(f"{seed} {name}"), n_pairs)
        if len(found) < FEWEST:
            left_out[name] = f"only {len(found)} pairs in which length alone tells nothing"
        else:
            pairs[name] = found
    return Suite(pairs, left_out)


def _pairs_of(
    kind: Kind, texts: Sequence[Tokens], tokenizer: Tokenizer, seq_len: int, draw: random.Random, n_pairs: int
) -> list[Corruption]:
    """At most n_pairs, of lines that differ from each other; in as many as not, the good text is the longer one."""
    places = [(text, unit) for text in texts for unit in text.source.units]
    candidates = [(text, unit, edit) for text, unit in places for edit in kind.candidates(text.source, unit)]
    draw.shuffle(candidates)
    found: list[Corruption] = []
    unequal: dict[bool, list[Candidate]] = {False: [], True: []}
    lines = set[tuple[str, int]]()

    def holds(candidate: Candidate) -> bool:
        """Whether it is of a line of its own, and proved."""
        text, unit, edit, _ = candidate
        if (text.name, edit.line) in lines or (kind.unparsable and not breaks(text.source, unit, edit)):
            return False
        lines.add((text.name, edit.line))
        return True

    for text, unit, edit in candidates[: TRIES * n_pairs]:
        pair = _corruption(text, edit, tokenizer, seq_len)
        if pair is None:
            continue
        candidate = Candidate(text, unit, edit, pair)
        if len(pair.good) != len(pair.bad):
            unequal[len(pair.good) < len(pair.bad)].append(candidate)
        elif holds(candidate):
            found.append(pair)
        if len(found) == n_pairs:
            return found
    both = zip(filter(holds, unequal[False]), filter(holds, unequal[True]), strict=False)
    for longer, shorter in itertools.islice(both, (n_pairs - len(found)) // 2):
        found += [longer.pair, shorter.pair]
    return found


def _corruption(text: Tokens, edit: Edit, tokenizer: Tokenizer, seq_len: int) -> Corruption | None:
    """The edited line with lines before it and the one after it; None where too little of that fits, or is not there.

    The line after it shows that what is missing does not come there.
    """
    lines, n = text.source.lines, edit.line
    bad = tokenizer.encode(edited(lines[n], edit) + "\n")
    after = text.ids[n + 1] if "".join(lines[n + 1 :]) else np.empty(0, np.int32)
    room = min(CONTEXT, seq_len - max(len(bad), len(text.ids[n])) - len(after))
    first, shown = n, 0
    while first and shown + len(text.ids[first - 1]) <= room:
        first -= 1
        shown += len(text.ids[first])
    if shown < SHORTEST_CONTEXT or not _mentions(lines[first:n], edit.needs):
        return None
    before = [np.array([tokenizer.bos_id], np.int32), *text.ids[first:n]]
    good, bad = (np.concatenate([*before, line, after]).tolist() for line in (text.ids[n], bad))
    return Corruption(text.name, n, shown + 1, good, bad)


def _mentions(lines: Sequence[str], needs: str) -> bool:
    return not needs or any(needs in line for line in lines)


def fewer_tokens_wins(pairs: Sequence[Corruption]) -> float:
    """The accuracy of saying that what has fewer tokens is right; equally many count one half."""
    return float(np.mean([(len(pair.good) < len(pair.bad)) + (len(pair.good) == len(pair.bad)) / 2 for pair in pairs]))


def score_suite(suite: Suite, trained: Likelihoods, untrained: Likelihoods, *, causal: bool) -> dict[str, Any] | None:
    """kinds, each with n, accuracy (see bootstrap), untrained and fewer_tokens_wins; all of them together; left_out.

    A masked model is asked for the edited line and the one after it, given those before. None where it was stopped.
    """
    asked = [
        (_asked(pair.good, 1 if causal else pair.given), _asked(pair.bad, 1 if causal else pair.given))
        for pairs in suite.pairs.values()
        for pair in pairs
    ]
    scores = [pair_scores(likelihoods, asked, causal=causal) for likelihoods in (trained, untrained)]
    if scores[0] is None or scores[1] is None:
        return None
    kinds, start = {}, 0
    for name, pairs in suite.pairs.items():
        here = slice(start, start + len(pairs))
        kinds[name] = _told(pairs, scores[0][here], scores[1][here])
        start = here.stop
    together = [pair for pairs in suite.pairs.values() for pair in pairs]
    return {
        "kinds": kinds,
        "all": _told(together, scores[0], scores[1]) if together else None,
        "left_out": dict(suite.left_out),
    }


def _told(pairs: Sequence[Corruption], trained_N: np.ndarray, untrained_N: np.ndarray) -> dict[str, Any]:
    return {
        "n": len(pairs),
        "accuracy": mean(trained_N),
        "untrained": mean(untrained_N),
        "fewer_tokens_wins": fewer_tokens_wins(pairs),
    }


def _asked(ids: Sequence[int], given: int) -> Pair:
    return Pair(ids[:given], ids[given:])
