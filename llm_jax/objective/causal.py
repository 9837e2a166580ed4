"""Next-token prediction: every token of a row is predicted from those before it in its document."""

import jax.numpy as jnp
from jax import Array

from llm_jax.batch import Batch, documents, place
from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Transformer
from llm_jax.objective.config import CausalConfig
from llm_jax.objective.cross_entropy import cross_entropy_sums


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
        targets_BT=place(targets_ABT),
        weights_BT=place(weights_ABT),
    )


def weights(batch: Batch) -> dict[str, Array]:
    """The weight of every loss and statistic, from the batch alone; float32 scalars over all microbatches in it."""
    tokens = jnp.sum(batch.weights_BT)
    return {"cross_entropy": tokens, "loss": tokens, "z_loss": tokens, "accuracy": tokens}


def sums(
    model: Transformer, batch: Batch, cfg: ModelConfig, objective: CausalConfig
) -> tuple[dict[str, Array], dict[str, Array]]:
    """One microbatch's loss sums, to be differentiated with coefficient 1 each, and its statistics' sums.

    cross_entropy: nats plus the z-loss; loss: nats; z_loss: squared log-normalisers; accuracy: right first guesses.
    """
    x_BTD = model(batch.tokens_BT, batch.segments_BT, batch.positions_BT, cfg, causal=True)
    total, parts = cross_entropy_sums(x_BTD, model.head(cfg), batch.targets_BT, batch.weights_BT, cfg, objective.z_loss)
    return {"cross_entropy": total}, {"loss": parts.nll, "z_loss": parts.z_squared, "accuracy": parts.correct}
