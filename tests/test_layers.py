"""Layers of every kind: the reference's numbers, the same on every mesh and however their order is spelled."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax import Array

from llm_jax.batch import documents, place
from llm_jax.data.config import PAD_ID
from llm_jax.model import layers, norms, transformer
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.model.moe import Routing
from llm_jax.model.paths import from_tree, to_tree
from llm_jax.model.transformer import Transformer, abstract_model, logits
from llm_jax.objective import causal, loss
from llm_jax.objective.config import CausalConfig
from llm_jax.train.step import gradient_sums
from tests.reference import Reference
from tests.small import CFG, deviation, mesh_of, put, put_weights, ragged_rows, slowly, weights_of

ROWS = ragged_rows(0)
SHARDED = {"context": 2, "fsdp": 2, "tensor": 2}
LOCAL, PLAIN = LayerConfig(window=5, rope_theta=100.0), LayerConfig()


def kind(**fields: Any) -> ModelConfig:
    return CFG.model_copy(update=fields)


BERT = kind(
    norm_place="post",
    norm="layernorm",
    norm_bias=True,
    bias="all",
    mlp="gelu",
    qk_norm=False,
    attention_soft_cap=3.0,
    learned_positions=24,
    token_types=2,
    embedding_norm=True,
    head_transform=True,
    output_bias=True,
    tied_embeddings=True,
)
GEMMA = kind(
    n_layers=3,
    leading=(LayerConfig(block=6),),
    period=(LOCAL, PLAIN),
    global_tokens=2,
    norm_place="sandwich",
    qk_norm_over="all",
    attention_sinks=True,
    attention_soft_cap=3.0,
    mlp="geglu",
)
# A leading layer, two periods, a remainder.
MODERN_BERT = kind(
    n_layers=6,
    leading=(LayerConfig(attention_norm=False),),
    period=(PLAIN, LOCAL),
    norm="layernorm",
    embedding_norm=True,
    bias="qkv",
    mlp="gelu_tanh",
    attention="xla",
    head_transform=True,
)
KINDS = {
    "BERT": BERT,
    "Gemma": GEMMA,
    "ModernBERT": MODERN_BERT,
    "post, rmsnorm": kind(n_layers=1, norm_place="post", norm_bias=True),
    "sandwich, layernorm": kind(n_layers=1, norm_place="sandwich", norm="layernorm", norm_bias=True, bias="all"),
}


def logits_of(cfg: ModelConfig, params: nnx.State, is_causal: bool) -> np.ndarray:
    def forward(params: nnx.State, rows_BU: Array) -> Array:
        arrays = (rows_BU, *documents(rows_BU))
        tokens_BT, segments_BT, positions_BT = (place(x[None, :, :-1])[0] for x in arrays)
        model = nnx.merge(abstract_model(cfg).graph, params, {})
        return logits(model, model(tokens_BT, segments_BT, positions_BT, cfg, causal=is_causal)[0], cfg)

    mesh = mesh_of()
    with jax.set_mesh(mesh):
        placed = put_weights(params, cfg, mesh), put(ROWS, "BU", mesh)
        return np.asarray(jax.jit(forward)(*placed))[..., : cfg.vocab_size]


def difference(cfg: ModelConfig, *, is_causal: bool) -> float:
    """The largest difference of logits of the order of one from the reference's."""
    params = weights_of(cfg)
    expected = np.stack([Reference(cfg, params)(row[:-1], is_causal) for row in ROWS])
    return float(np.max(np.abs(logits_of(cfg, params, is_causal) - expected)))


@pytest.mark.parametrize(
    "name", ["BERT", "Gemma", "ModernBERT", slowly("post, rmsnorm"), slowly("sandwich, layernorm")]
)
def test_logits_are_the_references(name):
    assert difference(KINDS[name], is_causal="BERT" not in name) < 1e-5


def final_norm_of_pre(monkeypatch):
    """The sandwich without its second norm."""
    monkeypatch.setattr(layers, "_added", lambda x, y, norm, cfg: x + y)


def norm_of_each_head(monkeypatch):
    real = norms.inverse_rms
    monkeypatch.setattr(norms, "inverse_rms", lambda x, eps, axes=(-1,): real(x, eps, axes[-1:]))


def one_theta_for_all(monkeypatch):
    real = transformer.angles
    monkeypatch.setattr(transformer, "angles", lambda positions, theta, cfg: real(positions, cfg.rope_theta, cfg))


@pytest.mark.parametrize("plant", [slowly(final_norm_of_pre), slowly(norm_of_each_head), one_theta_for_all])
def test_planted_defect_is_seen(plant, monkeypatch):
    plant(monkeypatch)
    assert difference(GEMMA, is_causal=True) > 1e-3


# Meshes.


def gradient_and_loss(cfg: ModelConfig, mesh_sizes: dict[str, int]) -> tuple[nnx.State, float]:
    mesh = mesh_of(**mesh_sizes)

    def gradient(params: nnx.State, rows_ABU: Array) -> tuple[nnx.State, Array]:
        batch_A = causal.make_batch(rows_ABU, False)
        weights = loss.weights(batch_A, cfg)
        gradient, sums, _ = gradient_sums(params, nnx.State({}), batch_A, weights, cfg, CausalConfig())
        return gradient, sums["loss"] / weights["loss"]

    with jax.set_mesh(mesh):
        arguments = put_weights(weights_of(cfg), cfg, mesh), put(ROWS[None], "ABU", mesh)
        result, value = jax.jit(gradient)(*arguments)
        assert jax.tree.map(jax.typeof, result) == jax.tree.map(jax.typeof, arguments[0])
        return jax.device_get(result), float(value)


@pytest.mark.parametrize("name", ["BERT", slowly("Gemma")])
def test_mesh_and_remat_change_no_loss_and_no_gradient(name):
    gradient, value = gradient_and_loss(KINDS[name].model_copy(update={"remat": "full"}), SHARDED)
    expected, expected_value = gradient_and_loss(KINDS[name], {})
    assert abs(value - expected_value) <= 1e-5
    assert deviation(gradient, expected) <= 1e-5
    # Every weight takes part; keys' biases because of the cap, since without it they move no share.
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(expected))


# The order of layers and its spellings.

SPELLINGS = {
    "all alike": (kind(n_layers=6), kind(n_layers=6, leading=(PLAIN,), period=(PLAIN, PLAIN))),
    "one by one": (GEMMA, GEMMA.model_copy(update={"leading": tuple(GEMMA.layers[:-1]), "period": (PLAIN,)})),
}


def start(cfg: ModelConfig) -> dict[str, Any]:
    """Initial weights as a checkpoint names them; of a layer the first that is drawn and the last."""

    def init(key: Array) -> dict[str, Any]:
        tree = to_tree(nnx.split(Transformer(cfg, nnx.Rngs(params=key)))[1])
        layers = {i: (layer["attention"]["q"], layer["mlp"]["down"]) for i, layer in tree["layers"].items()}
        return {"layers": layers, "unembed": tree["unembed"]}

    with jax.set_mesh(mesh_of()):
        return jax.device_get(jax.jit(init)(jax.random.key(0)))


BOTH = pytest.mark.parametrize("name", [slowly("all alike"), "one by one"])


@BOTH
def test_the_same_layers_start_alike_however_they_are_spelled(name):
    one, other = (start(cfg) for cfg in SPELLINGS[name])
    assert sorted(one["layers"]) == [str(i) for i in range(SPELLINGS[name][0].n_layers)]
    assert jax.tree.structure(one) == jax.tree.structure(other)
    # Two programs: the last bit may differ.
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@BOTH
def test_a_checkpoint_of_one_spelling_is_the_same_model_in_another(name):
    one, other = SPELLINGS[name]
    params = weights_of(one)
    with jax.set_mesh(mesh_of()):
        wanted = abstract_model(other).params
        assert jax.tree.structure(jax.eval_shape(to_tree, wanted)) == jax.tree.structure(to_tree(params))
        moved = jax.device_get(from_tree(to_tree(params), wanted))
    np.testing.assert_allclose(logits_of(other, moved, True), logits_of(one, params, True), atol=2e-6)


def routing_of(cfg: ModelConfig, params: nnx.State) -> dict[str, Routing]:
    def forward(params: nnx.State, rows_BT: Array) -> dict[str, Routing]:
        model = nnx.merge(abstract_model(cfg).graph, params, nnx.State({}))
        return model(rows_BT, *documents(rows_BT), cfg)[1]

    mesh = mesh_of()
    with jax.set_mesh(mesh):
        placed = put_weights(params, cfg, mesh), put(ROWS, "BT", mesh)
        return jax.device_get(jax.jit(forward)(*placed))


def test_routing_comes_by_place_and_its_scalars_are_sums_over_layers():
    experts = LayerConfig(moe=True)
    moe = MoeConfig(experts=4, d_ff=8, exchange="all_gather", grouped_matmul="blocked")
    one = kind(n_layers=4, period=(PLAIN, experts), moe=moe)
    other = one.model_copy(update={"leading": tuple(one.layers[:-1]), "period": (experts,)})
    params = weights_of(one)
    with jax.set_mesh(mesh_of()):
        moved = jax.device_get(from_tree(to_tree(params), abstract_model(other).params))
    stacked, alone = routing_of(one, params), routing_of(other, moved)
    for routing, places in ((stacked, {"1+2": 2}), (alone, {"1": 1, "3+1": 1})):
        assert {name: (x.load_LE.shape, x.experts_LBTX.shape) for name, x in routing.items()} == {
            name: ((n, 4), (n, *ROWS.shape, 2)) for name, n in places.items()
        }
    np.testing.assert_array_equal(stacked["1+2"].load_LE, np.concatenate([alone["1"].load_LE, alone["3+1"].load_LE]))
    np.testing.assert_array_equal(np.sum(stacked["1+2"].load_LE, axis=1), 2 * np.sum(ROWS != PAD_ID))
    for field in ("load_balance", "router_z", "entropy", "dropped"):
        of_place, *of_layers = (getattr(x, field) for x in (stacked["1+2"], alone["1"], alone["3+1"]))
        np.testing.assert_allclose(of_place, sum(of_layers), rtol=1e-5)
        assert of_place.shape == ()


def test_places_name_every_layer_once():
    with jax.set_mesh(mesh_of()):
        params = abstract_model(MODERN_BERT).params
    assert set(params["layers"]) == {"0", "1+2", "2+2", "5"}
    assert params["layers"]["2+2"]["attention"]["q"].shape == (2, 16, 8, 4)
    assert params["layers"]["5"]["attention"]["q"].shape == (16, 8, 4)


def test_the_model_has_as_many_parameters_as_its_config_says():
    """BERT-base's published number: 110 million, to the last one without its pooler and next-sentence head."""
    cfg = BERT.model_copy(
        update={"d_model": 768, "d_ff": 3072, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "d_head": 64}
        | {"vocab_size": 30592, "learned_positions": 512}
    )
    with jax.set_mesh(mesh_of()):
        params = abstract_model(cfg).params
    embeddings = (30592 + 512 + 2) * 768 + 2 * 768
    layer = 4 * (768 * 768 + 768) + 2 * 768 + 768 * 3072 + 3072 + 3072 * 768 + 768 + 2 * 768
    head = 768 * 768 + 768 + 2 * 768 + 30592
    assert sum(x.size for x in jax.tree.leaves(params)) == embeddings + 12 * layer + head
