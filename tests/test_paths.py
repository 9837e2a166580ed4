"""A state becomes named arrays and comes back bit for bit, sharded as it was, on every mesh."""

import jax
import numpy as np
import pytest
from flax import nnx

from llm_jax.model import paths
from llm_jax.model.paths import from_tree, placed, to_tree
from llm_jax.model.transformer import abstract_model
from llm_jax.optim.config import AdamWConfig
from llm_jax.train.state import TrainState, abstract_state, with_weights
from tests.small import CFG, mesh_of, put_weights, weights_of

DEEP = CFG.model_copy(update={"n_layers": 11})
OPTIM = AdamWConfig()
MESHES = ({}, {"fsdp": 8}, {"tensor": 4, "fsdp": 2}, {"context": 2, "data": 2, "expert": 2})


def state_on(mesh: jax.sharding.Mesh) -> TrainState:
    """A state in which no two numbers are alike."""
    rng = np.random.default_rng(0)
    params = put_weights(weights_of(DEEP), DEEP, mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda params: with_weights(params, nnx.State({}), OPTIM))(params)

    def filled(x: jax.Array) -> jax.Array:
        values = rng.integers(1, 1000, x.shape) if x.dtype == np.int32 else rng.normal(size=x.shape)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree.map(filled, state)


def difference(mesh: jax.sharding.Mesh) -> list[str]:
    """What is not as it was after the way there and back: values bit for bit, types, places."""
    state = state_on(mesh)
    with jax.set_mesh(mesh):
        like = abstract_state(DEEP, OPTIM)
        back = jax.jit(lambda tree: from_tree(tree, like))(jax.jit(to_tree)(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    changed = []
    for (path, old), new in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(back), strict=True):
        same = np.asarray(old).tobytes() == np.asarray(new).tobytes() and old.dtype == new.dtype
        if not same or not old.sharding.is_equivalent_to(new.sharding, old.ndim):
            changed.append(jax.tree_util.keystr(path))
    return changed


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_there_and_back_is_bit_for_bit(mesh):
    assert difference(mesh_of(**mesh)) == []


def test_planted_order_of_layers_by_name_is_seen(monkeypatch):
    """Eleven layers, so that "10" comes before "2"."""
    real = paths._get

    def by_name(tree, keys):
        names = sorted(map(str, range(DEEP.n_layers)))
        return real(tree, [names[int(key)] if key.isdigit() and "layers" in keys else key for key in keys])

    monkeypatch.setattr(paths, "_get", by_name)
    assert difference(mesh_of()) != []


def test_what_is_promised_to_a_checkpoint_is_what_it_gets():
    """The abstract tree, which a restore asks for, has the shapes, types and places of the real one."""
    mesh = mesh_of(tensor=4, fsdp=2)
    with jax.set_mesh(mesh):
        tree = jax.jit(to_tree)(state_on(mesh))
        promised = placed(jax.eval_shape(to_tree, abstract_state(DEEP, OPTIM)), mesh)
    assert jax.tree.structure(tree) == jax.tree.structure(promised)
    for (path, got), wanted in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(promised), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim), jax.tree_util.keystr(path)


def test_names_are_the_models_and_tell_a_layers_number():
    with jax.set_mesh(mesh_of()):
        tree = jax.eval_shape(to_tree, abstract_state(DEEP, OPTIM))
        params = jax.eval_shape(to_tree, abstract_model(DEEP)[1])
    assert sorted(tree) == ["batch_index", "opt_state", "params", "recent", "rollbacks", "skipped", "step"]
    assert sorted(tree["params"]) == ["embed", "layers", "norm", "unembed"]
    assert sorted(tree["params"]["layers"], key=int) == [str(i) for i in range(11)]
    layer = tree["params"]["layers"]["10"]
    assert sorted(layer) == ["attention", "attention_norm", "mlp", "mlp_norm"]
    assert layer["mlp"]["down"].shape == (DEEP.d_ff, DEEP.d_model)
    assert jax.tree.structure(tree["params"]) == jax.tree.structure(params)
    for name in ("mu", "nu"):
        assert jax.tree.structure(tree["opt_state"]["0"][name]) == jax.tree.structure(params)
