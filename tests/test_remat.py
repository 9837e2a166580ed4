"""Rematerialisation changes no number and saves what its name says; and the types in which sums are made."""

import collections
import contextlib
import functools
import io
import re
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.ad_checkpoint import print_saved_residuals

from llm_jax.mesh import acts
from llm_jax.model import layers, mlp
from llm_jax.model.config import LayerConfig, ModelConfig, TensorName
from llm_jax.model.layers import Block, Rows, rematerialised
from llm_jax.model.rope import angles
from llm_jax.model.sight import Places
from llm_jax.model.transformer import abstract_model
from llm_jax.model.weights import project
from llm_jax.objective import causal, loss
from llm_jax.objective.config import CausalConfig
from llm_jax.train.step import gradient_sums
from tests.small import CFG, B, U, deviation, mesh_of, put, put_weights, ragged_rows, slowly, weights_of

NAMES = get_args(TensorName)
POLICIES = ("elementwise", "dots", "full", ("q", "k", "v", "attention_out"), ("mlp_gate", "mlp_up"))
SHARDED = {"context": 2, "fsdp": 2, "tensor": 2}


def with_policy(remat: Any, **fields: Any) -> ModelConfig:
    return CFG.model_copy(update={"remat": remat, **fields})


def gradient_function(cfg: ModelConfig):
    def gradient(params: nnx.State, rows_ABU: Array) -> tuple[nnx.State, Array]:
        batch_A = causal.make_batch(rows_ABU, False)
        weights = loss.weights(batch_A, cfg)
        gradient, sums, _ = gradient_sums(params, nnx.State({}), batch_A, weights, cfg, CausalConfig())
        return gradient, sums["loss"] / weights["loss"]

    return gradient


def gradient_and_loss(cfg: ModelConfig, mesh: dict[str, int]) -> tuple[nnx.State, float]:
    devices = mesh_of(**mesh)
    with jax.set_mesh(devices):
        arguments = put_weights(weights_of(CFG), cfg, devices), put(ragged_rows(0)[None], "ABU", devices)
        gradient, loss = jax.jit(gradient_function(cfg))(*arguments)
        return jax.device_get(gradient), float(loss)


@pytest.fixture(scope="module")
def kept() -> tuple[nnx.State, float]:
    """The gradient and the loss with nothing recomputed, on one device."""
    return gradient_and_loss(with_policy("none"), {})


# That each policy saves and computes again what it says is looked up below, for all of them.
@pytest.mark.parametrize(
    "remat", [remat if remat in ("elementwise", "full") else slowly(remat) for remat in POLICIES], ids=str
)
def test_every_policy_gives_the_same_loss_and_gradient(remat, kept):
    gradient, loss = gradient_and_loss(with_policy(remat), {})
    assert abs(loss - kept[1]) <= 1e-6
    assert deviation(gradient, kept[0]) <= 1e-6


# What one layer keeps for the backward pass.


def saved(remat: Any, mesh: dict[str, int]) -> list[str]:
    """What JAX says that a layer saves, a line each, without its arguments and constants."""
    cfg = with_policy(remat)
    devices = mesh_of(**mesh)
    with jax.set_mesh(devices), contextlib.redirect_stdout(io.StringIO()) as told:
        key = jax.eval_shape(lambda: jax.random.key(0))
        graph, params = jax.eval_shape(lambda key: nnx.split(Block(cfg, LayerConfig(), nnx.Rngs(params=key))), key)
        sharding = jax.NamedSharding(devices, acts("BTD"))
        x_BTD = jax.ShapeDtypeStruct((B, U - 1, cfg.d_model), jnp.float32, sharding=sharding)
        zeros_BT, zeros_BS = (put(np.zeros((B, U - 1), np.int32), letters, devices) for letters in ("BT", "BS"))
        rows = Rows(Places(zeros_BT, zeros_BT), Places(zeros_BS, zeros_BS), zeros_BT == 0)

        def layer(x_BTD: Array, params: nnx.State) -> Array:
            by = angles(zeros_BT, cfg.rope_theta, cfg)
            return nnx.merge(graph, params)(x_BTD, rows, by, cfg, LayerConfig(), causal=True)[0]

        print_saved_residuals(rematerialised(layer, cfg, in_scan=True), x_BTD, params)
    return [line for line in told.getvalue().splitlines() if "from the argument" not in line and "constant" not in line]


MESHES = pytest.mark.parametrize("mesh", [{}, SHARDED], ids=["one device", "sharded"])


@MESHES
def test_full_saves_nothing_but_the_layers_input(mesh):
    assert saved("full", mesh) == []


@MESHES
def test_dots_saves_the_matrix_products_that_the_backward_pass_needs_and_no_scores(mesh):
    # The MLP's last product only enters a sum.
    products = [line for line in saved("dots", mesh) if "dot_general" in line]
    assert len(products) == 6
    assert not [line for line in saved("dots", mesh) if "exp" in line or "softmax" in line or "attention.py" in line]


@MESHES
@pytest.mark.parametrize("name", NAMES)
def test_a_name_saves_its_tensor_and_nothing_else(name, mesh):
    assert [re.findall(r"named '(\w+)'", line) for line in saved((name,), mesh)] == [[name]]


def test_none_saves_scores_and_gathered_weights_too():
    lines = saved("none", SHARDED)
    assert len(lines) > 30
    assert len([line for line in lines if "reshard" in line and "weights.py" in line]) == 7


# What the backward pass computes again.


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@functools.cache
def program(json: str) -> list[Any]:
    """The equations of the gradient on an fsdp mesh, for a config as JSON."""
    cfg = ModelConfig.model_validate_json(json)
    devices = mesh_of(fsdp=8)
    with jax.set_mesh(devices):
        arguments = abstract_model(cfg)[1], put(ragged_rows(0)[None], "ABU", devices)
        return list(equations(jax.make_jaxpr(gradient_function(cfg))(*arguments).jaxpr))


def counts(cfg: ModelConfig) -> collections.Counter:
    """How often each primitive stands in the gradient's program."""
    return collections.Counter(equation.primitive.name for equation in program(cfg.model_dump_json()))


def test_the_backward_pass_computes_again_what_was_not_saved():
    products = {
        str(remat): counts(with_policy(remat))["dot_general"]
        for remat in ("none", "elementwise", "dots", "full", ("mlp_up",))
    }
    # elementwise: attention's two, which XLA drops, since nothing reads them; dots: the same two, which it needs; full:
    # those, and all projections but the MLP's last.
    extra = {name: number - products["none"] for name, number in products.items()}
    assert extra == {"none": 0, "elementwise": 2, "dots": 2, "full": 8, "('mlp_up',)": 7}


@pytest.mark.parametrize(("n_layers", "in_loop"), [(5, 2), slowly(3, 0)])
def test_layers_outside_of_the_scan_are_computed_again_too_behind_a_barrier(n_layers, in_loop):
    """One lone layer and two in a period: XLA would find out of a scan, or in one of a single turn, that both passes
    compute the same."""
    cfg = with_policy("full", n_layers=n_layers, leading=(LayerConfig(),), period=(LayerConfig(),) * 2)
    extra = counts(cfg)["dot_general"] - counts(cfg.model_copy(update={"remat": "none"}))["dot_general"]
    assert extra == 3 * 8
    equations = program(cfg.model_dump_json())
    barriers = [equation.params["prevent_cse"] for equation in equations if "prevent_cse" in equation.params]
    assert barriers.count(False) == in_loop and barriers.count(True) == 3 - in_loop


def test_weights_are_gathered_again_in_the_backward_pass_unless_all_is_saved():
    gathers = {remat: counts(with_policy(remat))["reshard"] for remat in ("none", "dots", "full")}
    assert gathers["dots"] == gathers["full"] >= gathers["none"] + 6


# Types.


def test_bfloat16_runs_on_a_mesh_and_stays_close(kept):
    cfg = with_policy("none", compute_dtype="bfloat16")
    gradient, loss = gradient_and_loss(cfg, SHARDED)
    assert abs(loss - kept[1]) < 0.02
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {np.dtype(np.float32)}
    assert 1e-4 < deviation(gradient, kept[0]) < 0.1


def fsdp_types(cfg: ModelConfig) -> tuple[set[str], set[str]]:
    """Types in which the layers' matrices are gathered over fsdp, and in which their gradients are added up over it."""
    gathered, reduced = set(), set()
    for equation in program(cfg.model_dump_json()):
        shapes = [jax.typeof(x) if isinstance(x, jax.Array) else x.aval for x in equation.invars]
        if equation.primitive.name == "reshard" and shapes[0].ndim > 1 and cfg.vocab_size not in shapes[0].shape:
            before, after = shapes[0].sharding.spec, equation.outvars[0].aval.sharding.spec
            if "fsdp" in before and "fsdp" not in after:
                gathered.add(shapes[0].dtype.name)
        if equation.primitive.name == "reduce_scatter" and cfg.padded_vocab_size not in shapes[0].shape:
            reduced.add(shapes[0].dtype.name)
    return gathered, reduced


# The embedding is looked up, and its gradient added up, in float32 always; here it would hide the layers' types.
WIDE = {"vocab_size": 256, "compute_dtype": "bfloat16"}


def test_weights_are_gathered_and_gradients_added_up_in_the_type_that_is_asked_for():
    assert fsdp_types(with_policy("none", **WIDE)) == ({"bfloat16"}, {"bfloat16"})
    for remat in ("none", "dots", "full"):
        assert fsdp_types(with_policy(remat, gather_dtype="float32", **WIDE)) == ({"float32"}, {"float32"})


def test_planted_cast_before_the_product_adds_up_in_bfloat16(monkeypatch):
    def cast_first(equation, x, weight, out_sharding=None):
        return project(equation, x, weight.astype(x.dtype), out_sharding)

    for module in (layers, mlp):
        monkeypatch.setattr(module, "project", cast_first)
    program.cache_clear()
    assert fsdp_types(with_policy("none", gather_dtype="float32", **WIDE)) == ({"bfloat16"}, {"bfloat16"})
    program.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, SHARDED], ids=str)
def test_adding_up_in_float32_is_the_same_gradient(mesh, kept):
    cfg = with_policy("none", compute_dtype="bfloat16", gather_dtype="float32")
    gradient, loss = gradient_and_loss(cfg, mesh)
    assert abs(loss - kept[1]) < 0.02
    assert 1e-4 < deviation(gradient, kept[0]) < 0.1
