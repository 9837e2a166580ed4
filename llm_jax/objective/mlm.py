"""Masked-language modelling: some tokens of a row are hidden, and predicted from both sides of their document."""

import numpy as np
from jax import Array

from llm_jax.batch import Batch
from llm_jax.objective.config import MlmConfig


def make_batch(
    rows_ABU: Array, keys_AB: Array, objective: MlmConfig, word_starts_V: np.ndarray, cross_documents: bool
) -> Batch:
    """The first T tokens of rows of U = T + 1 tokens, some of them hidden; keys_AB: a key a row."""
    raise NotImplementedError
