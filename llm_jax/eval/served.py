"""One process asks, all answer: process 0 runs somebody else's program, and the others serve what it asks a model."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax

from llm_jax.data.config import EOS_ID
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.generate import Prompt, make_decoder, streams
from llm_jax.eval.perplexity import job_progress
from llm_jax.eval.requests import Likelihood, Pair
from llm_jax.eval.restore import for_decoding
from llm_jax.eval.sampling import Sampling
from llm_jax.eval.task_scores import Likelihoods
from llm_jax.guards import Stop
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Weights
from llm_jax.processes import settle

TOPIC = "served requests"
# The coordination service takes a few megabytes at once.
PART = 2**20
# Process 0 may download for hours before it asks; if it dies, the coordination service ends the wait.
PATIENCE_S = 24 * 3600.0


class Model(NamedTuple):
    """What answers: on every process the same, its mesh set. stop is asked in the same places on all processes."""

    cfg: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    likelihoods: Likelihoods
    seq_len: int
    batch_rows: int
    stop: Stop


class Asker(NamedTuple):
    """What a program may ask. Both answer in the order of what is asked, and raise NotFinite for what is no number."""

    likelihoods: Callable[[Sequence[Pair]], list[Likelihood]]
    """The model's."""
    texts: Callable[[Sequence[Prompt], Sampling, Sequence[str]], list[str]]
    """The prompts' continuations, each up to its first stop string."""


class _Stopped(Exception):
    """A signal came."""


Result = TypeVar("Result")


def first_alone(work: Callable[[], Result]) -> Result | None:
    """What process 0 makes of it while the others wait, and get None. What it raises releases them, as in `served`."""
    if jax.process_index() > 0:
        _heard()
        return None
    try:
        result = work()
    except BaseException as error:
        _fail(error)
        raise
    _tell("")
    return result


def served(model: Model, program: Callable[[Asker], Result]) -> Result | None:
    """What the program returns, on process 0; the others answer with it until it ends. None there, and where stopped.

    What the program raises is raised on process 0, and releases the others with the same exit code; see settle.
    """
    if jax.process_index() > 0:
        _serve(model)
        return None
    alone = True

    def ask(request: Mapping[str, Any]) -> list[Any]:
        nonlocal alone
        _tell(json.dumps(request))
        alone = False
        answers = _answers(model, request)
        if answers is None:
            raise _Stopped
        alone = True
        return answers

    def likelihoods(pairs: Sequence[Pair]) -> list[Likelihood]:
        return ask({"pairs": [[*map(_plain, pair)] for pair in pairs]})

    def texts(prompts: Sequence[Prompt], sampling: Sampling, stops: Sequence[str]) -> list[str]:
        told = [[_plain(prompt.ids), prompt.row] for prompt in prompts]
        return ask({"prompts": told, "sampling": dataclasses.asdict(sampling), "stops": list(stops)})

    try:
        result = program(Asker(likelihoods, texts))
    except _Stopped:
        return None
    except BaseException as error:
        # What fails while all answer fails on all.
        if alone:
            _fail(error)
        raise
    _tell("null")
    return result


def _plain(ids: Sequence[int]) -> list[int]:
    """As JSON has them, whatever they come from."""
    return [int(i) for i in ids]


def _serve(model: Model) -> None:
    while (request := json.loads(_heard())) is not None:
        if _answers(model, request) is None:
            return


def _tell(text: str) -> None:
    """Process 0's text to all others."""
    parts = [text[start : start + PART] for start in range(0, len(text), PART)]
    for part in (str(len(parts)), *parts):
        settle(TOPIC, "", lambda said, part=part: part, timeout_s=PATIENCE_S)


def _heard() -> str:
    def never_asked(said: list[str]) -> NoReturn:
        raise AssertionError("process 0 decides")

    def part() -> str:
        return settle(TOPIC, "", never_asked, timeout_s=PATIENCE_S)

    return "".join([part() for _ in range(int(part()))])


def _fail(error: BaseException) -> None:
    def judge(said: list[str]) -> NoReturn:
        raise error

    settle(TOPIC, "", judge, timeout_s=PATIENCE_S)


def _answers(model: Model, request: Mapping[str, Any]) -> list[Any] | None:
    """What all processes do with a request; None where they stopped."""
    if "pairs" in request:
        return _likelihoods(model, [Pair(*pair) for pair in request["pairs"]])
    prompts = [Prompt(*prompt) for prompt in request["prompts"]]
    return _texts(model, prompts, Sampling(**request["sampling"]), request["stops"])


def _likelihoods(model: Model, pairs: Sequence[Pair]) -> list[Likelihood] | None:
    answers = model.likelihoods(pairs)
    return None if answers is None else list(answers)


def _texts(model: Model, prompts: Sequence[Prompt], sampling: Sampling, stops: Sequence[str]) -> list[str] | None:
    """Prompts of about one length share a batch, so that none waits for a longer one."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n].ids))
    with (
        for_decoding(model.weights, model.cfg) as (weights, cfg),
        job_progress("generating", len(prompts)) as advance,
    ):
        decoder = make_decoder(cfg, model.seq_len, sampling)
        for first in range(0, len(prompts), model.batch_rows):
            batch = order[first : first + model.batch_rows]
            for pieces in streams(decoder, weights, model.tokenizer, [prompts[n] for n in batch], stops):
                if model.stop():
                    return None
                for n, piece in zip(batch, pieces, strict=True):
                    texts[n] += piece
            advance(len(batch))
    # A draw from what is no number is a token like another; the same text's score tells.
    written = [
        [*prompt.ids[1:], *model.tokenizer.encode(text), EOS_ID] for prompt, text in zip(prompts, texts, strict=True)
    ]
    scores = _likelihoods(model, [Pair(prompt.ids[:1], ids) for prompt, ids in zip(prompts, written, strict=True)])
    return None if scores is None else texts
