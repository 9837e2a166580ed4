"""A look at held-out rows during training, with the live weights: the first rows of the split, always the same."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, NamedSharding

from llm_jax.data.loader import Rows, batch
from llm_jax.data.store import Records
from llm_jax.eval.config import EvalConfig
from llm_jax.eval.figures import Figures, Sums, figures
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import abstract_model
from llm_jax.objective import causal
from llm_jax.objective.config import ObjectiveConfig

Validate = Callable[[nnx.State, Callable[[], bool]], Figures | None]


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
    *,
    cross_documents: bool,
) -> Validate:
    """The function (params, stop) -> figures over the first config.rows rows; None where stop() told it to stop.

    stop is asked once before each batch, and must answer alike on all processes. rows are the split's in stored order;
    piece_bytes [V] are the bytes that each id stands for. The mesh is set. Compiled at the first call, once.
    """
    rows = dataclasses.replace(rows, records=First(rows.records, config.rows))
    sums = jax.jit(make_sums(cfg, objective, piece_bytes, cross_documents=cross_documents))
    sharding = NamedSharding(jax.sharding.get_mesh(), acts("ABU"))

    def validate(params: nnx.State, stop: Callable[[], bool]) -> Figures | None:
        total = Sums()
        for t in range(-(-len(rows) // config.batch_rows)):
            if stop():
                return None
            rows_ABU = batch(rows, t, batch_rows=config.batch_rows, accumulation=1, sharding=sharding)
            total = total.plus(Sums(*(value.item() for value in jax.device_get(sums(params, rows_ABU)))))
        return figures(total)

    return validate


def make_sums(
    cfg: ModelConfig, objective: ObjectiveConfig, piece_bytes: np.ndarray, *, cross_documents: bool
) -> Callable[[nnx.State, Array], tuple[Array, Array, Array, Array]]:
    """The function (params, rows_ABU) -> the fields of Sums as replicated scalars; one microbatch, to be jitted."""
    graph, _ = abstract_model(cfg)

    def sums(params: nnx.State, rows_ABU: Array) -> tuple[Array, Array, Array, Array]:
        asked = jax.tree.map(lambda x: x[0], causal.make_batch(rows_ABU, cross_documents))
        _, statistics = causal.sums(nnx.merge(graph, params), asked, cfg, objective)
        bytes_BT = jnp.asarray(piece_bytes).at[asked.targets_BT].get(mode="clip", out_sharding=acts("BT"))
        weighted_BT = asked.weights_BT.astype(jnp.int32)
        return statistics["loss"], statistics["accuracy"], jnp.sum(weighted_BT), jnp.sum(bytes_BT * weighted_BT)

    return sums
