"""The experts' kernels for GPUs and TPUs, read aloud on a CPU: they give the numbers of a loop, and lower for CUDA.

That they compile for TPUs is in test_moe_tpu.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from llm_jax.config import ConfigError
from llm_jax.mesh import acts
from llm_jax.model import grouped_mosaic, grouped_tiled, kernels
from llm_jax.model.grouped_matmul import Backend, grouped_matmul
from llm_jax.model.moe import resolve_moe
from llm_jax.model.paths import placed
from tests.small import mesh_of
from tests.test_flash import ANNOUNCED, gpus, lowered_for_cuda
from tests.test_moe import MESHES, B, D, T, abstract_moe, assert_right, compiled, config, expected, inputs, result

TILED, MOSAIC = (config(exchange="all_gather", grouped_matmul=kernel) for kernel in ("tiled", "mosaic"))
KERNELS = {"tiled": grouped_tiled, "mosaic": grouped_mosaic}


@pytest.fixture
def read_aloud(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", True)


@pytest.fixture
def as_a_tpu(monkeypatch):
    """A TPU's memory too: what nobody has written is NaN, and no kernel reads behind the end of what there is."""
    monkeypatch.setattr(kernels, "INTERPRET", pltpu.InterpretParams(uninitialized_memory="nan"))


def wrongness(backend: Backend, sizes_E: np.ndarray, R: int, D: int, F: int) -> float:
    """The largest difference of the product or a gradient from a loop's, as a share of its largest value."""
    rng = np.random.default_rng(0)
    x_RD, weight_EDF, dy_RF = (rng.normal(size=s).astype(np.float32) for s in ((R, D), (sizes_E.size, D, F), (R, F)))

    def both(x_RD: Array, weight_EDF: Array, dy_RF: Array) -> Any:
        y_RF, pull = jax.vjp(
            lambda x, weight: grouped_matmul(x, weight, jnp.asarray(sizes_E), backend), x_RD, weight_EDF
        )
        return y_RF, *pull(dy_RF)

    got = jax.device_get(jax.jit(both)(x_RD, weight_EDF, dy_RF))
    right = [np.zeros(a.shape, np.float64) for a in got]
    stops = np.cumsum(sizes_E)
    for e, (start, stop) in enumerate(zip(stops - sizes_E, stops, strict=True)):
        x, weight, dy = x_RD[start:stop].astype(float), weight_EDF[e].astype(float), dy_RF[start:stop].astype(float)
        right[0][start:stop], right[1][start:stop], right[2][e] = x @ weight, dy @ weight.T, x.T @ dy
    return max(float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1)) for a, b in zip(got, right, strict=True))


# Empty groups, groups of one row, of whole tiles, and rows of nobody; widths that are filled up, and of several tiles.
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("sizes", "R", "D", "F"),
    [
        ((300, 0, 256, 1), 587, 5, 3),
        pytest.param((0, 0, 7), 7, 16, 24, marks=pytest.mark.slow),
        pytest.param((128, 128), 256, 96, 320, marks=pytest.mark.slow),
        pytest.param((0, 100, 300, 0, 0), 1024, 1500, 1100, marks=pytest.mark.slow),
        pytest.param((0, 0, 0), 40, 16, 24, marks=pytest.mark.slow),
    ],
)
def test_it_is_a_matmul_a_group_and_zero_elsewhere(backend, sizes, R, D, F, request):
    request.getfixturevalue("as_a_tpu" if backend == "mosaic" else "read_aloud")
    assert wrongness(backend, np.array(sizes), R, D, F) < 1e-6


@pytest.mark.parametrize("sizes", [(300, 0, 256, 31), (0, 0, 0, 587), (587,), (1,) * 100 + (487,)])
@pytest.mark.parametrize("at_least", [0, 1])
def test_a_tpu_does_each_rows_work_once(sizes, at_least):
    """Every row is in one visit, and every tile is left for good; so work grows by a tile a group, not by E times."""
    R, rows = 587, 128
    # Compiled as one: operation by operation it is a dozen programs.
    visits = jax.jit(lambda sizes_E: grouped_mosaic._visits(sizes_E, R, rows, at_least))
    group, tile, start, stop = jax.device_get(visits(np.array(sizes)))
    seen = np.zeros(R, int)
    for n in np.flatnonzero(stop > start):
        seen[max(start[n], tile[n] * rows) : min(stop[n], (tile[n] + 1) * rows)] += 1
    assert np.all(seen == 1) and np.all(np.diff(tile) >= 0) and np.all(np.diff(group) >= 0)
    assert group.size <= -(-R // rows) + len(sizes)
    assert not at_least or set(group) == set(range(len(sizes)))


@pytest.mark.parametrize("cfg", [TILED, MOSAIC], ids=KERNELS)
def test_experts_are_the_loops(cfg, read_aloud):
    given = inputs(cfg)
    outcome = result(compiled(cfg, mesh_of(), given), cfg, mesh_of(), given)
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


@pytest.mark.parametrize(
    ("cfg", "platform", "told"),
    [
        (TILED, "cpu", "'tiled' is a kernel for GPUs, and this is a cpu; there are blocked and ragged"),
        (TILED, "tpu", "'tiled' is a kernel for GPUs, and this is a tpu; there are mosaic, blocked and ragged"),
        (MOSAIC, "gpu", "'mosaic' is a kernel for TPUs, and this is a gpu; there are tiled, blocked and ragged"),
    ],
)
def test_it_is_refused_where_it_cannot_be(cfg, platform, told):
    with pytest.raises(ConfigError) as refused:
        resolve_moe(cfg.moe, platform, 1)
    assert str(refused.value) == f"model.moe.grouped_matmul = {told}"


def masks_forgotten(monkeypatch):
    """A group's last tile adds up the next group's rows, too."""
    monkeypatch.setattr(grouped_tiled, "_between", lambda row, first, stop: row >= first)
    monkeypatch.setattr(grouped_mosaic, "_kept", lambda x, **_: x)


def matrix_not_turned(monkeypatch):
    """The gradient of the rows is made with the matrix as it lies."""
    for module in KERNELS.values():
        by_group = module.by_group
        monkeypatch.setattr(module, "by_group", lambda *a, it=by_group, transposed=False: it(*a))


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("plant", [masks_forgotten, matrix_not_turned])
def test_planted_defect_is_seen(backend, plant, monkeypatch, read_aloud):
    plant(monkeypatch)
    assert wrongness(backend, np.array([100, 28]), 128, 16, 16) > 1e-3
