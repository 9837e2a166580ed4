"""Mesh and accumulation change nothing: same losses, same gradients; and planted defects that turn the proofs red."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array

from llm_jax.batch import Batch
from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Transformer, abstract_model
from llm_jax.objective import cross_entropy
from llm_jax.objective import loss as objectives
from llm_jax.objective.causal import make_batch
from llm_jax.objective.config import CausalConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.train.state import with_weights
from llm_jax.train.step import gradient_sums, make_step
from tests.small import (
    AS_SHIPPED,
    CFG,
    SETTINGS,
    B,
    U,
    deviation,
    forgets,
    mesh_of,
    plain_rows,
    put,
    put_weights,
    ragged_rows,
    slowly,
    weights_of,
)

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4 x fsdp 2": {"tensor": 4, "fsdp": 2},
    "context 2 x fsdp 2 x tensor 2": {"context": 2, "fsdp": 2, "tensor": 2},
    "data 2 x expert 2 x tensor 2": {"data": 2, "expert": 2, "tensor": 2},
}
OTHER = CFG.model_copy(
    update={"tied_embeddings": True, "mlp": "gelu", "attention": "xla", "remat": "full", "logit_soft_cap": None}
)
OBJECTIVE = CausalConfig(z_loss=1e-2)
# With b1 = 0 and no clipping Adam's first moment is the gradient, as the step itself used it.
OPTIM = AdamWConfig(b1=0.0, clip_norm=None, warmup_steps=2)
BATCHES = (ragged_rows(0), plain_rows(1), ragged_rows(2), ragged_rows(3))
TOLERANCE = 1e-5


class Outcome(NamedTuple):
    """What each of four updates over BATCHES reported, and its gradient."""

    metrics: list[dict[str, np.ndarray]]
    gradients: list[optax.Params]


def train(
    *,
    mesh: dict[str, int] | None = None,
    accumulation: int = 1,
    cfg: ModelConfig = CFG,
    optimised: bool = False,
) -> Outcome:
    """Four updates of the real step, compiled once, from the same weights."""
    devices = mesh_of(**(mesh or {}))
    weights = put_weights(weights_of(cfg), cfg, devices)
    with jax.set_mesh(devices):
        state = jax.jit(lambda params: with_weights(params, nnx.State({}), OPTIM))(weights)
        step = make_step(cfg, OBJECTIVE, OPTIM, **SETTINGS, steps=4)
        compiled = None
        outcome = Outcome([], [])
        for rows in BATCHES:
            rows_ABU = put(rows.reshape(accumulation, B // accumulation, U), "ABU", devices)
            if compiled is None:
                compiled = jax.jit(step).lower(state, rows_ABU).compile(AS_SHIPPED if optimised else None)
            state, metrics = compiled(state, rows_ABU)
            outcome.metrics.append(jax.device_get(metrics))
            outcome.gradients.append(jax.device_get(state.opt_state[0].mu))
    return outcome


@functools.cache
def one_device(other: bool = False, optimised: bool = False) -> Outcome:
    """What all others are held against: one device, one microbatch."""
    return train(cfg=OTHER if other else CFG, optimised=optimised)


def wrongness(outcome: Outcome, reference: Outcome) -> float:
    """The worst of all losses' differences and all gradient leaves' deviations."""
    losses = [abs(m["loss"] - m0["loss"]) for m, m0 in zip(outcome.metrics, reference.metrics, strict=True)]
    leaves = [deviation(g, g0) for g, g0 in zip(outcome.gradients, reference.gradients, strict=True)]
    return float(np.max(np.asarray([*losses, *leaves])))


def test_deviation_is_of_the_leaf_and_forgives_only_what_is_nothing():
    reference = {"a": np.array([1.0, 0.0]), "b": np.array([1e-3]), "c": np.array([1e-9])}
    assert deviation(reference, reference) == 0
    assert deviation(reference | {"a": np.array([1.0, 1e-5])}, reference) == pytest.approx(1e-5)
    assert deviation(reference | {"b": np.array([1.01e-3])}, reference) == pytest.approx(1e-2)
    assert deviation(reference | {"c": np.array([1e-8])}, reference) == pytest.approx(9e-6)
    assert deviation(reference | {"c": np.array([math.nan])}, reference) == math.inf


# What the program's own options compile is slow, and proves all meshes; what is compiled quickly proves some every day.
@pytest.mark.parametrize(
    ("mesh", "optimised"),
    [("tensor 4 x fsdp 2", False), ("data 2 x expert 2 x tensor 2", False), *(slowly(mesh, True) for mesh in MESHES)],
)
def test_mesh_changes_no_loss_and_no_gradient(mesh, optimised):
    outcome, reference = train(mesh=MESHES[mesh], optimised=optimised), one_device(optimised=optimised)
    assert wrongness(outcome, reference) <= TOLERANCE
    for metrics, expected, rows in zip(outcome.metrics, reference.metrics, BATCHES, strict=True):
        assert metrics["tokens"] == expected["tokens"] == weight_of(rows)
        assert metrics["batch_hash"] == expected["batch_hash"]
        for name in ("accuracy", "z_loss", "grad_norm", "lr"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)


# Every day BERT's layers show it, in test_layers.py: tied, gelu, recomputed, on the same mesh.
@pytest.mark.slow
def test_mesh_changes_nothing_with_the_other_choices_of_the_model():
    outcome = train(mesh=MESHES["context 2 x fsdp 2 x tensor 2"], cfg=OTHER)
    assert wrongness(outcome, one_device(other=True)) <= TOLERANCE


@pytest.mark.parametrize(
    ("accumulation", "mesh"), [slowly(2, {}), slowly(4, {}), (4, MESHES["context 2 x fsdp 2 x tensor 2"])]
)
def test_accumulation_changes_no_loss_and_no_gradient(accumulation, mesh):
    outcome = train(mesh=mesh, accumulation=accumulation)
    assert wrongness(outcome, one_device()) <= TOLERANCE


def weight_of(rows: np.ndarray) -> int:
    """Tokens that are predicted: all but the first of a row, documents' first ones and padding."""
    return int(np.sum((rows[:, 1:] != BOS_ID) & (rows[:, 1:] != PAD_ID)))


def test_the_ragged_batch_weighs_unevenly():
    rows = BATCHES[0]
    by_microbatch = [weight_of(part) for part in np.split(rows, 4)]
    by_device = [weight_of(row[None]) for row in rows]
    assert max(by_microbatch) > 10 * min(by_microbatch) > 0
    assert min(by_device) == 0 and max(by_device) == U - 1


# Planted defects. Each is a mistake that codebases have made, and turns the proof above red.


def mean_per_microbatch(monkeypatch):
    """Divides each microbatch's loss by its own weight, and the sum by the number of microbatches."""
    weights, sums = objectives.weights, objectives.sums
    microbatches = []

    def one(batch_A: Batch, cfg: ModelConfig):
        microbatches.append(batch_A.tokens_BT.shape[0])
        return weights(batch_A, cfg) | {"cross_entropy": jnp.ones(())}

    def mean(model: Transformer, batch: Batch, cfg: ModelConfig, objective: CausalConfig):
        losses, statistics, loads = sums(model, batch, cfg, objective)
        return (
            {"cross_entropy": losses["cross_entropy"] / jnp.sum(batch.weights_BN) / microbatches[-1]},
            statistics,
            loads,
        )

    monkeypatch.setattr(objectives, "weights", one)
    monkeypatch.setattr(objectives, "sums", mean)


def mean_of_device_means(monkeypatch):
    """Divides each device's loss by the weight of its own rows, and the sum by the number of devices that have any."""
    weights, sums = objectives.weights, objectives.sums

    def one(batch_A: Batch, cfg: ModelConfig):
        return weights(batch_A, cfg) | {"cross_entropy": jnp.ones(())}

    def shares(weights_BT: Array) -> Array:
        mine = jnp.sum(weights_BT)
        devices = jax.lax.psum((mine > 0).astype(jnp.float32), "data")
        return weights_BT / jnp.maximum(mine, 1) / devices

    def mean(model: Transformer, batch: Batch, cfg: ModelConfig, objective: CausalConfig):
        shares_BT = jax.shard_map(shares, in_specs=acts("BT"), out_specs=acts("BT"))(batch.weights_BN)
        losses, _, loads = sums(model, dataclasses.replace(batch, weights_BN=shares_BT), cfg, objective)
        return losses, sums(model, batch, cfg, objective)[1], loads

    monkeypatch.setattr(objectives, "weights", one)
    monkeypatch.setattr(objectives, "sums", mean)


def no_sum_over_tensor(monkeypatch):
    """Each device normalises over its own part of the vocabulary."""
    vocabulary_sums = cross_entropy._vocabulary_sums

    def defective(logits_NV: Array, targets_N: Array):
        with monkeypatch.context() as patch:
            patch.setattr(jax.lax, "psum", lambda x, axes: x)
            return vocabulary_sums(logits_NV, targets_N)

    monkeypatch.setattr(cross_entropy, "_vocabulary_sums", defective)


def no_sum_over_tokens_axes(monkeypatch):
    """The head's gradient is that of the context segment's own tokens."""
    monkeypatch.setattr(cross_entropy, "summed_as_stored", forgets("context"))


@pytest.mark.parametrize(
    ("plant", "mesh", "accumulation"),
    [
        (mean_per_microbatch, {}, 4),
        slowly(mean_of_device_means, {"data": 8}, 1),
        (no_sum_over_tensor, {"tensor": 4, "fsdp": 2}, 1),
        slowly(no_sum_over_tokens_axes, {"context": 2, "fsdp": 2, "tensor": 2}, 1),
    ],
)
def test_planted_defect_is_seen(plant: Callable, mesh, accumulation, monkeypatch):
    right = one_device()
    plant(monkeypatch)
    assert wrongness(train(mesh=mesh, accumulation=accumulation), right) > 100 * TOLERANCE


@pytest.mark.parametrize("mesh", MESHES)
def test_a_gradients_type_is_its_parameters_type(mesh):
    with jax.set_mesh(mesh_of(**MESHES[mesh])):
        params = abstract_model(CFG)[1]
        sharding = jax.NamedSharding(jax.sharding.get_abstract_mesh(), acts("ABU"))
        rows_ABU = jax.ShapeDtypeStruct((1, B, U), jnp.int32, sharding=sharding)

        def gradient(params: nnx.State, rows_ABU: Array) -> nnx.State:
            batch_A = make_batch(rows_ABU, False)
            return gradient_sums(params, {}, batch_A, objectives.weights(batch_A, CFG), CFG, OBJECTIVE).gradient

        types = jax.tree.map(jax.typeof, jax.eval_shape(gradient, params, rows_ABU))
    assert jax.tree.leaves(types) == jax.tree.leaves(jax.tree.map(jax.typeof, params))
