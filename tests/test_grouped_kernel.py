"""The experts' kernels for GPUs, read aloud on a CPU: they give the numbers of a loop, and lower for CUDA."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from llm_jax.config import ConfigError
from llm_jax.mesh import acts
from llm_jax.model import grouped_kernel, kernels
from llm_jax.model.grouped_matmul import grouped_matmul
from llm_jax.model.moe import resolve_moe
from llm_jax.model.paths import placed
from tests.small import QUICKLY, mesh_of
from tests.test_flash import ANNOUNCED, gpus, lowered_for_cuda
from tests.test_moe import MESHES, B, D, T, abstract_moe, assert_right, compiled, config, expected, inputs, result

TILED = config(exchange="all_gather", grouped_matmul="tiled")


@pytest.fixture
def read_aloud(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", True)


def wrongness(sizes_E: np.ndarray, R: int, D: int, F: int) -> float:
    """The largest difference of the product or a gradient from a loop's, as a share of its largest value."""
    rng = np.random.default_rng(0)
    x_RD, weight_EDF, dy_RF = (rng.normal(size=s).astype(np.float32) for s in ((R, D), (sizes_E.size, D, F), (R, F)))

    def both(x_RD: Array, weight_EDF: Array, dy_RF: Array) -> Any:
        y_RF, pull = jax.vjp(
            lambda x, weight: grouped_matmul(x, weight, jnp.asarray(sizes_E), "tiled"), x_RD, weight_EDF
        )
        return y_RF, *pull(dy_RF)

    got = jax.device_get(jax.jit(both, compiler_options=QUICKLY)(x_RD, weight_EDF, dy_RF))
    right = [np.zeros(a.shape, np.float64) for a in got]
    stops = np.cumsum(sizes_E)
    for e, (start, stop) in enumerate(zip(stops - sizes_E, stops, strict=True)):
        x, weight, dy = x_RD[start:stop].astype(float), weight_EDF[e].astype(float), dy_RF[start:stop].astype(float)
        right[0][start:stop], right[1][start:stop], right[2][e] = x @ weight, dy @ weight.T, x.T @ dy
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in zip(got, right, strict=True))


# Empty groups, groups of one row, of whole tiles, and rows of nobody; widths that are filled up.
@pytest.mark.parametrize(
    ("sizes", "R", "D", "F"),
    [
        ((300, 0, 256, 1), 587, 5, 3),
        pytest.param((0, 0, 7), 7, 16, 24, marks=pytest.mark.slow),
        pytest.param((128, 128), 256, 96, 320, marks=pytest.mark.slow),
    ],
)
def test_it_is_a_matmul_a_group_and_zero_elsewhere(sizes, R, D, F, read_aloud):
    assert wrongness(np.array(sizes), R, D, F) < 1e-6


def test_experts_are_the_loops(read_aloud):
    given = inputs(TILED)
    outcome = result(compiled(TILED, mesh_of(), given), TILED, mesh_of(), given)
    assert_right(outcome, expected("all_gather x blocked", given))


@ANNOUNCED
@pytest.mark.parametrize(
    "mesh", ["context 2 x expert 2 x tensor 2", pytest.param("expert 4 x fsdp 2", marks=pytest.mark.slow)]
)
def test_experts_lower_for_gpus(mesh):
    """Forward and backward: three products in three kernels each; over which axes they vary is checked by JAX."""
    devices = gpus(**MESHES[mesh])

    def loss(params: nnx.State, balance: nnx.State, x_BTD: Array, real_BT: Array) -> Array:
        y_BTD, _ = nnx.merge(graph, params, balance)(x_BTD, real_BT, TILED)
        return jnp.sum(jnp.square(y_BTD))

    with jax.sharding.use_abstract_mesh(devices):
        graph, *weights = abstract_moe(TILED)
        params, balance = placed(weights, devices)
    x_BTD, real_BT = (
        jax.ShapeDtypeStruct((B, T, D)[: len(letters)], dtype, sharding=jax.NamedSharding(devices, acts(letters)))
        for letters, dtype in (("BTD", jnp.float32), ("BT", jnp.bool))
    )
    text = lowered_for_cuda(jax.grad(loss, (0, 2)), devices, params, balance, x_BTD, real_BT)
    assert text.count("__gpu$xla.gpu.triton") == 9


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_it_is_refused_where_it_cannot_be(platform):
    assert TILED.moe is not None
    with pytest.raises(ConfigError) as refused:
        resolve_moe(TILED.moe, platform, 1)
    assert str(refused.value) == (
        f"model.moe.grouped_matmul = 'tiled' is a kernel for GPUs, and this is a {platform}; "
        "there are blocked and ragged"
    )


def masks_forgotten(monkeypatch):
    """A group's last tile adds up the next group's rows, too."""
    monkeypatch.setattr(grouped_kernel, "_between", lambda row, first, stop: row >= first)


def matrix_not_turned(monkeypatch):
    """The gradient of the rows is made with the matrix as it lies."""
    by_group = grouped_kernel.by_group
    monkeypatch.setattr(grouped_kernel, "by_group", lambda *a, transposed=False: by_group(*a))


@pytest.mark.slow
@pytest.mark.parametrize("plant", [masks_forgotten, matrix_not_turned])
def test_planted_defect_is_seen(plant, monkeypatch, read_aloud):
    plant(monkeypatch)
    assert wrongness(np.array([100, 28]), 128, 16, 16) > 1e-3
