"""The FLOPs formula is the arithmetic of the real step, counted in its jaxpr."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from llm_jax.mesh import make_mesh
from llm_jax.model.config import ModelConfig
from llm_jax.model.paths import placed
from llm_jax.model.transformer import abstract_model
from llm_jax.objective.config import CausalConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import mesh_sizes
from llm_jax.train import flops
from llm_jax.train.config import MeshConfig
from llm_jax.train.state import abstract_state
from llm_jax.train.step import make_step
from tests.small import SETTINGS

ROWS, SEQ_LEN = 2, 16
BASE = ModelConfig(
    d_model=24, d_ff=40, n_layers=3, n_heads=4, n_kv_heads=4, d_head=6, vocab_size=200, attention="xla", remat="none"
)
MODELS = {
    "swiglu": BASE,
    "grouped queries": BASE.model_copy(update={"n_kv_heads": 2}),
    "one key head": BASE.model_copy(update={"n_kv_heads": 1, "d_head": 8}),
    "gelu": BASE.model_copy(update={"mlp": "gelu"}),
    "tied": BASE.model_copy(update={"tied_embeddings": True}),
    "query and key norms, soft cap": BASE.model_copy(update={"qk_norm": True, "logit_soft_cap": 30.0}),
}


def jaxprs(value: Any) -> Iterator[Jaxpr]:
    """Every jaxpr in an equation's parameter: closed ones, and those in tuples, too."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from jaxprs(item)


def shape_of(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def dot_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of all products of matrices in a jaxpr on one device, the bodies of scans as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted, batch = equation.params["dimension_numbers"]
            shapes = [shape_of(operand) for operand in equation.invars]
            # A vector times a matrix is a weighted sum, of statistics: neither weights nor attention.
            if all(len(shapes[i]) > len(contracted[i]) + len(batch[i]) for i in (0, 1)):
                terms = math.prod(shapes[0][axis] for axis in contracted[0])
                total += 2 * math.prod(shape_of(equation.outvars[0])) * terms
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        assert equation.primitive.name not in ("while", "cond"), "their bodies run an unknown number of times"
        total += times * sum(dot_flops(inner) for value in equation.params.values() for inner in jaxprs(value))
    return total


def step_flops(cfg: ModelConfig, rows: int = ROWS, accumulation: int = 1) -> int:
    """The step's FLOPs, from the jaxpr of the function that the loop jits."""
    optim, mesh = AdamWConfig(), make_mesh(mesh_sizes(MeshConfig(data=1), 1))
    rows_ABU = jax.ShapeDtypeStruct((accumulation, rows // accumulation, SEQ_LEN + 1), jnp.int32)
    with jax.set_mesh(mesh):
        step = make_step(cfg, CausalConfig(), optim, **SETTINGS, steps=10)
        return dot_flops(jax.make_jaxpr(step)(placed(abstract_state(cfg, optim), mesh), placed(rows_ABU, mesh)).jaxpr)


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_is_the_steps_own_arithmetic(name: str) -> None:
    cfg = MODELS[name]
    assert step_flops(cfg) == ROWS * SEQ_LEN * flops.flops_per_token(cfg, SEQ_LEN, causal=True).full


def test_the_formula_holds_for_accumulated_steps() -> None:
    assert step_flops(BASE, rows=4, accumulation=2) == 4 * SEQ_LEN * flops.flops_per_token(BASE, SEQ_LEN, True).full


def test_recomputation_is_seen_by_the_count_and_not_by_the_formula() -> None:
    recomputing = BASE.model_copy(update={"remat": "full"})
    assert flops.flops_per_token(recomputing, SEQ_LEN, True) == flops.flops_per_token(BASE, SEQ_LEN, True)
    assert step_flops(recomputing) > step_flops(BASE)


def test_a_causal_mask_halves_the_stricter_conventions_attention_only() -> None:
    causal, both_ways = (flops.flops_per_token(BASE, SEQ_LEN, causal=causal) for causal in (True, False))
    assert causal.full == both_ways.full == both_ways.visible
    assert causal.full - causal.visible == causal.attention / 2


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    with jax.set_mesh(make_mesh(mesh_sizes(MeshConfig(data=1), 1))):
        params = abstract_model(MODELS[name]).params
    assert flops.parameters(MODELS[name]) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_share_of_the_peak_counts_every_device() -> None:
    per_token = flops.flops_per_token(BASE, SEQ_LEN, causal=True)
    peak = flops.peak_flops("TPU v4", "bfloat16")
    assert peak == 275e12
    at_peak = 8 * 275e12 / per_token.full
    assert flops.mfu(at_peak, per_token, peak, n_devices=8) == pytest.approx(1)
    assert flops.mfu(at_peak / 4, per_token, peak, n_devices=8) == pytest.approx(0.25)


def test_without_a_known_peak_there_is_no_share() -> None:
    assert flops.peak_flops("cpu", "float32") is None
    assert flops.mfu(1e6, flops.flops_per_token(BASE, SEQ_LEN, True), None, 1) is None


def test_float32_runs_in_tf32_on_gpus_and_in_bfloat16_on_tpus() -> None:
    assert flops.peak_flops("NVIDIA H200", "float32") == 989e12 / 2
    assert flops.peak_flops("TPU v5p", "float32") == flops.peak_flops("TPU v5", "bfloat16") == 459e12
