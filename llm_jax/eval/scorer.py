"""Forward scoring: rows of tokens in, every target's negative log-likelihood out, on any mesh and process count."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array, NamedSharding, P

from llm_jax.eval.windows import Rows
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Weights, abstract_model
from llm_jax.objective.cross_entropy import token_scores


class Scores(NamedTuple):
    """Of each target: nats (float32 [B, T]) and whether it is the first guess (bool [B, T])."""

    nll_BT: np.ndarray
    correct_BT: np.ndarray


Score = Callable[[Weights, Rows], Scores]


def make_score(cfg: ModelConfig) -> Score:
    """The function (weights, rows) -> scores, compiled once for each shape; every process gets the scores of all rows.

    cfg's attention is resolved, the mesh is set, and its row axes divide B. What shares a batch makes no difference.
    """
    graph = abstract_model(cfg).graph

    @jax.jit
    def forward(
        weights: Weights, tokens_BT: Array, segments_BT: Array, positions_BT: Array, targets_BT: Array
    ) -> tuple[Array, Array]:
        model = nnx.merge(graph, *weights)
        x_BTD, _ = model(tokens_BT, segments_BT, positions_BT, cfg, causal=True)
        nll_BT, correct_BT = token_scores(x_BTD, model.head(cfg), targets_BT, cfg)
        return jax.reshard((nll_BT, correct_BT > 0), P())

    def score(weights: Weights, rows: Rows) -> Scores:
        asked = (rows.tokens_BT, rows.segments_BT, rows.positions_BT, rows.targets_BT)
        return Scores(*jax.device_get(forward(weights, *map(on_mesh, asked))))

    return score


def on_mesh(array_BT: np.ndarray) -> Array:
    """An array that every process has whole, as the global array of the set mesh."""
    sharding = NamedSharding(jax.sharding.get_mesh(), acts("BT"))
    return jax.make_array_from_callback(array_BT.shape, sharding, lambda index: array_BT[index])
