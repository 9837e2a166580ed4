"""Documents become rows of U = T + 1 tokens: BOS, document, BOS, document ... cut every T tokens.

A row's last token is the next row's first one, so that every token but the first is predicted exactly once. The last
row is filled up with PAD, which no loss counts.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.data.tokenizer import Tokenizer

# Documents are encoded together until they are this many characters, so that threads have work.
ENCODE_TOGETHER = 4_000_000


def row_dtype(vocab_size: int) -> np.dtype:
    """The smallest one that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def rows(
    texts: Iterable[str], tokenizer: Tokenizer, seq_len: int, done: Callable[[str], None]
) -> Iterator[tuple[np.ndarray, int]]:
    """(row [U], tokens of it that no earlier row has) in order; done is called with each text once it is in rows."""
    dtype = row_dtype(tokenizer.vocab_size)
    bos = np.array([BOS_ID], dtype)
    rest = np.empty(0, dtype)
    first = True
    for group in _together(texts):
        parts = [rest]
        for ids in tokenizer.encode_many(group):
            parts += [bos, ids.astype(dtype)]
        tokens = np.concatenate(parts)
        n_rows = max((len(tokens) - 1) // seq_len, 0)
        for k in range(n_rows):
            yield tokens[k * seq_len : (k + 1) * seq_len + 1], seq_len + first
            first = False
        rest = tokens[n_rows * seq_len :]
        for text in group:
            done(text)
    if len(rest) > 1 or (first and len(rest)):
        padding = np.full(seq_len + 1 - len(rest), PAD_ID, dtype)
        yield np.concatenate([rest, padding]), len(rest) - 1 + first


def _together(texts: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive texts in lists worth a batch encoding."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= ENCODE_TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group
