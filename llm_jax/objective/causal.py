"""Next-token prediction: every token of a row is predicted from those before it in its document."""

import jax.numpy as jnp
from jax import Array

from llm_jax.batch import Batch, place, segments_and_positions
from llm_jax.data.config import BOS_ID, PAD_ID


def make_batch(rows_ABU: Array, cross_documents: bool) -> Batch:
    """Rows of U = T + 1 tokens as inputs and next tokens; no loss on predicting a document's BOS, nor on padding."""
    segments_ABT, positions_ABT = segments_and_positions(rows_ABU, cross_documents)
    targets_ABT = rows_ABU[..., 1:]
    weights_ABT = ((targets_ABT != BOS_ID) & (targets_ABT != PAD_ID)).astype(jnp.float32)
    return Batch(
        tokens_BT=place(rows_ABU[..., :-1]),
        segments_BT=segments_ABT,
        positions_BT=positions_ABT,
        targets_BN=place(targets_ABT),
        weights_BN=place(weights_ABT),
    )
