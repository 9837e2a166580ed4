"""What a model makes of a task: figures with error bars, from likelihoods, continuations, or likelihoods of tokens."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.bootstrap import Estimate, estimate, mean, ratio
from llm_jax.eval.pseudo import Inside
from llm_jax.eval.requests import Likelihood, Pair, pair_of
from llm_jax.eval.task_files import (
    BitsPerByte,
    Calibration,
    ChoiceRecord,
    Choosing,
    Cloze,
    ClozeRecord,
    CrowsPairs,
    CrowsPairsWholeSentence,
    Generation,
    MinimalPairs,
    MultipleChoice,
    Read,
    TextRecord,
)
from llm_jax.eval.windows import Window, windows
from llm_jax.run_directory import Refused

# A task's figures: kind, n, metrics (name -> Estimate), and what stands beside some of them.
Figures = dict[str, Any]
Likelihoods = Callable[[Sequence[Pair]], Sequence[Likelihood] | None]

LAST_WORD = re.compile(r"\s+\S+$")


class Model(NamedTuple):
    """What tasks ask of a model; every function answers in the order of the questions, and None where it was stopped.

    likelihoods: nats of continuations, a masked model's being pseudo-log-likelihoods; of a causal one alone a shared
    beginning cancels. continued: the likeliest continuations of prompts before any of the stop strings, of so many
    tokens at most; None for a model that continues nothing. inside: nats of some of a text's tokens, given all others;
    None for a causal model, which sees one side.
    """

    tokenizer: Tokenizer
    seq_len: int
    stride: int
    causal: bool
    likelihoods: Likelihoods
    continued: Callable[[Sequence[str], Sequence[str], int], Sequence[str] | None] | None = None
    inside: Callable[[Sequence[Inside]], Sequence[float] | None] | None = None


def check(reads: Iterable[Read], *, causal: bool) -> None:
    """Raises Refused for the first task that such a model cannot do."""
    for read in reads:
        match read.task:
            case CrowsPairs() if causal:
                raise Refused(
                    f"{read.name}: crows_pairs is the paper's metric, which needs a masked language model; "
                    "kind: crows_pairs_whole_sentence compares the likelihoods of whole sentences"
                )
            case Generation() if not causal:
                raise Refused(f"{read.name}: generation needs a causal language model; a masked one continues no text")


def score_task(read: Read, model: Model) -> Figures | None:
    """kind, n, metrics and what belongs to them; None where it was stopped. See `check` for what a model can do."""
    match read.task:
        case BitsPerByte():
            metrics = _bits_per_byte(read.records, model)
        case MinimalPairs():
            sentences = [(record.sentence_good, record.sentence_bad) for record in read.records]
            metrics = _preferences(sentences, [record.UID for record in read.records], "accuracy", model)
        case CrowsPairsWholeSentence():
            sentences = [(record.sent_more, record.sent_less) for record in read.records]
            metrics = _preferences(sentences, [record.bias_type for record in read.records], "stereotypical", model)
        case CrowsPairs():
            metrics = _crows_pairs(read, model)
        case Calibration() | MultipleChoice():
            metrics = _choosing(read.task, read.records, read.examples, model)
        case Cloze():
            metrics = _cloze(read.records, model)
        case Generation():
            metrics = _generation(read.task, read, model)
    return None if metrics is None else {"kind": read.task.kind, "n": len(read.records), **metrics}


def pair_scores(likelihoods: Likelihoods, asked: Sequence[tuple[Pair, Pair]], *, causal: bool) -> np.ndarray | None:
    """Of each two texts: 1 where the first is likelier, 0 where the second is, 0.5 for a tie; None where stopped."""
    told = likelihoods([text for two in asked for text in (_apart(*two) if causal else two)])
    if told is None:
        return None
    nats_N2 = np.array([answer.log_likelihood for answer in told]).reshape(-1, 2)
    return (nats_N2[:, 0] > nats_N2[:, 1]) + (nats_N2[:, 0] == nats_N2[:, 1]) / 2


def _apart(first: Pair, second: Pair) -> tuple[Pair, Pair]:
    """The same question with what both begin with as the context: it cancels, so equals remain exactly equal."""
    texts = [[*pair.context, *pair.continuation] for pair in (first, second)]
    same = max(len(first.context), 1)
    while same < min(map(len, texts)) and texts[0][same] == texts[1][same]:
        same += 1
    return Pair(texts[0][:same], texts[0][same:]), Pair(texts[1][:same], texts[1][same:])


def _preferences(
    sentences: Sequence[tuple[str, str]], groups: Sequence[str | None], metric: str, model: Model
) -> Figures | None:
    """How often the first sentence is the likelier one."""
    asked = [(_whole(model, first), _whole(model, second)) for first, second in sentences]
    scores = pair_scores(model.likelihoods, asked, causal=model.causal)
    if scores is None:
        return None
    return {"metrics": {metric: mean(scores)}, "chance": 0.5, "by": _by(groups, scores)}


def _by(groups: Sequence[str | None], scores: np.ndarray) -> dict[str, Figures]:
    """The mean of each group that has a name."""
    parts = {name: [s for s, group in zip(scores, groups, strict=True) if group == name] for name in groups if name}
    return {name: {"n": len(part), **mean(part)} for name, part in parts.items()}


def _whole(model: Model, text: str) -> Pair:
    return Pair((model.tokenizer.bos_id,), model.tokenizer.encode(text).tolist())


def _bits_per_byte(records: Sequence[TextRecord], model: Model) -> Figures | None:
    """Texts in parts, each a request that asks for what the ones before it have not."""
    texts = [[model.tokenizer.bos_id, *ids.tolist()] for ids in model.tokenizer.encode_many([r.text for r in records])]
    asked = [
        (n, Pair(ids[start:first], ids[first : stop + 1]))
        for n, ids in enumerate(texts)
        for start, stop, first in _parts(len(ids), model)
    ]
    told = model.likelihoods([pair for _, pair in asked])
    if told is None:
        return None
    bits = np.zeros(len(texts))
    for (n, _), answer in zip(asked, told, strict=True):
        bits[n] -= answer.log_likelihood / math.log(2)
    name = "bits_per_byte" if model.causal else "pseudo_bits_per_byte"
    return {"metrics": {name: ratio(bits, [len(record.text.encode()) for record in records])}}


def _parts(n_tokens: int, model: Model) -> Iterable[Window]:
    """Windows; a masked model, for which every token is a window of its own, is asked about the text as a whole."""
    if model.causal:
        return windows(n_tokens, model.seq_len, model.stride)
    return [Window(0, n_tokens - 1, 1)]


def _choosing(
    task: Choosing, records: Sequence[ChoiceRecord], examples: Sequence[ChoiceRecord], model: Model
) -> Figures | None:
    shown = "".join(
        _prompt(task, example) + task.delimiter + example.choices[example.answer] + task.separator
        for example in examples
    )
    asked = [
        pair_of(model.tokenizer, shown + _prompt(task, record), task.delimiter + choice)
        for record in records
        for choice in record.choices
    ]
    told = model.likelihoods(asked)
    if told is None:
        return None
    nats = iter(answer.log_likelihood for answer in told)
    by_record = [np.array([next(nats) for _ in record.choices]) for record in records]
    answers = [record.answer for record in records]
    beside = {"chance": float(np.mean([1 / len(record.choices) for record in records])), "cut": _cut(asked, model)}
    if isinstance(task, Calibration):
        return {"metrics": _calibration(by_record, answers, task.bins), **beside}
    by_bytes = [
        nats_C / [len(choice.encode()) for choice in record.choices]
        for nats_C, record in zip(by_record, records, strict=True)
    ]
    metrics = {
        name: mean([_right(score_C, answer) for score_C, answer in zip(scores, answers, strict=True)])
        for name, scores in (("accuracy", by_record), ("accuracy_by_bytes", by_bytes))
    }
    return {"metrics": metrics, **beside}


def _prompt(task: Choosing, record: ChoiceRecord) -> str:
    return task.prompt.replace("{question}", record.question)


def _right(score_C: np.ndarray, answer: int) -> float:
    """1 where the answer has the highest score; where several have, they share it."""
    best_C = score_C == score_C.max()
    return float(best_C[answer] / best_C.sum())


def _calibration(by_record: Sequence[np.ndarray], answers: Sequence[int], bins: int) -> dict[str, Estimate]:
    """The expected calibration error; confidence is the likeliest choice's share of all choices' probability."""
    share_of = [np.exp(nats_C - nats_C.max()) / np.exp(nats_C - nats_C.max()).sum() for nats_C in by_record]
    confidence_N = np.array([share_C.max() for share_C in share_of])
    right_N = np.array([_right(nats_C, answer) for nats_C, answer in zip(by_record, answers, strict=True)])
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)

    def error(item_N: np.ndarray) -> float:
        gap_N = confidence_N[item_N] - right_N[item_N]
        return float(np.abs(np.bincount(bin_N[item_N], gap_N, minlength=bins)).sum() / len(item_N))

    return {
        "ece": estimate(error, len(right_N)),
        "accuracy": mean(right_N),
        "confidence": mean(confidence_N),
    }


def _cloze(records: Sequence[ClozeRecord], model: Model) -> Figures | None:
    asked = []
    for record in records:
        text = record.text.rstrip()
        last = LAST_WORD.search(text)
        assert last is not None
        asked.append(pair_of(model.tokenizer, text[: last.start()], last[0]))
    told = model.likelihoods(asked)
    if told is None:
        return None
    metrics = {
        "accuracy": mean([float(answer.greedy) for answer in told]),
        "log_likelihood": mean([answer.log_likelihood for answer in told]),
    }
    return {"metrics": metrics, "cut": _cut(asked, model)}


def _cut(asked: Iterable[Pair], model: Model) -> int:
    """Requests of which the model does not see all at once; a causal one is only asked for the last token."""
    room = model.seq_len + model.causal
    return sum(len(pair.context) + len(pair.continuation) > room for pair in asked)


def _generation(task: Generation, read: Read, model: Model) -> Figures | None:
    assert model.continued is not None
    texts = model.continued([record.prompt for record in read.records], task.stop, task.max_tokens)
    if texts is None:
        return None
    exact = [float(text.strip() == record.answer.strip()) for text, record in zip(texts, read.records, strict=True)]
    return {"metrics": {"exact_match": mean(exact)}}


def _crows_pairs(read: Read, model: Model) -> Figures | None:
    """Of both sentences only the tokens that they share are scored, each given all the rest of its sentence."""
    assert model.inside is not None
    asked = []
    for record in read.records:
        both = [
            [model.tokenizer.bos_id, *model.tokenizer.encode(text).tolist()]
            for text in (record.sent_more, record.sent_less)
        ]
        blocks = SequenceMatcher(None, both[0], both[1], autojunk=False).get_matching_blocks()
        for side, ids in enumerate(both):
            places = [block[side] + i for block in blocks for i in range(block.size)]
            # BOS is shared by all texts, and no text's own.
            asked.append(Inside(ids, [place for place in places if place]))
    told = model.inside(asked)
    if told is None:
        return None
    nats_N2 = np.array(told).reshape(-1, 2)
    scores = (nats_N2[:, 0] > nats_N2[:, 1]) + (nats_N2[:, 0] == nats_N2[:, 1]) / 2
    by = _by([record.bias_type for record in read.records], scores)
    return {"metrics": {"stereotypical": mean(scores)}, "chance": 0.5, "by": by}
