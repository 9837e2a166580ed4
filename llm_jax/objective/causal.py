"""Next-token prediction: every token of a row is predicted from those before it in its document."""

import jax.numpy as jnp
from jax import Array

from llm_jax.batch import Batch, documents, place
from llm_jax.data.config import BOS_ID, PAD_ID


def make_batch(rows_ABU: Array, cross_documents: bool) -> Batch:
    """Rows of U = T + 1 tokens as inputs and next tokens; no loss on predicting a document's BOS, nor on padding."""
    segments_ABU, positions_ABU = documents(rows_ABU)
    if cross_documents:
        segments_ABU = jnp.zeros_like(segments_ABU)
        positions_ABU = jnp.zeros_like(positions_ABU) + jnp.arange(rows_ABU.shape[-1])[None, None]
    targets_ABT = rows_ABU[..., 1:]
    weights_ABT = ((targets_ABT != BOS_ID) & (targets_ABT != PAD_ID)).astype(jnp.float32)
    return Batch(
        tokens_BT=place(rows_ABU[..., :-1]),
        segments_BT=place(segments_ABU[..., :-1]),
        positions_BT=place(positions_ABU[..., :-1]),
        targets_BN=place(targets_ABT),
        weights_BN=place(weights_ABT),
    )
