"""`llm-jax generate`: prompts continued by a checkpoint, streamed to a terminal or told in order as they are ready."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from llm_jax.config import ConfigError
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.beam import Finder, Searching, make_finder, search
from llm_jax.eval.evaluation import opened, whole_batch, write
from llm_jax.eval.generate import Decoder, Piece, Prompt, Text, decoding, make_decoder, prompt_of, room
from llm_jax.eval.perplexity import NotFinite
from llm_jax.eval.restore import for_decoding, restore_weights
from llm_jax.eval.sampling import Sampling
from llm_jax.guards import Stop, never
from llm_jax.model.transformer import Weights


class Asked(NamedTuple):
    """What is to be continued, and how."""

    prompts: Sequence[str]
    how: Sampling | Searching
    samples: int = 1
    """Texts of each prompt; of a search the so many best."""
    stops: Sequence[str] = ()
    """A text ends before the first of these."""
    as_json: bool = False
    from_stdin: bool = False
    """Only one process can have read the prompts."""


class Continuation:
    """A text under way, or whole."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._text = Text(tokenizer, stops)
        self.text = ""
        self.ids: list[int] = []
        self.log_likelihood = 0.0
        self.score: float | None = None
        """What a search went by."""
        self.ended: str | None = None
        """By what: "document", "stop" or "length"."""

    def add(self, piece: Piece) -> str:
        """What is certain of the text by now, and was not before. Raises NotFinite."""
        if self.ended is not None:
            return ""
        told = ""
        for i, nats in zip(piece.ids, piece.nats, strict=False):
            told += self._text.add([i])
            self.ids.append(i)
            self.log_likelihood += nats
            if self._text.stopped:
                self.ended = "stop"
                break
        else:
            self.log_likelihood += sum(piece.nats[len(piece.ids) :])
            if piece.ended:
                self.ended = "document"
                told += self._text.add([], last=True)
        if not math.isfinite(self.log_likelihood):
            raise NotFinite("the model's scores are not numbers: its weights are broken; try an earlier --step")
        self.text += told
        return told

    def cut(self) -> str:
        """What is still to be told where nothing follows, since there are enough tokens."""
        if self.ended is not None:
            return ""
        self.ended = "length"
        told = self._text.add([], last=True)
        self.text += told
        return told

    def record(self, prompt: str) -> dict[str, Any]:
        """As a line of JSON has it."""
        score = {} if self.score is None else {"score": self.score}
        told = {"prompt": prompt, "text": self.text, "ids": self.ids, "log_likelihood": self.log_likelihood}
        return {**told, **score, "ended": self.ended}


def generate_text(run_dir: str, step: int | None, overrides: Sequence[str], asked: Asked, stop: Stop = never) -> None:
    """Prints each prompt and its continuation, or a line of JSON for each.

    One text is printed as it comes, several each when it is ready, in order. stop is asked after every few tokens, and
    must answer alike on all processes. Needs the job's processes joined. Raises Refused for a masked language model,
    ConfigError where several processes would have to read standard input.
    """
    if asked.from_stdin and jax.process_count() > 1:
        raise ConfigError("--prompts -: only one process could read standard input; give a file that all can read")
    with (
        opened(run_dir, step, overrides, continues=True) as (found, run, mesh),
        for_decoding(restore_weights(found, run.model, mesh), run.model) as (weights, cfg),
    ):
        prompts = [prompt_of(found.tokenizer, text, n * asked.samples) for n, text in enumerate(asked.prompts)]
        _tell_cuts(prompts, room(run.data.seq_len, cfg.learned_positions, asked.how.max_tokens))
        rows = whole_batch(run, jax.sharding.get_mesh())
        match asked.how:
            case Sampling() as sampling:
                decoder = make_decoder(cfg, run.data.seq_len, sampling)
                if len(prompts) * asked.samples == 1 and not asked.as_json:
                    _stream(decoder, weights, found.tokenizer, asked, prompts[0], stop)
                    return
                texts = _sampled(decoder, weights, found.tokenizer, asked, prompts, rows, stop)
            case Searching() as searching:
                finder = make_finder(cfg, run.data.seq_len, searching)
                texts = _searched(finder, weights, found.tokenizer, asked, prompts, rows, stop)
        for n, text in enumerate(texts):
            _tell(asked, n, text)


def _stream(decoder: Decoder, weights: Weights, tokenizer: Tokenizer, asked: Asked, prompt: Prompt, stop: Stop) -> None:
    """One text to the terminal, token by token."""
    write(asked.prompts[0])
    text = Continuation(tokenizer, asked.stops)
    for (piece,) in decoding(decoder, weights, [prompt], chunk=1):
        write(text.add(piece))
        if text.ended == "stop" or stop():
            break
    write(text.cut() + "\n")


def _sampled(
    decoder: Decoder,
    weights: Weights,
    tokenizer: Tokenizer,
    asked: Asked,
    prompts: Sequence[Prompt],
    rows: int,
    stop: Stop,
) -> Iterator[Continuation]:
    """The texts in order, each as soon as it and those before it are whole; none after a stop.

    Samples of a prompt follow each other, and so share its reading where they share a batch.
    """
    every = [Prompt(prompt.ids, prompt.row + n) for prompt in prompts for n in range(asked.samples)]
    for first in range(0, len(every), rows):
        batch = every[first : first + rows]
        texts = [Continuation(tokenizer, asked.stops) for _ in batch]
        told = 0
        for pieces in decoding(decoder, weights, batch):
            for text, piece in zip(texts, pieces, strict=True):
                text.add(piece)
            while told < len(texts) and texts[told].ended is not None:
                yield texts[told]
                told += 1
            if stop():
                return
            if all(text.ended is not None for text in texts):
                break
        for text in texts[told:]:
            text.cut()
            yield text


def _searched(
    finder: Finder,
    weights: Weights,
    tokenizer: Tokenizer,
    asked: Asked,
    prompts: Sequence[Prompt],
    rows: int,
    stop: Stop,
) -> Iterator[Continuation]:
    """The best texts of each prompt, in the prompts' order; none after a stop."""
    size = max(rows // finder.searching.beams, 1)
    for first in range(0, len(prompts), size):
        for found in search(finder, weights, prompts[first : first + size]):
            if stop():
                return
            for best in found:
                for text in best[: asked.samples]:
                    whole = Continuation(tokenizer, asked.stops)
                    whole.add(Piece(text.ids, [0.0] * len(text.ids), text.ended))
                    whole.cut()
                    whole.log_likelihood, whole.score = text.log_likelihood, text.score
                    yield whole


def _tell(asked: Asked, n: int, text: Continuation) -> None:
    """The n-th of all texts."""
    prompt, total = asked.prompts[n // asked.samples], len(asked.prompts) * asked.samples
    if asked.as_json:
        write(json.dumps(text.record(prompt)) + "\n")
    else:
        write(f"[{n + 1}/{total}] " * (total > 1) + prompt + text.text + "\n")


def _tell_cuts(prompts: Sequence[Prompt], read: int) -> None:
    for n, prompt in enumerate(prompts, start=1):
        if len(prompt.ids) > read and jax.process_index() == 0:
            print(f"prompt {n} has {len(prompt.ids)} tokens; the model sees the last {read}", file=sys.stderr)
