"""A look at held-out rows during training, with the live weights: the first rows of the split, always the same."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, NamedSharding

from llm_jax.batch import row_keys
from llm_jax.data.loader import Rows, batch
from llm_jax.data.store import Records
from llm_jax.eval.config import EvalConfig
from llm_jax.eval.figures import Figures, Sums, figures
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Weights, abstract_model
from llm_jax.objective import loss as objectives
from llm_jax.objective.config import ObjectiveConfig

Validate = Callable[[Weights, Callable[[], bool]], Figures | None]

# Masks of evaluations are drawn apart from training's.
EVALUATION = 2


@dataclasses.dataclass(frozen=True)
class First:
    """The first n records of others; what a batch asks for beyond them is padding, which has no weight."""

    records: Records
    n: int

    def __len__(self) -> int:
        return min(self.n, len(self.records))

    def __getitems__(self, numbers: Sequence[int]) -> Sequence[bytes]:
        return self.records.__getitems__(numbers)


def make_validation(
    cfg: ModelConfig,
    objective: ObjectiveConfig,
    config: EvalConfig,
    rows: Rows,
    piece_bytes: np.ndarray,
    word_starts_V: np.ndarray,
    *,
    seed: int,
    cross_documents: bool,
) -> Validate:
    """The function (weights, stop) -> figures over the first config.rows rows; None where stop() told it to stop.

    stop is asked once before each batch, and must answer alike on all processes. rows are the split's in stored order;
    piece_bytes [V] are the bytes that each id stands for, word_starts_V whether it begins a word. What is drawn for a
    row is a function of seed and row alone. The mesh is set. Compiled at the first call, once.
    """
    rows = dataclasses.replace(rows, records=First(rows.records, config.rows))
    sums = jax.jit(make_sums(cfg, objective, piece_bytes, word_starts_V, seed=seed, cross_documents=cross_documents))
    sharding = NamedSharding(jax.sharding.get_mesh(), acts("ABU"))

    def validate(weights: Weights, stop: Callable[[], bool]) -> Figures | None:
        total = Sums()
        for t in range(-(-len(rows) // config.batch_rows)):
            if stop():
                return None
            first = np.uint32(t * config.batch_rows)
            rows_ABU = batch(rows, t, batch_rows=config.batch_rows, accumulation=1, sharding=sharding)
            total = total.plus(Sums(*(value.item() for value in jax.device_get(sums(weights, rows_ABU, first)))))
        return figures(total)

    return validate


def make_sums(
    cfg: ModelConfig,
    objective: ObjectiveConfig,
    piece_bytes: np.ndarray,
    word_starts_V: np.ndarray,
    *,
    seed: int,
    cross_documents: bool,
) -> Callable[[Weights, Array, Array], tuple[Array, Array, Array, Array]]:
    """The function (weights, rows_ABU, number of the first row) -> the fields of Sums as replicated scalars.

    One microbatch; to be jitted.
    """
    graph = abstract_model(cfg).graph

    def sums(weights: Weights, rows_ABU: Array, first: Array) -> tuple[Array, Array, Array, Array]:
        key = jax.random.fold_in(jax.random.key(seed), EVALUATION)
        keys_AB = row_keys(key, first, *rows_ABU.shape[:2])
        batch_A = objectives.make_batch(rows_ABU, keys_AB, objective, word_starts_V, cross_documents=cross_documents)
        asked = jax.tree.map(lambda x: x[0], batch_A)
        _, statistics, _ = objectives.sums(nnx.merge(graph, *weights), asked, cfg, objective)
        bytes_BN = jnp.asarray(piece_bytes).at[asked.targets_BN].get(mode="clip", out_sharding=acts("BN"))
        weighted_BN = asked.weights_BN.astype(jnp.int32)
        return statistics["loss"], statistics["accuracy"], jnp.sum(weighted_BN), jnp.sum(bytes_BN * weighted_BN)

    return sums
