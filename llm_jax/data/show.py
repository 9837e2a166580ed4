"""Rows as text, for people: every document's part on lines of its own."""

import itertools

import numpy as np

from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.data.tokenizer import Tokenizer


def show_row(row_U: np.ndarray, tokenizer: Tokenizer) -> str:
    """The segments of a row, each under a line that says which tokens they are."""
    n_tokens = int((row_U != PAD_ID).sum())
    starts = np.flatnonzero(row_U[:n_tokens] == BOS_ID).tolist()
    borders = [*([] if starts[:1] == [0] else [0]), *starts, n_tokens]
    lines = []
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        begins = "a document begins" if start in starts else "a document goes on"
        lines.append(f"--- segment {number}, tokens {start} to {end - 1}: {begins}")
        lines.append(tokenizer.decode(row_U[start:end].tolist()))
    if n_tokens < len(row_U):
        lines.append(f"--- {len(row_U) - n_tokens} tokens of padding")
    return "\n".join(lines)
