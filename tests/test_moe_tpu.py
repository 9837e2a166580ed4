"""Ways of experts that do not run on a CPU compile ahead of time, for TPU chips that this machine does not have."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import Array
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from llm_jax.alphabet import MESH_AXES
from llm_jax.mesh import acts
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.model.moe import Moe
from llm_jax.model.paths import placed
from llm_jax.model.weights import Balance

pytestmark = pytest.mark.slow

B, T, D = 8, 256, 256


@pytest.fixture
def mesh(monkeypatch) -> Mesh:
    """Eight v5e chips: fsdp 2 x expert 4."""
    # No metadata server is asked, and several test processes may compile at once.
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    devices = mesh_utils.create_device_mesh((1, 2, 1, 1, 4), devices=topology.devices)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def compiled_text(moe: MoeConfig, mesh: Mesh) -> str:
    """The program of one layer's forward and backward pass in bfloat16."""
    cfg = ModelConfig(d_model=D, period=(LayerConfig(moe=True),), moe=moe, compute_dtype="bfloat16")

    def loss(params: nnx.State, balance: nnx.State, x_BTD: Array, real_BT: Array) -> Array:
        y_BTD, routing = nnx.merge(graph, params, balance)(x_BTD, real_BT, cfg)
        return jnp.sum(y_BTD.astype(jnp.float32)) + routing.load_balance + routing.router_z

    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        parts: Any = jax.eval_shape(lambda key: nnx.split(Moe(cfg, nnx.Rngs(params=key)), nnx.Param, Balance), key)
        graph, *weights = parts
        params, balance = placed(weights, mesh)
        x_BTD = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16, sharding=jax.NamedSharding(mesh, acts("BTD")))
        real_BT = jax.ShapeDtypeStruct((B, T), jnp.bool, sharding=jax.NamedSharding(mesh, acts("BT")))
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
        return gradient.lower(params, balance, x_BTD, real_BT).compile().as_text() or ""


def count(text: str, collective: str) -> int:
    return len(re.findall(rf" {collective}(?:-start)?\(", text))


def test_ragged_all_to_all_compiles(mesh):
    moe = MoeConfig(d_ff=256, balance_rate=0.01, exchange="ragged_all_to_all", grouped_matmul="ragged")
    text = compiled_text(moe, mesh)
    # Tokens and gates there, results back; and each of them once more in the backward pass.
    assert count(text, "ragged-all-to-all") == 6
