"""What the step makes of the experts' loads: the direction of the choice biases, and what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.model.config import LayerConfig, MoeConfig
from llm_jax.model.weights import Balance
from llm_jax.train.step import health, rebalanced
from tests.small import CFG, mesh_of

MOE = MoeConfig(experts=4, balance_rate=0.25)
SPARSE = CFG.model_copy(update={"period": (LayerConfig(moe=True),), "moe": MOE})
LOADS = {"0": jnp.asarray([[5, 1, 3, 3]], jnp.int32), "1+2": jnp.asarray([[9, 0, 0, 0], [2, 2, 2, 2]], jnp.int32)}


def balance(**places: list) -> nnx.State:
    """Choice biases as the model's state has them."""
    return nnx.State(
        {"layers": {name: {"mlp": {"bias": Balance(jnp.asarray(value))}} for name, value in places.items()}}
    )


def test_a_bias_goes_down_where_load_is_above_its_layers_mean_and_up_below_it():
    before = balance(**{"0": [0.0, 0.0, 0.0, 1.0], "1+2": [[0.0] * 4, [0.5] * 4]})
    with jax.set_mesh(mesh_of()):
        after = rebalanced(before, LOADS, SPARSE)
    lone, stacked = (after["layers"][name]["mlp"]["bias"][...] for name in ("0", "1+2"))
    np.testing.assert_array_equal(lone, [-0.25, 0.25, 0.0, 1.0])
    np.testing.assert_array_equal(stacked, [[-0.25, 0.25, 0.25, 0.25], [0.5] * 4])


def test_without_biases_nothing_is_moved():
    assert jax.tree.leaves(rebalanced(nnx.State({}), LOADS, SPARSE)) == []


def test_health_is_of_the_worst_layer_and_of_all_layers_choices():
    told = health(LOADS)
    assert float(told["load_max_over_mean"]) == 4.0
    np.testing.assert_allclose(told["expert_load"], np.array([16, 3, 5, 5]) / 29, rtol=1e-6)
    nothing = health({"0": jnp.zeros((1, 4), jnp.int32)})
    assert float(nothing["load_max_over_mean"]) == 0 and not np.any(nothing["expert_load"])
