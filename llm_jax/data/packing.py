"""Documents become rows of U = T + 1 tokens: BOS, document, BOS, document ... cut every T tokens.

A row's last token is the next row's first one, so that every token but the first is predicted exactly once. The last
row is filled up with PAD, which no loss counts.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.data.tokenizer import Tokenizer

# Documents are encoded together until they are this many characters, so that threads have work.
ENCODE_TOGETHER = 4_000_000


def row_dtype(vocab_size: int) -> np.dtype:
    """The smallest one that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def rows(texts: Iterable[str], tokenizer: Tokenizer, seq_len: int) -> Iterator[np.ndarray]:
    """row_U after row_U, of row_dtype; no text gives no row."""
    dtype = row_dtype(tokenizer.vocab_size)
    bos = np.array([BOS_ID], dtype)
    rest = np.empty(0, dtype)  # begins with the last token of the row before
    n_rows = 0
    for group in _together(texts):
        tokens = np.concatenate(
            [rest, *(part for ids in tokenizer.encode_many(group) for part in (bos, ids.astype(dtype)))]
        )
        while len(tokens) > seq_len:
            yield tokens[: seq_len + 1]
            tokens = tokens[seq_len:]
            n_rows += 1
        rest = tokens
    if len(rest) > 1 or (len(rest) and not n_rows):
        yield np.concatenate([rest, np.full(seq_len + 1 - len(rest), PAD_ID, dtype)])


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
