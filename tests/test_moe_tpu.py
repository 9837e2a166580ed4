"""Ways of experts that do not run on a CPU compile ahead of time, for TPU chips that this machine does not have."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from llm_jax.mesh import acts
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.model.grouped_matmul import grouped_matmul
from llm_jax.model.moe import Moe
from llm_jax.model.paths import placed
from llm_jax.model.weights import Balance
from tests.chips import mesh_on

pytestmark = pytest.mark.slow

B, T, D = 8, 256, 256


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


def test_ragged_all_to_all_compiles():
    mesh = mesh_on("v5e:2x4", fsdp=2, expert=4)
    moe = MoeConfig(d_ff=256, balance_rate=0.01, exchange="ragged_all_to_all", grouped_matmul="ragged")
    text = compiled_text(moe, mesh)
    # Tokens and gates there, results back; and each of them once more in the backward pass.
    assert len(re.findall(r" ragged-all-to-all-start\(", text)) == 6


def test_ragged_matmul_does_only_its_work():
    """On a v5p, forward and backward; libtpu 0.0.52 does E times the work on v4, v5e, v6e and tpu7x."""
    device = mesh_on("v5p:2x2x1", data=4).devices.flat[0]
    R, D, F, E = 4096, 256, 512, 8

    def both(x_RD: Array, weight_EDF: Array, sizes_E: Array, dy_RF: Array) -> Any:
        y_RF, pull = jax.vjp(lambda x, weight: grouped_matmul(x, weight, sizes_E, "ragged"), x_RD, weight_EDF)
        return y_RF, pull(dy_RF)

    shapes = ((R, D), jnp.bfloat16), ((E, D, F), jnp.bfloat16), ((E,), jnp.int32), ((R, F), jnp.bfloat16)
    there = jax.sharding.SingleDeviceSharding(device)
    compiled = jax.jit(both).lower(*(jax.ShapeDtypeStruct(*shape, sharding=there) for shape in shapes)).compile()
    cost: Any = compiled.cost_analysis()
    assert cost["flops"] < 1.1 * 3 * 2 * R * D * F
