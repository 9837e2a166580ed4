"""A look at held-out rows during training, with the live weights: the first rows of the split, always the same."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from llm_jax.data.loader import Rows
from llm_jax.data.store import Records
from llm_jax.eval.config import EvalConfig
from llm_jax.eval.dropless import dropless
from llm_jax.eval.figures import Figures, Sums, figures
from llm_jax.eval.rows import make_ask, make_row_sums
from llm_jax.model.backends import resolve
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Weights
from llm_jax.objective.config import MlmConfig, ObjectiveConfig

Validate = Callable[[Weights, Callable[[], bool]], Figures | None]


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
    piece_bytes [V] are the bytes that each id stands for, word_starts_V is Tokenizer.word_starts. What is drawn for a
    row is a function of seed and row alone. The mesh is set. Compiled at the first call, once.
    """
    mesh = jax.sharding.get_mesh()
    rows = dataclasses.replace(rows, records=First(rows.records, config.rows))
    ask = make_ask(objective, word_starts_V, seed=seed, cross_documents=cross_documents)
    sums = make_row_sums(
        resolve(dropless(cfg), mesh.devices.flat[0].platform, mesh.shape["expert"]),
        objective,
        ask,
        rows,
        piece_bytes,
        config.batch_rows,
    )

    def validate(weights: Weights, stop: Callable[[], bool]) -> Figures | None:
        total = Sums()
        for t in range(-(-len(rows) // config.batch_rows)):
            if stop():
                return None
            total = total.plus(sums(weights, t))
        return figures(total, masked=isinstance(objective, MlmConfig))

    return validate
