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


def test_ragged_all_to_all_and_the_kernels_compile():
    mesh = mesh_on("v5e:2x4", fsdp=2, expert=4)
    moe = MoeConfig(d_ff=256, balance_rate=0.01, exchange="ragged_all_to_all", grouped_matmul="mosaic")
    text = compiled_text(moe, mesh)
    # Tokens and gates there, results back; in the backward pass each once more, but that some versions of XLA join two.
    assert len(re.findall(r" ragged-all-to-all(-start)?\(", text)) in (5, 6)
    # Up, gate and down: rows, their gradient and the weight's, and what is computed again is none of it.
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 9


# Rows, columns and terms of whole tiles, and of parts of them.
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("R", "D", "F", "E"), [(4096, 1024, 2816, 8), (5000, 1408, 1000, 64), (40, 24, 300, 3)])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernels_compile_for_chips(topology, R, D, F, E, dtype):
    device = mesh_on(topology, data=4).devices.flat[0]

    def both(x_RD: Array, weight_EDF: Array, sizes_E: Array, dy_RF: Array) -> Any:
        y_RF, pull = jax.vjp(lambda x, weight: grouped_matmul(x, weight, sizes_E, "mosaic"), x_RD, weight_EDF)
        return y_RF, pull(dy_RF)

    shapes = ((R, D), dtype), ((E, D, F), dtype), ((E,), jnp.int32), ((R, F), dtype)
    there = jax.sharding.SingleDeviceSharding(device)
    compiled = jax.jit(both).lower(*(jax.ShapeDtypeStruct(*shape, sharding=there) for shape in shapes)).compile()
    assert (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"') == 3
