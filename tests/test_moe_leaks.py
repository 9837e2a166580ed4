"""Experts that drop nothing leak nothing between packed documents: the same choices, and logits within rounding."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import Array

from llm_jax.batch import documents, place
from llm_jax.data.config import BOS_ID
from llm_jax.model.config import ModelConfig, MoeConfig
from llm_jax.model.transformer import Weights, abstract_model, logits
from tests.invariance import MODELS, put_all
from tests.small import B, mesh_of, packed_row, put, slowly

DROPLESS = MODELS["experts"]
CHANGED = slice(18, 26)


def change_outside(cfg: ModelConfig, mesh: dict[str, int]) -> tuple[int, float]:
    """What other tokens of one document change for the others: tokens that choose other experts, and their logits."""
    devices = mesh_of(**mesh)
    rng = np.random.default_rng(1)
    rows = np.stack([packed_row(rng, 10, 9, 7, first=7) for _ in range(B)])
    perturbed = rows.copy()
    perturbed[:, CHANGED] = rng.integers(BOS_ID + 1, cfg.vocab_size, (B, 8))

    def seen(weights: Weights, rows_BU: Array) -> tuple[Array, dict[str, Array]]:
        tokens_BT, segments_BT, positions_BT = (place(x[None, :, :-1])[0] for x in (rows_BU, *documents(rows_BU)))
        model = nnx.merge(abstract_model(cfg).graph, *weights)
        x_BTD, routing = model(tokens_BT, segments_BT, positions_BT, cfg, causal=True)
        return logits(model, x_BTD, cfg), {name: of.experts_LBTX for name, of in routing.items()}

    with jax.set_mesh(devices):
        forward = jax.jit(seen)
        weights = put_all(cfg, devices)
        (before, chosen), (after, chosen_after) = (
            jax.device_get(forward(weights, put(r, "BU", devices))) for r in (rows, perturbed)
        )
    outside_T = np.ones(before.shape[1], bool)
    outside_T[CHANGED] = False
    others = sum(int(np.any(chosen[name] != chosen_after[name], axis=-1)[:, :, outside_T].sum()) for name in chosen)
    change_BTV = np.abs(after[..., : cfg.vocab_size] - before[..., : cfg.vocab_size])
    assert change_BTV[:, CHANGED].max() > 0.1
    return others, float(change_BTV[:, outside_T].max())


@pytest.mark.parametrize("mesh", [slowly({}), {"expert": 4, "fsdp": 2}], ids=str)
def test_dropless_experts_leak_nothing(mesh: dict[str, int]) -> None:
    others, change = change_outside(DROPLESS, mesh)
    assert others == 0 and change <= 1e-6


def test_with_a_capacity_documents_compete_and_it_is_seen() -> None:
    assert DROPLESS.moe is not None
    tight: MoeConfig = DROPLESS.moe.model_copy(
        update={"capacity_factor": 0.5, "exchange": "all_to_all", "grouped_matmul": "einsum"}
    )
    assert change_outside(DROPLESS.model_copy(update={"moe": tight}), {})[1] > 1e-3
