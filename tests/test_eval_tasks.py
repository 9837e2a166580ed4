"""Tasks: every kind's figures by hand from likelihoods in closed form; ties, errors bars, and files with mistakes."""

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llm_jax.config import ConfigError
from llm_jax.data.config import BOS_ID
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.bootstrap import error, estimate, mean, ratio
from llm_jax.eval.perplexity import NotFinite
from llm_jax.eval.pseudo import Inside
from llm_jax.eval.requests import Likelihood, Pair
from llm_jax.eval.scorer import make_score
from llm_jax.eval.task_files import read_tasks
from llm_jax.eval.task_scores import Model, check, score_task
from llm_jax.eval.tasks import likelihoods_of, score_tasks
from llm_jax.guards import never
from llm_jax.run_directory import Refused
from tests.bigram import config_of
from tests.small import mesh_of, put_weights, weights_of

V = 128


class Letters(Tokenizer):
    """One id a character, of which a model with V ids knows ASCII."""

    def encode_many(self, texts, threads=None):
        return [np.array([ord(char) for char in text], np.int32) for text in texts]


def letters() -> Letters:
    tokenizer = Letters(b"", "bpe")
    tokenizer.__dict__["piece_bytes"] = np.ones(V, np.int32)
    return tokenizer


def nats(before: int, ident: int) -> float:
    """Of a character after another one: dyadic, so that sums are exact in any order."""
    return -((before * 7 + ident * 3) % 13 + 1) / 8


def bigram(pairs: Sequence[Pair]) -> list[Likelihood]:
    """A first guess is one of an eighth of a nat."""
    answers = []
    for context, continuation in pairs:
        ids = [context[-1], *continuation]
        each = [nats(*two) for two in itertools.pairwise(ids)]
        answers.append(Likelihood(sum(each), all(n == -1 / 8 for n in each), len(each)))
    return answers


def constant(pairs: Sequence[Pair]) -> list[Likelihood]:
    return [Likelihood(-2.0 * len(pair.continuation), False, len(pair.continuation)) for pair in pairs]


def model(likelihoods=bigram, *, causal: bool = True, continued=None, inside=None, seq_len: int = 64) -> Model:
    return Model(letters(), seq_len, seq_len // 2, causal, likelihoods, continued, inside)


def whole(text: str) -> float:
    """A text's nats as a document."""
    (answer,) = bigram([Pair([BOS_ID], [ord(char) for char in text])])
    return answer.log_likelihood


def given(context: str, continuation: str) -> float:
    return whole(context + continuation) - whole(context)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(name, yaml text, records, more=records) writes a task and its files; returns the YAML file."""

    def write(name: str, text: str, records: Sequence[object], **more: Sequence[object]) -> Path:
        for stem, lines in {name: records, **more}.items():
            (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"data: {name}.jsonl\n{text}")
        return path

    return write


def scored(path: Path, using: Model) -> dict:
    (read,) = read_tasks([str(path)])
    figures = score_task(read, using)
    assert figures is not None
    return figures


def test_error_bars_are_the_same_each_time_and_as_wide_as_theory_says():
    rng = np.random.default_rng(0)
    values = (rng.random(400) < 0.8).astype(float)
    figure = mean(values)
    assert figure == mean(values) and figure["value"] == values.mean()
    assert figure["low"] < figure["value"] < figure["high"]
    p = figure["value"]
    assert error(figure) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 400), rel=0.12)
    assert mean([1.0] * 30) == {"value": 1.0, "low": 1.0, "high": 1.0}
    # A ratio of sums, not a mean of ratios.
    assert ratio([1.0, 30.0], [1.0, 10.0])["value"] == pytest.approx(31 / 11)
    assert estimate(lambda item_N: float(np.median(values[item_N])), 400)["value"] == 1.0


PAIRS = [
    {"sentence_good": "the cat runs", "sentence_bad": "the cat run!", "UID": "verb", "field": "syntax"},
    {"sentence_good": "these cats", "sentence_bad": "this cats", "UID": "noun"},
    {"sentence_good": "a dog", "sentence_bad": "an dog", "UID": "noun"},
    {"sentence_good": "ab", "sentence_bad": "ab"},
]


def test_minimal_pairs_are_told_by_paradigm_too_and_the_first_has_no_advantage(write):
    right = [whole(pair["sentence_good"]) > whole(pair["sentence_bad"]) for pair in PAIRS[:3]]
    assert 0 < sum(right) < 3
    told = scored(write("blimp", "kind: minimal_pairs", PAIRS), model())
    assert told["kind"] == "minimal_pairs" and told["n"] == 4 and told["chance"] == 0.5
    assert told["metrics"]["accuracy"]["value"] == (sum(right) + 0.5) / 4
    assert told["by"]["verb"]["value"] == right[0] and told["by"]["noun"]["value"] == sum(right[1:]) / 2
    assert [figures["n"] for figures in told["by"].values()] == [1, 2]
    swapped = [{"sentence_good": p["sentence_bad"], "sentence_bad": p["sentence_good"]} for p in PAIRS]
    other = scored(write("swapped", "kind: minimal_pairs", swapped), model())
    assert other["metrics"]["accuracy"]["value"] == 1 - told["metrics"]["accuracy"]["value"]


def test_a_model_that_knows_nothing_ties_where_texts_are_equally_long(write):
    equal = [{"sentence_good": "abcdef", "sentence_bad": "abcxyz"}, {"sentence_good": "q", "sentence_bad": "r"}]
    path = write("equal", "kind: minimal_pairs", equal)
    assert scored(path, model(constant))["metrics"]["accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    longer = [{"sentence_good": "abc", "sentence_bad": "abcd"}]
    assert scored(write("longer", "kind: minimal_pairs", longer), model(constant))["metrics"]["accuracy"]["value"] == 1


def test_a_masked_model_is_asked_for_whole_sentences(write):
    asked: list[Pair] = []

    def remember(pairs: Sequence[Pair]) -> list[Likelihood]:
        asked.extend(pairs)
        return bigram(pairs)

    path = write("blimp", "kind: minimal_pairs", PAIRS[:1])
    scored(path, model(remember, causal=False))
    assert [len(pair.context) for pair in asked] == [1, 1] and len(asked[0].continuation) == len("the cat runs")
    asked.clear()
    scored(path, model(remember))
    assert [len(pair.context) for pair in asked] == [1 + len("the cat run")] * 2


def test_real_scores_tie_exactly_and_what_is_not_a_number_is_an_error(write):
    cfg = config_of(V)
    read = read_tasks([str(write("blimp", "kind: minimal_pairs", PAIRS[1:3] + [PAIRS[0]] * 9))])
    with jax.set_mesh(mesh_of()):
        score = make_score(cfg)

        def told(value: float) -> dict | None:
            params = jax.tree.map(lambda x: np.full_like(x, value), weights_of(cfg))
            weights: Any = (put_weights(params, cfg, mesh_of()), {})
            likelihoods = likelihoods_of(score, weights, 64, 2, never)
            return score_tasks(read, model(likelihoods))

        figures = told(0.0)
        assert figures is not None
        # "these cats" is longer than "this cats", "a dog" shorter than "an dog", the others tie.
        assert figures["blimp"]["by"]["verb"] == {"n": 9, "value": 0.5, "low": 0.5, "high": 0.5}
        assert figures["blimp"]["metrics"]["accuracy"]["value"] == (0 + 1 + 4.5) / 11
        with pytest.raises(NotFinite, match="the weights are broken"):
            told(np.nan)


QUESTIONS = [
    {"question": "1+1?", "choices": ["two", "a very long answer", "3"], "answer": 0},
    {"question": "sky?", "choices": ["green", "blue"], "answer": 1},
    {"question": "sea?", "choices": ["wet", "wet", "dry as a bone"], "answer": 0},
]
EXAMPLES = [
    {"question": "x?", "choices": ["n", "y"], "answer": 1},
    {"question": "z?", "choices": ["j", "k"], "answer": 0},
    {"question": "never shown", "choices": ["j", "k"], "answer": 0},
]
FEW_SHOT = (
    'kind: {kind}\nexamples: shown.jsonl\nshots: 2\nprompt: "Q {{question}}\\nA"\nseparator: "\\n"\ndelimiter: ":"\n'
)


def choices_by_hand(by_bytes: bool) -> list[np.ndarray]:
    shown = "Q x?\nA:y\nQ z?\nA:j\n"
    return [
        np.array([given(shown + f"Q {q['question']}\nA", ":" + c) / (len(c) if by_bytes else 1) for c in q["choices"]])
        for q in QUESTIONS
    ]


def right(scores: np.ndarray, answer: int) -> float:
    best = scores == scores.max()
    return best[answer] / best.sum()


def test_multiple_choice_by_sum_and_by_bytes_after_examples_that_are_always_the_same(write):
    path = write("choice", FEW_SHOT.format(kind="multiple_choice"), QUESTIONS, shown=EXAMPLES)
    told = scored(path, model())
    for metric, by_bytes in (("accuracy", False), ("accuracy_by_bytes", True)):
        expected = [right(s, q["answer"]) for s, q in zip(choices_by_hand(by_bytes), QUESTIONS, strict=True)]
        assert told["metrics"][metric]["value"] == pytest.approx(np.mean(expected)), metric
    assert told["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)
    assert told["cut"] == 0 and scored(path, model(seq_len=30))["cut"] > 0
    # Equal choices share what is right, whichever of them the answer is.
    third = [{"question": "?", "choices": ["a", "a", "a"], "answer": n} for n in range(3)]
    assert scored(write("third", "kind: multiple_choice", third), model())["metrics"]["accuracy"]["low"] == (
        pytest.approx(1 / 3)
    )


def test_calibration_compares_confidence_and_accuracy_in_bins(write):
    path = write("sure", FEW_SHOT.format(kind="calibration") + "bins: 4\n", QUESTIONS, shown=EXAMPLES)
    told = scored(path, model())["metrics"]
    shares = [np.exp(s - s.max()) / np.exp(s - s.max()).sum() for s in choices_by_hand(by_bytes=False)]
    gaps = [0.0] * 4
    for share, q in zip(shares, QUESTIONS, strict=True):
        gaps[min(int(share.max() * 4), 3)] += share.max() - right(share, q["answer"])
    assert told["ece"]["value"] == pytest.approx(sum(map(abs, gaps)) / 3)
    assert told["confidence"]["value"] == pytest.approx(np.mean([share.max() for share in shares]))
    # A model that is always sure and always wrong is as far off as can be.
    wrong = [{"question": "?", "choices": ["a" * 99, "b"], "answer": 0}] * 5
    sure = scored(write("wrong", "kind: calibration", wrong), model(constant))["metrics"]
    assert sure["ece"]["value"] == pytest.approx(1) and sure["accuracy"]["value"] == 0


def test_cloze_asks_for_the_last_word_and_the_space_before_it(write):
    texts = ["the cat sat on the  mat \n", "def f", "x\ny"]
    told = scored(write("last", "kind: cloze", [{"text": text} for text in texts]), model())["metrics"]
    parts = [("the cat sat on the", "  mat"), ("def", " f"), ("x", "\ny")]
    assert told["log_likelihood"]["value"] == pytest.approx(np.mean([given(*part) for part in parts]))

    def sure(pairs: Sequence[Pair]) -> list[Likelihood]:
        return [Likelihood(-1.0, pair.continuation[-1] == ord("f"), 1) for pair in pairs]

    accuracy = scored(write("last", "kind: cloze", [{"text": text} for text in texts]), model(sure))["metrics"]
    assert accuracy["accuracy"]["value"] == pytest.approx(1 / 3)


def test_generation_is_right_where_it_is_the_answer_up_to_white_space(write):
    asked = []

    def continued(prompts, stops, max_tokens):
        asked.append((list(prompts), stops, max_tokens))
        return [" blue ", "wrong"]

    records = [{"prompt": "sky is", "answer": "blue"}, {"prompt": "sea is", "answer": "wet"}]
    path = write("go_on", 'kind: generation\nmax_tokens: 5\nstop: ["\\n", ";"]', records)
    assert scored(path, model(continued=continued))["metrics"]["exact_match"]["value"] == 0.5
    assert asked == [(["sky is", "sea is"], ("\n", ";"), 5)]
    with pytest.raises(Refused, match=r"^go_on: generation needs a causal language model"):
        check(read_tasks([str(path)]), causal=False)


STEREOTYPES = [
    {"sent_more": "He was poor", "sent_less": "She was poor", "bias_type": "gender", "stereo_antistereo": "stereo"},
    {"sent_more": "old men drive", "sent_less": "young men drive", "bias_type": "age"},
    {"sent_more": "old men sing", "sent_less": "young men sing", "bias_type": "age"},
]


def test_crows_pairs_scores_what_both_sentences_share_or_under_its_own_name_the_whole(write):
    path = write("crows", "kind: crows_pairs", STEREOTYPES)
    with pytest.raises(Refused, match=r"^crows: crows_pairs .* needs a masked language model; kind: crows_pairs_whole"):
        check(read_tasks([str(path)]), causal=True)
    asked: list[Inside] = []

    def inside(texts: Sequence[Inside]) -> list[float]:
        asked.extend(texts)
        return [-1.0, -2.0, -3.0, -2.0, -2.0, -2.0]

    told = scored(path, model(causal=False, inside=inside))
    assert told["metrics"]["stereotypical"]["value"] == (1 + 0 + 0.5) / 3 and told["by"]["age"]["value"] == 0.25
    shared = [["".join(chr(text.ids[place]) for place in text.places) for text in asked[n : n + 2]] for n in (0, 2)]
    assert shared[0] == ["e was poor"] * 2 and shared[1][0] == shared[1][1] and shared[1][0].endswith(" men drive")
    renamed = write("whole", "kind: crows_pairs_whole_sentence", STEREOTYPES)
    check(read_tasks([str(renamed)]), causal=True)
    expected = np.mean([whole(pair["sent_more"]) > whole(pair["sent_less"]) for pair in STEREOTYPES])
    assert scored(renamed, model())["metrics"]["stereotypical"]["value"] == pytest.approx(expected)


def test_every_byte_of_a_text_is_scored_once_however_long_it_is(write):
    texts = ["a" * 3, "the quick brown fox jumps over the lazy dog" * 5, "x"]
    path = write("texts", "kind: bits_per_byte", [{"text": text} for text in texts])
    expected = -sum(map(whole, texts)) / math.log(2) / sum(map(len, texts))
    for seq_len in (8, 64, 1024):
        told = scored(path, model(seq_len=seq_len))["metrics"]
        assert told["bits_per_byte"]["value"] == pytest.approx(expected, rel=1e-12)
    assert scored(path, model(causal=False))["metrics"].keys() == {"pseudo_bits_per_byte"}


def test_where_likelihoods_stop_so_do_tasks(write):
    for kind, records in (
        ("minimal_pairs", PAIRS),
        ("multiple_choice", QUESTIONS),
        ("cloze", [{"text": "a b"}]),
        ("bits_per_byte", [{"text": "a b"}]),
    ):
        reads = read_tasks([str(write(kind, f"kind: {kind}", records))])
        assert score_tasks(reads, model(lambda pairs: None)) is None


MISTAKES = {
    "kind: minimal_pair": [r"kind = 'minimal_pair': must be .*; did you mean minimal_pairs\?"],
    "[1, 2]": [r"= \[1, 2\]: .* is a section"],
    "data: x": [r"kind: missing; must be 'bits_per_byte'"],
    "kind: cloze\ndata: no.jsonl": [r"no\.jsonl: cannot be read: No such file"],
    "kind: cloze\ndata: a.jsonl\nshots: 3": [r"shots: no such field; it belongs to .*multiple_choice"],
    "kind: calibration\ndata: a.jsonl\nbins: 0": [r"bins = 0: must be at least 1"],
    "kind: multiple_choice\ndata: a.jsonl\nshots: 3": [r"shots = 3: needs examples"],
    "kind: multiple_choice\ndata: a.jsonl\nprompt: x": [r"prompt = 'x': must contain \{question\}"],
    "kind: multiple_choice\ndata: q.jsonl\nshots: 3\nexamples: q.jsonl": [r"shots = 3, and q\.jsonl has 1 examples"],
    "kind: {": [r"line 1: not YAML"],
    "kind: cloze\ndata: empty.jsonl": [r"empty\.jsonl: is empty; a line is a JSON object with text"],
    "kind: cloze\ndata: a.jsonl": [r"a\.jsonl, line 3: text: missing; must be text"],
    "kind: bits_per_byte\ndata: broken.jsonl": [r"broken\.jsonl, line 1: not JSON"],
    "kind: minimal_pairs\ndata: q.jsonl": [r"line 1: sentence_good: missing", r"line 1: sentence_bad: missing"],
    "kind: multiple_choice\ndata: far.jsonl": [r"line 1: answer = 2: must be less than 2, the number of choices"],
    "kind: cloze\ndata: one.jsonl": [r"line 1: text = 'one': must have two words at least"],
    "kind: cloze\ndata: latin.jsonl": [r"latin\.jsonl: is not UTF-8"],
}


@pytest.mark.parametrize(("text", "patterns"), MISTAKES.items(), ids=list(MISTAKES))
def test_mistakes_in_files_are_told_by_file_and_line(tmp_path, text, patterns):
    files = {
        "a": b'{"text": "a b"}\n\n{"txt": "a b"}\n',
        "q": b'{"question": "?", "choices": ["a", "b"], "answer": 0}\n',
        "far": b'{"question": "?", "choices": ["a", "b"], "answer": 2}\n',
        "one": b'{"text": "one"}\n',
        "empty": b"\n",
        "broken": b'{"text": \n',
        "latin": b'{"text": "\xe9 b"}\n',
    }
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_tasks([str(path)])
    assert len(caught.value.lines) == len(patterns), caught.value.lines
    for line, pattern in zip(caught.value.lines, patterns, strict=True):
        assert line.startswith(str(tmp_path)), line
        assert re.search(pattern, line), line


def test_folders_are_read_in_the_order_of_names_and_names_are_told_apart(tmp_path, write):
    write("b", "kind: minimal_pairs", PAIRS)
    write("a", "kind: cloze", [{"text": "a b"}])
    assert [read.name for read in read_tasks([str(tmp_path)])] == ["a", "b"]
    with pytest.raises(ConfigError, match="two files are called a; results are told by that name"):
        read_tasks([str(tmp_path), str(tmp_path / "a.yaml")])
    with pytest.raises(ConfigError, match=r"--tasks \S+none: no such file or folder"):
        read_tasks([str(tmp_path / "none")])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match=r"no \.yaml file is in this folder"):
        read_tasks([str(tmp_path / "bare")])
