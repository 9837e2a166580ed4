"""Every config that ships: it builds, its size is the published one, and its step lowers at the mesh it is meant for.

Devices are abstract here: shapes and shardings of hundreds of billions of weights, and not a byte of them.
"""

import ast
import gc
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from llm_jax.alphabet import MESH_AXES
from llm_jax.config import ConfigError, from_json, load, to_json
from llm_jax.mesh import acts
from llm_jax.model.backends import resolve
from llm_jax.model.transformer import abstract_model
from llm_jax.run import Run, check, check_mesh, mesh_sizes
from llm_jax.train import flops
from llm_jax.train.state import abstract_state
from llm_jax.train.step import make_step

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.py"))}

# The parameters of the weights that the models' authors published.
PUBLISHED = {
    "bert_base": 109_514_298,
    "gpt2_124m": 124_439_808,
    "llama3_70b": 70_553_706_496,
    "llama3_8b": 8_030_261_248,
    "mixtral_8x7b": 46_702_792_704,
    "modernbert_base": 149_655_232,
    "olmoe_1b_7b": 6_919_161_856,
}
# The devices that a docstring says its config is for; the others are for one, and then for what there is.
DEVICES = {
    "bert_base": 8,
    "deepseek_v3_experts": 1024,
    "gpt2_124m": 8,
    "llama3_70b": 128,
    "llama3_8b": 128,
    "mixtral_8x7b": 64,
    "modernbert_base": 8,
    "olmoe_1b_7b": 256,
}
# One of each kind, experts divided two ways, masked; the others take seconds more and are slow.
QUICKLY_LOWERED = {"olmoe_1b_7b", "bert_base"}


def run_of(name: str) -> Run:
    return load(CONFIGS[name], Run)


def mesh_of(name: str) -> AbstractMesh:
    """The stated mesh, of devices that nobody has."""
    sizes = mesh_sizes(run_of(name).mesh, DEVICES.get(name, 1))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def docstring_of(name: str) -> str:
    return " ".join((ast.get_docstring(ast.parse(CONFIGS[name].read_text())) or "").split())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_builds_and_its_json_gives_it_back(name: str) -> None:
    run = run_of(name)
    check(run)
    assert from_json(Run, to_json(run)) == run
    assert (run.name, run.run_dir) == (name, f"runs/{name}")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_docstring_tells_the_command(name: str) -> None:
    lines = (ast.get_docstring(ast.parse(CONFIGS[name].read_text())) or "").splitlines()
    assert [line for line in lines if re.match(rf"    llm-jax train configs/{name}\.py( |$)", line)]


@pytest.mark.parametrize("name", DEVICES)
def test_the_docstrings_figures_are_the_configs(name: str) -> None:
    model, told = run_of(name).model, docstring_of(name)
    assert f"{flops.parameters(model, padded=False):,} parameters" in told
    assert ("needs no padding" in told) == (model.padded_vocab_size == model.vocab_size)
    if model.padded_vocab_size != model.vocab_size:
        assert f"{flops.parameters(model):,}" in told
    if model.moe is not None:
        assert f"{flops.active_parameters(model, padded=False):,} of them for each token" in told
    assert f"{DEVICES[name]} devices" in told
    assert f"ln({model.vocab_size}) = {math.log(model.vocab_size):.1f}" in told


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_size_is_the_published_one(name: str) -> None:
    assert flops.parameters(run_of(name).model, padded=False) == PUBLISHED[name]


def test_deepseeks_experts_are_the_published_ones_and_the_rest_is_not() -> None:
    model = run_of("deepseek_v3_experts").model
    assert model.moe is not None
    experts = model.n_moe_layers * model.moe.experts * 3 * model.d_model * model.moe.d_ff
    assert f"{experts:,} ({experts / 671e9:.0%})" in docstring_of("deepseek_v3_experts")
    assert 671e9 < flops.parameters(model) < 1.01 * 671e9


@pytest.mark.parametrize("name", CONFIGS)
def test_the_count_is_the_models_own(name: str) -> None:
    model = run_of(name).model
    with jax.sharding.use_abstract_mesh(mesh_of(name)):
        params = abstract_model(model).params
    assert flops.parameters(model) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_holds_enough_of_every_weights_minor_dimension(name: str) -> None:
    """128 numbers are a TPU's lane; below that XLA gathers a sharded weight by adding up all of it.

    Routers are the exception: as long as there are experts, and too small for it to matter.
    """
    mesh = mesh_of(name)
    with jax.sharding.use_abstract_mesh(mesh):
        params = abstract_model(run_of(name).model).params
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        minor = leaf.sharding.shard_shape(leaf.shape)[-1]
        if "router" not in jax.tree_util.keystr(path):
            assert minor == leaf.shape[-1] or minor >= 128, (path, leaf.shape, minor)


@pytest.mark.parametrize(
    "name", [name if name in QUICKLY_LOWERED else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_the_step_lowers_at_the_stated_mesh(name: str) -> None:
    gc.collect()  # what earlier tests have left may go at any time
    alive = len(jax.live_arrays())
    text = lowered(run_of(name), mesh_of(name)).as_text()
    assert len(jax.live_arrays()) <= alive
    assert f"num_partitions = {math.prod(mesh_of(name).axis_sizes)} : i32" in text
    assert "sdy.sharding" in text or math.prod(mesh_of(name).axis_sizes) == 1


def test_a_mesh_that_does_not_divide_the_rows_is_no_mesh_to_lower_at() -> None:
    run = run_of("olmoe_1b_7b")
    with pytest.raises(ConfigError, match=r"train.batch_rows / train.accumulation = 1024 is not divisible by"):
        lowered(run, AbstractMesh((3, 8, 1, 1, 8), MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES)))


def lowered(run: Run, mesh: AbstractMesh) -> Any:
    """The run's step for TPUs, as StableHLO before XLA has seen it."""
    check_mesh(run, dict(mesh.shape))
    cfg, A = resolve(run.model, "tpu", mesh.shape["expert"]), run.train.accumulation
    shape = (A, run.train.batch_rows // A, run.data.seq_len + 1)
    step = make_step(
        cfg,
        run.objective,
        run.optim,
        steps=run.train.steps,
        cross_documents=run.data.cross_documents,
        seed=run.seed,
        word_starts_V=np.zeros((cfg.vocab_size, 2), bool),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        rows_ABU = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, acts("ABU")))
        # What has no place of its own, the optimizer's count, is on every device of the mesh.
        everywhere = jax.NamedSharding(mesh, jax.P())
        state = jax.tree.map(lambda x: x.update(sharding=x.sharding or everywhere), abstract_state(cfg, run.optim))
        traced = jax.jit(step, donate_argnums=0).trace(state, rows_ABU)
        return traced.lower(lowering_platforms=("tpu",))
