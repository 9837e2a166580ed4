"""A checkpoint before tasks and the default suite."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.generate import continued, make_decoder, prompt_of
from llm_jax.eval.pseudo import Inside, MaskedScore, masked_scores, pseudo_log_likelihoods
from llm_jax.eval.requests import Likelihood, Pair, log_likelihoods
from llm_jax.eval.restore import for_decoding
from llm_jax.eval.sampling import Sampling
from llm_jax.eval.scorer import Score
from llm_jax.eval.suite import NO_SUITE, Suite, score_suite
from llm_jax.eval.task_files import Read
from llm_jax.eval.task_scores import Likelihoods, Model, score_task
from llm_jax.guards import Stop
from llm_jax.mesh import compiled_for_one_call
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Transformer, Weights, split
from llm_jax.run import Run

Continue = Callable[[Sequence[str], Sequence[str], int], list[str] | None]


def score_tasks(reads: Sequence[Read], model: Model) -> dict[str, Any] | None:
    """Each task's figures under its name; None where it was stopped."""
    figures = {}
    for read in reads:
        scored = score_task(read, model)
        if scored is None:
            return None
        figures[read.name] = scored
    return figures


def suite_of(suite: Suite | None, trained: Likelihoods, before: Likelihoods, *, causal: bool) -> dict[str, Any] | None:
    """What `score_suite` tells, nothing in it where the held-out text has no Python; None where it was stopped."""
    return dict(NO_SUITE) if suite is None else score_suite(suite, trained, before, causal=causal)


def likelihoods_before(asking: Callable[[Weights], Likelihoods], run: Run) -> Likelihoods:
    """The likelihoods of one list of pairs under the weights that training begins with: asked once, then known."""
    told: Sequence[Likelihood] | None = None

    def likelihoods(pairs: Sequence[Pair]) -> Sequence[Likelihood] | None:
        nonlocal told
        if told is None:
            told = asking(untrained(run.model, run.seed))(pairs)
        assert told is None or len(told) == len(pairs)
        return told

    return likelihoods


def untrained(cfg: ModelConfig, seed: int) -> Weights:
    """The weights that training with this seed begins with, on the set mesh."""

    def init() -> Weights:
        parts = split(Transformer(cfg, nnx.Rngs(params=jax.random.key(seed))))
        return parts.params, parts.balance

    return jax.jit(init, compiler_options=compiled_for_one_call())()


def causal_model(
    score: Score, weights: Weights, run: Run, tokenizer: Tokenizer, *, stride: int, batch_rows: int, stop: Stop
) -> Model:
    """What tasks ask, answered by weights on the set mesh; batch_rows is what the mesh divides."""
    seq_len = run.data.seq_len
    likelihoods = likelihoods_of(score, weights, seq_len, batch_rows, stop)
    go_on = _continued(weights, run, tokenizer, batch_rows, stop)
    return Model(tokenizer, seq_len, stride, causal=True, likelihoods=likelihoods, continued=go_on)


def masked_model(
    score: MaskedScore, weights: Weights, run: Run, tokenizer: Tokenizer, *, batch_rows: int, stop: Stop
) -> Model:
    """What tasks ask of a masked model: likelihoods are within-word left-to-right, `inside` is the original."""
    seq_len = run.data.seq_len
    likelihoods = pseudo_likelihoods_of(score, weights, tokenizer.word_starts, seq_len, batch_rows, stop)

    def inside(asked: Sequence[Inside]) -> list[float] | None:
        told = masked_scores(score, weights, asked, None, seq_len=seq_len, batch_rows=batch_rows, stop=stop)
        return None if told is None else [-float(text.nll_N.sum(dtype=np.float64)) for text in told]

    return Model(tokenizer, seq_len, seq_len, causal=False, likelihoods=likelihoods, inside=inside)


def pseudo_likelihoods_of(
    score: MaskedScore, weights: Weights, words_V2: np.ndarray, seq_len: int, batch_rows: int, stop: Stop
) -> Likelihoods:
    """The function from pairs to pseudo-log-likelihoods, within-word left-to-right; words_V2: Tokenizer.word_starts."""

    def likelihoods(pairs: Sequence[Pair]) -> list[Likelihood] | None:
        return pseudo_log_likelihoods(
            score, weights, pairs, words_V2, seq_len=seq_len, batch_rows=batch_rows, stop=stop
        )

    return likelihoods


def likelihoods_of(score: Score, weights: Weights, seq_len: int, batch_rows: int, stop: Stop) -> Likelihoods:
    """The function from pairs to likelihoods."""

    def likelihoods(pairs: Sequence[Pair]) -> list[Likelihood] | None:
        return log_likelihoods(score, weights, pairs, seq_len=seq_len, batch_rows=batch_rows, stop=stop)

    return likelihoods


def _continued(weights: Weights, run: Run, tokenizer: Tokenizer, batch_rows: int, stop: Stop) -> Continue:
    """The function (prompts, stop strings, most tokens) -> the likeliest continuations, token by token."""

    def go_on(prompts: Sequence[str], stops: Sequence[str], max_tokens: int) -> list[str] | None:
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
        # Prompts of about the same length share a batch, which is as long as its longest.
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        texts = [""] * len(prompts)
        with for_decoding(weights, run.model) as (unrolled, cfg):
            decoder = make_decoder(cfg, run.data.seq_len, sampling)
            for start in range(0, len(order), batch_rows):
                if stop():
                    return None
                batch = order[start : start + batch_rows]
                asked = [prompt_of(tokenizer, prompts[n], n) for n in batch]
                for n, text in zip(batch, continued(decoder, unrolled, tokenizer, asked, stops), strict=True):
                    texts[n] = text
        return texts

    return go_on
