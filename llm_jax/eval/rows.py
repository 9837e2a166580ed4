"""Held-out rows as the objective asks about them: what is drawn for a row is a function of seed and row alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, NamedSharding

from llm_jax.batch import Batch, row_keys
from llm_jax.data.loader import Rows, batch
from llm_jax.eval.figures import Sums
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Weights, abstract_model
from llm_jax.objective import loss as objectives
from llm_jax.objective.config import ObjectiveConfig

# Masks of evaluations are drawn apart from training's.
EVALUATION = 2

# Rows int32 [1, B, U] and the number of the first of them -> what a model reads and is asked.
Ask = Callable[[Array, Array], Batch]

RowSums = Callable[[Weights, int], Sums]


def make_ask(objective: ObjectiveConfig, word_starts_V: np.ndarray, *, seed: int, cross_documents: bool) -> Ask:
    """The function from rows to questions, to be called inside jit; word_starts_V: Tokenizer.word_starts."""

    def ask(rows_ABU: Array, first: Array) -> Batch:
        key = jax.random.fold_in(jax.random.key(seed), EVALUATION)
        keys_AB = row_keys(key, first, *rows_ABU.shape[:2])
        batch_A = objectives.make_batch(rows_ABU, keys_AB, objective, word_starts_V, cross_documents=cross_documents)
        return jax.tree.map(lambda x: x[0], batch_A)

    return ask


def rows_on_mesh(rows: Rows, t: int, batch_rows: int) -> tuple[Array, np.uint32]:
    """Rows t * batch_rows and on, in stored order, as rows_ABU on the set mesh, and the number of the first of them."""
    sharding = NamedSharding(jax.sharding.get_mesh(), acts("ABU"))
    rows_ABU = batch(rows, t, batch_rows=batch_rows, accumulation=1, sharding=sharding)
    return rows_ABU, np.uint32(t * batch_rows)


def make_row_sums(
    cfg: ModelConfig, objective: ObjectiveConfig, ask: Ask, rows: Rows, piece_bytes: np.ndarray, batch_rows: int
) -> RowSums:
    """The function (weights, t) -> sums over rows t * batch_rows and on, compiled at the first call, once.

    rows are in stored order; piece_bytes [V] are the bytes that each id stands for. The mesh is set.
    """
    graph = abstract_model(cfg).graph

    @jax.jit
    def sums(weights: Weights, rows_ABU: Array, first: Array) -> tuple[Array, Array, Array, Array]:
        asked = ask(rows_ABU, first)
        _, statistics, _ = objectives.sums(nnx.merge(graph, *weights), asked, cfg, objective)
        bytes_BN = jnp.asarray(piece_bytes).at[asked.targets_BN].get(mode="clip", out_sharding=acts("BN"))
        weighted_BN = asked.weights_BN.astype(jnp.int32)
        return statistics["loss"], statistics["accuracy"], jnp.sum(weighted_BN), jnp.sum(bytes_BN * weighted_BN)

    def row_sums(weights: Weights, t: int) -> Sums:
        summed = jax.device_get(sums(weights, *rows_on_mesh(rows, t, batch_rows)))
        return Sums(*(value.item() for value in summed))

    return row_sums
