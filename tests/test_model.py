"""The decoder against one written in NumPy float64, and the properties that its parts are named for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from llm_jax.batch import documents, place
from llm_jax.config import ConfigError
from llm_jax.model import layers, norms, transformer, weights
from llm_jax.model.config import LayerConfig, Llama3Scaling, ModelConfig, YarnScaling
from llm_jax.model.norms import Norm, inverse_rms
from llm_jax.model.rope import angles, rotate
from llm_jax.model.transformer import Transformer, abstract_model, logits, look_up
from tests.reference import Reference
from tests.small import AS_SHIPPED, CFG, B, mesh_of, put, put_weights, ragged_rows, slowly, weights_of

ROWS = ragged_rows(0)
OTHER = CFG.model_copy(update={"mlp": "gelu", "qk_norm": False, "tied_embeddings": True, "logit_soft_cap": None})
SHARDED = {"context": 2, "fsdp": 2, "tensor": 2}


def logits_of(cfg: ModelConfig, params: nnx.State, rows: np.ndarray, mesh: dict[str, int]) -> np.ndarray:
    """Logits [B, T, V] of the inputs of the rows, by the real model on a mesh."""
    devices = mesh_of(**mesh)

    def forward(params: nnx.State, rows_BU: Array) -> Array:
        arrays = (rows_BU, *documents(rows_BU))
        tokens_BT, segments_BT, positions_BT = (place(x[None, :, :-1])[0] for x in arrays)
        model = nnx.merge(abstract_model(cfg)[0], params, {})
        return logits(model, model(tokens_BT, segments_BT, positions_BT, cfg)[0], cfg)

    with jax.set_mesh(devices):
        placed = put_weights(params, cfg, devices), put(rows, "BU", devices)
        return np.asarray(jax.jit(forward)(*placed))


def difference(cfg: ModelConfig, mesh: dict[str, int]) -> float:
    """The largest difference of logits of the order of one from the reference's."""
    params = weights_of(cfg)
    expected = np.stack([Reference(cfg, params)(row[:-1]) for row in ROWS])
    got = logits_of(cfg, params, ROWS, mesh)
    assert np.all(got[..., cfg.vocab_size :] == -np.inf) and got.shape[-1] == cfg.padded_vocab_size
    return float(np.max(np.abs(got[..., : cfg.vocab_size] - expected)))


@pytest.mark.parametrize(
    ("cfg", "mesh"),
    [(CFG, {}), (CFG, SHARDED), slowly(OTHER, {}), slowly(OTHER, SHARDED)],
    ids=["swiglu, norms, cap", "swiglu, norms, cap, sharded", "gelu, tied", "gelu, tied, sharded"],
)
def test_logits_are_the_references(cfg, mesh):
    assert difference(cfg, mesh) < 1e-5


def half_the_theta(monkeypatch):
    monkeypatch.setattr(transformer, "angles", lambda p, theta, cfg: angles(p, theta / 2, cfg))


def pairs_side_by_side(monkeypatch):
    def rotate_neighbours(x, by):
        order = [*range(0, x.shape[-1], 2), *range(1, x.shape[-1], 2)]
        return rotate(x[..., order], by)[..., np.argsort(order)]

    monkeypatch.setattr(layers, "rotate", rotate_neighbours)


def norms_of_sums(monkeypatch):
    monkeypatch.setattr(norms, "inverse_rms", lambda x, *a: inverse_rms(x, *a) / math.sqrt(x.shape[-1]))


@pytest.mark.parametrize("plant", [half_the_theta, slowly(pairs_side_by_side), slowly(norms_of_sums)])
def test_planted_defect_is_seen(plant, monkeypatch):
    plant(monkeypatch)
    assert difference(CFG, {}) > 1e-3


# Norms.


def test_qk_norm_makes_queries_and_keys_blind_to_their_size():
    params = weights_of(CFG)
    louder = jax.tree.map(np.copy, params)
    for name in "qk":
        weight = louder["layers"]["0+1"]["attention"][name]
        louder["layers"]["0+1"]["attention"][name] = weight.replace(weight.get_value() * 8)
    normed = [logits_of(CFG, p, ROWS, {})[..., :250] for p in (params, louder)]
    np.testing.assert_allclose(normed[0], normed[1], atol=2e-4)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_norm_is_in_float32_and_returns_the_type_it_got(norm):
    x = np.random.default_rng(0).normal(3, 1, (2, 3, 512)).astype(np.float32) * 100
    cfg = CFG.model_copy(update={"d_model": 512, "norm": norm})
    with jax.set_mesh(mesh_of()):
        out = Norm(cfg)(jnp.asarray(x, jnp.bfloat16), cfg)
    assert out.dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    if norm == "layernorm":
        rounded -= rounded.mean(-1, keepdims=True)
    expected = rounded / np.sqrt(np.mean(rounded**2, -1, keepdims=True))
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-6)


# Weights.


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_model_has_as_many_parameters_as_its_config_says(mlp, tied, qk_norm):
    cfg = ModelConfig(mlp=mlp, tied_embeddings=tied, qk_norm=qk_norm, n_heads=4, n_kv_heads=2, vocab_size=1000)
    D, F, L, H, K, C, V = cfg.d_model, cfg.d_ff, cfg.n_layers, 4, 2, cfg.d_head, 1024
    layer = D * C * (H + K + K) + H * C * D + D * F * (3 if mlp == "swiglu" else 2) + 2 * D + 2 * C * qk_norm
    with jax.set_mesh(mesh_of()):
        params = abstract_model(cfg)[1]
    assert sum(x.size for x in jax.tree.leaves(params)) == L * layer + D + V * D * (1 if tied else 2)


def test_init_has_the_declared_spread_and_residual_matrices_shrink_with_depth():
    cfg = ModelConfig(d_model=64, d_ff=128, n_layers=8, n_heads=4, n_kv_heads=2, d_head=32, vocab_size=1000)
    with jax.set_mesh(mesh_of()):
        init = jax.jit(lambda key: nnx.split(Transformer(cfg, nnx.Rngs(params=key)))[1])
        params = nnx.to_pure_dict(jax.device_get(init(jax.random.key(0))))
    layer = params["layers"]["0+1"]
    shrunk = 1 / math.sqrt(2 * cfg.n_layers)
    expected = {
        "embed": (params["embed"], 64**-0.5),
        "unembed": (params["unembed"], 64**-0.5),
        "q": (layer["attention"]["q"], 64**-0.5),
        "v": (layer["attention"]["v"], 64**-0.5),
        "gate": (layer["mlp"]["gate"], 64**-0.5),
        "up": (layer["mlp"]["up"], 64**-0.5),
        "o": (layer["attention"]["o"], 128**-0.5 * shrunk),
        "down": (layer["mlp"]["down"], 128**-0.5 * shrunk),
    }
    for name, (value, std) in expected.items():
        assert abs(value.mean()) < 4 * std / math.sqrt(value.size), name
        assert abs(value.std() / std - 1) < 4 / math.sqrt(2 * value.size), name
    for vector in (layer["attention_norm"]["scale"], layer["mlp_norm"]["scale"], params["norm"]["scale"]):
        assert (vector == 1).all()
    # No two layers, and no two matrices of a shape, start alike.
    starts = {tuple(x.ravel()[:4]) for x in [*layer["mlp"]["gate"], *layer["mlp"]["up"], *layer["attention"]["v"]]}
    assert len(starts) == 3 * cfg.n_layers


# LLVM may contract multiplications and additions, and differently in another loop: then the last bit is not the same.
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [pytest.param({}, 0, id="quickly"), pytest.param(AS_SHIPPED, 1e-6, marks=pytest.mark.slow, id="optimised")],
)
def test_init_is_the_same_on_every_mesh(options, tolerance):
    leaves = []
    for mesh in ({}, {"tensor": 4, "fsdp": 2}):
        with jax.set_mesh(mesh_of(**mesh)):
            init = jax.jit(lambda key: nnx.split(Transformer(CFG, nnx.Rngs(params=key)))[1], compiler_options=options)
            params = init(jax.random.key(7))
        leaves.append(jax.tree.leaves(params))
    for one, sharded in zip(*leaves, strict=True):
        np.testing.assert_allclose(one, sharded, rtol=tolerance, atol=0)
    assert params["embed"].get_value().sharding.spec == jax.P("tensor", "fsdp")


@pytest.mark.parametrize("mesh", [{}, {"tensor": 4, "fsdp": 2}, SHARDED], ids=str)
def test_look_up_is_indexing_and_adds_up_the_gradients_of_a_row(mesh):
    devices = mesh_of(**mesh)
    rng = np.random.default_rng(0)
    table, cotangent = (
        rng.normal(size=(256, 16)).astype(np.float32),
        rng.integers(-4, 5, (B, 32, 16)).astype(np.float32),
    )
    tokens = rng.integers(0, 12, (B, 32)).astype(np.int32) * 23

    def both(table_VD: Array, tokens_BT: Array, cotangent_BTD: Array) -> tuple[Array, Array]:
        x_BTD, pull_back = jax.vjp(lambda t: look_up(weights.Weight(t, letters="VD", decays=True), tokens_BT), table_VD)
        return x_BTD, pull_back(cotangent_BTD)[0]

    with jax.set_mesh(devices):
        table_VD = jax.device_put(table, jax.NamedSharding(devices, jax.P("tensor", "fsdp")))
        x, gradient = jax.jit(both)(table_VD, put(tokens, "BT", devices), put(cotangent, "BTD", devices))
    np.testing.assert_array_equal(x, table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, cotangent)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("mesh", [{}, {"tensor": 4}, SHARDED], ids=str)
def test_project_is_einsum(mesh):
    devices = mesh_of(**mesh)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, 32, 8, 4)).astype(np.float32)
    w = rng.normal(size=(8, 4, 16)).astype(np.float32)
    dy = rng.normal(size=(B, 32, 16)).astype(np.float32)
    with jax.set_mesh(devices):
        w_HCD = jax.device_put(w, jax.NamedSharding(devices, jax.P("tensor", None, "fsdp")))

        def function(x, w):
            return weights.project("BTHC,HCD->BTD", x, w, out_sharding=transformer.acts("BTD"))

        y, pull = jax.vjp(jax.jit(function), put(x, "BTHC", devices), w_HCD)
        dx, dw = pull(put(dy, "BTD", devices))
        assert dw.sharding.is_equivalent_to(w_HCD.sharding, 3)
    np.testing.assert_allclose(y, np.einsum("bthc,hcd->btd", x, w), atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("btd,hcd->bthc", dy, w), atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("bthc,btd->hcd", x, dy), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("unroll", [2])
def test_unrolled_layers_are_the_same_layers(unroll):
    params = weights_of(CFG)
    expected = logits_of(CFG, params, ROWS, {})
    got = logits_of(CFG.model_copy(update={"unroll": unroll}), params, ROWS, {})
    np.testing.assert_allclose(got[..., :250], expected[..., :250], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"n_heads": 4, "n_kv_heads": 3}, "model.n_heads = 4 is not divisible by model.n_kv_heads = 3"),
        ({"d_head": 5}, "model.d_head = 5 is odd; rotary positions need an even number of channels"),
        ({"n_layers": 3, "unroll": 2}, "model.n_layers = 3 is not divisible by model.unroll = 2"),
        (
            {"norm_place": "post", "leading": (LayerConfig(attention_norm=False),)},
            "model.norm_place = 'post' has no norms before attention; leave attention_norm out",
        ),
        (
            {"rope_scaling": YarnScaling(factor=2, original_length=8, fast=1)},
            "model.rope_scaling.fast = 1 must be more than slow = 1",
        ),
        ({"rope_scaling": Llama3Scaling(low=8)}, "model.rope_scaling.high = 4 must be more than low = 8"),
    ],
)
def test_fields_that_contradict_each_other_are_told(fields, told):
    with pytest.raises(ConfigError, match=told):
        ModelConfig(**fields).check()
