"""Held-out text: loss, bits a byte and accuracy, every byte of it scored once, and what compressors make of it."""

import contextlib
import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from llm_jax import exit_codes
from llm_jax.data.errors import DataError
from llm_jax.data.progress import progress
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.figures import Sums
from llm_jax.eval.rows import RowSums
from llm_jax.eval.scorer import Score
from llm_jax.eval.windows import batched, pack
from llm_jax.guards import Stop, never
from llm_jax.model.transformer import Weights


class NotFinite(exit_codes.Failure):
    """The model's scores are not numbers."""

    exit_code = exit_codes.NON_FINITE


class HeldOut(NamedTuple):
    """A document: its name, its exact text, and its tokens (int32 [n]), BOS first."""

    key: str
    text: str
    tokens: np.ndarray


def held_out_of(texts: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> list[HeldOut]:
    """Documents, (name, exact text) each, in the order of their names, with their tokens.

    Raises DataError where the tokenizer does not account for every byte of a text exactly once.
    """
    texts = sorted(texts)
    encoded = tokenizer.encode_many([text for _, text in texts])
    bos = np.array([tokenizer.bos_id], np.int32)
    for (key, text), ids in zip(texts, encoded, strict=True):
        there, told = len(text.encode()), int(tokenizer.piece_bytes[ids].sum())
        if there != told:
            raise DataError(f"{key} has {there} bytes, and its tokens stand for {told}; bits per byte would be wrong")
    return [HeldOut(key, text, np.concatenate([bos, ids])) for (key, text), ids in zip(texts, encoded, strict=True)]


def score_held_out(
    score: Score,
    weights: Weights,
    held_out: Sequence[HeldOut],
    piece_bytes: np.ndarray,
    *,
    seq_len: int,
    stride: int,
    batch_rows: int,
    stop: Stop = never,
) -> Sums | None:
    """Sums over every token of the documents, in windows of seq_len that move on by stride; None where it was stopped.

    batch_rows is a multiple of the mesh's row axes' size; neither it nor the mesh matters to the result. stop is asked
    once before each batch, and must answer alike on all processes.
    Raises NotFinite where a token's score is not a number.
    """
    sums = Sums()
    n_tokens = sum(len(document.tokens) - 1 for document in held_out)
    with job_progress("scoring", n_tokens) as advance:
        for rows in batched(pack((document.tokens for document in held_out), seq_len, stride), batch_rows):
            if stop():
                return None
            nll_BT, correct_BT = score(weights, rows)
            nll_N, targets_N = nll_BT[rows.scored_BT], rows.targets_BT[rows.scored_BT]
            if not np.isfinite(nll_N).all():
                bad = int((~np.isfinite(nll_N)).sum())
                raise NotFinite(
                    f"{bad} of {len(nll_N)} tokens have a loss that is not a number: the weights are broken"
                )
            correct = int(correct_BT[rows.scored_BT].sum())
            n_bytes = int(piece_bytes[targets_N].sum())
            sums = sums.plus(Sums(float(nll_N.sum(dtype=np.float64)), correct, len(nll_N), n_bytes))
            advance(len(nll_N))
    assert sums.tokens == n_tokens
    return sums


def score_rows(row_sums: RowSums, weights: Weights, n_rows: int, batch_rows: int, stop: Stop = never) -> Sums | None:
    """Sums over all rows, in batches; None where it was stopped, which is asked once before each batch.

    Raises NotFinite where a batch's loss is not a number.
    """
    sums = Sums()
    with job_progress("scoring", n_rows) as advance:
        for start in range(0, n_rows, batch_rows):
            if stop():
                return None
            sums = sums.plus(row_sums(weights, start // batch_rows))
            if not math.isfinite(sums.nll):
                raise NotFinite(f"the loss of rows {start} and on is not a number: the weights are broken")
            advance(min(batch_rows, n_rows - start))
    return sums


def compressed(held_out: Sequence[HeldOut]) -> dict[str, float]:
    """Bits a byte of the texts, one after the other, under zlib -9 and lzma (preset 9)."""
    zlib_stream, lzma_stream = zlib.compressobj(9), lzma.LZMACompressor(preset=9)
    n_bytes = zlib_bytes = lzma_bytes = 0
    for document in held_out:
        raw = document.text.encode()
        n_bytes += len(raw)
        zlib_bytes += len(zlib_stream.compress(raw))
        lzma_bytes += len(lzma_stream.compress(raw))
    zlib_bytes += len(zlib_stream.flush())
    lzma_bytes += len(lzma_stream.flush())
    return {"zlib_bits_per_byte": 8 * zlib_bytes / n_bytes, "lzma_bits_per_byte": 8 * lzma_bytes / n_bytes}


def job_progress(label: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """Process 0's progress speaks for all."""
    if jax.process_index() == 0:
        return progress(label, total)
    return contextlib.nullcontext(lambda n: None)
