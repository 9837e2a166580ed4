"""The invariance matrix: model, objective, mesh, accumulation and remat in every pair; and defects that turn it red.

A sample of it, in which every pair occurs too; all of it is run by benchmarks/invariance.py.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from llm_jax.mesh import acts
from llm_jax.objective import cross_entropy
from llm_jax.objective import loss as objectives
from tests import invariance
from tests.conftest import ROOT
from tests.invariance import (
    ACCUMULATIONS,
    MESHES,
    MODELS,
    NEAREST,
    OBJECTIVES,
    REMATS,
    TOLERANCE,
    Difference,
    Setting,
    difference,
    hardest,
    matrix,
    nearest_scores,
    one_device,
    outcome,
    sample,
)
from tests.small import forgets, slowly

# The one in which most can go wrong; the others are slow together.
QUICK = Setting("experts", "mlm", "expert 4 x fsdp 2", 4, "full")
DOCUMENT = ROOT / "docs" / "invariance.md"


@pytest.mark.parametrize(("settings", "at_least"), [(matrix(), 48), (sample(), 24)], ids=["matrix", "sample"])
def test_every_pair_of_settings_occurs(settings: Sequence[Setting], at_least: int):
    fields = (MODELS, OBJECTIVES, MESHES, ACCUMULATIONS, REMATS)
    assert len(settings) == len(set(settings)) >= at_least and QUICK in settings
    assert set(hardest()) < set(settings) <= set(matrix())
    for i, j in itertools.combinations(range(len(fields)), 2):
        assert {(s[i], s[j]) for s in settings} == set(itertools.product(fields[i], fields[j]))


def assert_same(setting: Setting) -> None:
    one, reference = outcome(setting), one_device(setting.model, setting.objective)
    apart = difference(one, reference)
    assert apart.experts == 0, apart
    for name, load in reference.loads.items():
        np.testing.assert_array_equal(one.loads[name], load)
    assert apart.loss <= TOLERANCE and apart.gradient <= TOLERANCE, apart


@pytest.mark.parametrize(
    "setting",
    [pytest.param(s, id="-".join(map(str, s)), marks=[] if s == QUICK else pytest.mark.slow) for s in sample()],
)
def test_nothing_changes_loss_gradient_or_experts(setting: Setting):
    assert_same(setting)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_choice_of_experts_is_so_close_that_rounding_decides(objective: str):
    assert nearest_scores(objective) > NEAREST


def test_the_document_tells_of_every_setting_and_of_no_other():
    told = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| (\d+) \| (\w+) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert [Setting(m, o, mesh, int(a), r) for m, o, mesh, a, r in told] == list(matrix())


# Planted defects. Each is a mistake that codebases have made.


def auxiliary_mean_per_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divides the router's z-loss by each microbatch's own tokens, and the sum by the number of microbatches."""
    weights, sums = objectives.weights, objectives.sums
    microbatches = []

    def one(batch, cfg):
        microbatches.append(batch.tokens_BT.shape[0])
        return weights(batch, cfg) | {"router_z": jnp.ones(())}

    def mean(model, batch, cfg, objective):
        losses, statistics, loads = sums(model, batch, cfg, objective)
        share = 1 / weights(batch, cfg)["router_z"] / microbatches[-1]
        return losses | {"router_z": losses["router_z"] * share}, statistics | {"router_z": jnp.zeros(())}, loads

    monkeypatch.setattr(objectives, "weights", one)
    monkeypatch.setattr(objectives, "sums", mean)


def mean_of_device_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divides each device's loss by the weight of its own rows, and the sum by the number of devices that have any."""
    weights, sums = objectives.weights, objectives.sums

    def shares(weights_BN: Array) -> Array:
        mine = jnp.sum(weights_BN)
        devices = jax.lax.psum((mine > 0).astype(jnp.float32), "data")
        return weights_BN / jnp.maximum(mine, 1) / devices

    def mean(model, batch, cfg, objective):
        shares_BN = jax.shard_map(shares, in_specs=acts("BN"), out_specs=acts("BN"))(batch.weights_BN)
        losses, _, loads = sums(model, dataclasses.replace(batch, weights_BN=shares_BN), cfg, objective)
        return losses, sums(model, batch, cfg, objective)[1], loads

    monkeypatch.setattr(objectives, "weights", lambda b, cfg: weights(b, cfg) | {"cross_entropy": jnp.ones(())})
    monkeypatch.setattr(objectives, "sums", mean)


def mask_keyed_by_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws a row's mask from its number inside the microbatch."""
    row_keys = invariance.row_keys
    monkeypatch.setattr(invariance, "row_keys", lambda key, first, A, B: jnp.stack([row_keys(key, first, 1, B)[0]] * A))


def no_sum_over_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows on different expert ranks are never added up."""
    monkeypatch.setattr(cross_entropy, "summed_as_stored", forgets("expert"))


@pytest.mark.parametrize(
    ("plant", "setting"),
    [
        slowly(auxiliary_mean_per_microbatch, Setting("experts", "causal", "1", 4, "none")),
        slowly(mean_of_device_means, Setting("dense", "causal", "data 8", 1, "none")),
        slowly(mask_keyed_by_microbatch, Setting("dense", "mlm", "1", 4, "none")),
        (no_sum_over_expert, Setting("dense", "causal", "expert 4 x fsdp 2", 1, "none")),
    ],
)
def test_planted_defect_is_seen(plant: Callable, setting: Setting, monkeypatch: pytest.MonkeyPatch):
    right = one_device(setting.model, setting.objective)
    plant(monkeypatch)
    apart: Difference = difference(outcome(setting), right)
    assert apart.experts > 0 or max(apart.loss, apart.gradient) > 100 * TOLERANCE, apart
