"""The decoder against one written in NumPy float64 from the papers, and the properties that its parts are named for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from llm_jax.batch import documents, place
from llm_jax.config import ConfigError
from llm_jax.data.config import BOS_ID
from llm_jax.model import layers, transformer, weights
from llm_jax.model.config import ModelConfig
from llm_jax.model.layers import angles, rms_norm, rotate
from llm_jax.model.transformer import Transformer, abstract_model, logits, look_up
from tests.small import CFG, QUICKLY, B, mesh_of, put, put_weights, ragged_rows, weights_of

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
        return np.asarray(jax.jit(forward, compiler_options=QUICKLY)(*placed))


class Reference:
    """The same decoder in NumPy float64, a row and a layer at a time."""

    def __init__(self, cfg: ModelConfig, params: nnx.State):
        self.cfg = cfg
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(params))

    def __call__(self, row: np.ndarray) -> np.ndarray:
        cfg, p = self.cfg, self.params
        starts = row == BOS_ID
        segments = np.cumsum(starts)
        positions = np.arange(len(row)) - np.maximum.accumulate(np.where(starts, np.arange(len(row)), 0))
        x = p["embed"][row]
        for i in range(cfg.n_layers):
            layer = jax.tree.map(lambda w, i=i: w[i], p["layers"])
            x = x + self.attend(self.norm(x, layer["attention_norm"]), layer["attention"], segments, positions)
            x = x + self.mlp(self.norm(x, layer["mlp_norm"]), layer["mlp"])
        table = p["embed"] if cfg.tied_embeddings else p["unembed"]
        out = self.norm(x, p["norm"]) @ table[: cfg.vocab_size].T
        return out if cfg.logit_soft_cap is None else cfg.logit_soft_cap * np.tanh(out / cfg.logit_soft_cap)

    def norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.cfg.norm_eps) * scale

    def turn(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        half = self.cfg.d_head // 2
        turns = np.exp(1j * positions[:, None] * self.cfg.rope_theta ** (-np.arange(half) / half))
        z = (x[..., :half] + 1j * x[..., half:]) * turns[:, None]
        return np.concatenate([z.real, z.imag], -1)

    def attend(self, x: np.ndarray, p: dict, segments: np.ndarray, positions: np.ndarray) -> np.ndarray:
        q, k, v = (np.einsum("td,dhc->thc", x, p[name]) for name in "qkv")
        if self.cfg.qk_norm:
            q, k = self.norm(q, p["q_norm"]), self.norm(k, p["k_norm"])
        q, k = self.turn(q, positions), self.turn(k, positions)
        group = self.cfg.n_heads // self.cfg.n_kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("thc,shc->hts", q, k) / math.sqrt(self.cfg.d_head)
        visible = (segments[:, None] == segments) & np.tri(len(x), dtype=bool)
        shares = np.where(visible, np.exp(scores - scores.max(-1, keepdims=True, where=visible, initial=-np.inf)), 0)
        return np.einsum("hts,shc,hcd->td", shares / shares.sum(-1, keepdims=True), v, p["o"])

    def mlp(self, x: np.ndarray, p: dict) -> np.ndarray:
        up = x @ p["up"]
        if self.cfg.mlp == "swiglu":
            gate = x @ p["gate"]
            return (gate / (1 + np.exp(-gate)) * up) @ p["down"]
        return (0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))) @ p["down"]


def difference(cfg: ModelConfig, mesh: dict[str, int]) -> float:
    """The largest difference of logits of the order of one from the reference's."""
    params = weights_of(cfg)
    expected = np.stack([Reference(cfg, params)(row[:-1]) for row in ROWS])
    got = logits_of(cfg, params, ROWS, mesh)
    assert np.all(got[..., cfg.vocab_size :] == -np.inf) and got.shape[-1] == cfg.padded_vocab_size
    return float(np.max(np.abs(got[..., : cfg.vocab_size] - expected)))


@pytest.mark.parametrize("mesh", [{}, SHARDED], ids=str)
@pytest.mark.parametrize("cfg", [CFG, OTHER], ids=["swiglu, norms, cap", "gelu, tied"])
def test_logits_are_the_references(cfg, mesh):
    assert difference(cfg, mesh) < 1e-5


def half_the_theta(monkeypatch):
    monkeypatch.setattr(transformer, "angles", lambda p, cfg: angles(p, cfg.model_copy(update={"rope_theta": 5e3})))


def pairs_side_by_side(monkeypatch):
    def rotate_neighbours(x, by):
        order = [*range(0, x.shape[-1], 2), *range(1, x.shape[-1], 2)]
        return rotate(x[..., order], by)[..., np.argsort(order)]

    monkeypatch.setattr(layers, "rotate", rotate_neighbours)


def no_scale_in_norms(monkeypatch):
    def unscaled(x, scale, eps):
        return rms_norm(x, jax.tree.map(jnp.ones_like, scale), eps)

    monkeypatch.setattr(layers, "rms_norm", unscaled)


@pytest.mark.parametrize("plant", [half_the_theta, pairs_side_by_side, no_scale_in_norms])
def test_planted_defect_is_seen(plant, monkeypatch):
    plant(monkeypatch)
    assert difference(CFG, {}) > 1e-3


# Rotary positions.


def turned(x: np.ndarray, positions: np.ndarray, theta: float = 1e4) -> np.ndarray:
    cfg = CFG.model_copy(update={"d_head": x.shape[-1], "rope_theta": theta})
    with jax.set_mesh(mesh_of()):
        return np.asarray(jax.jit(lambda x, p: rotate(x, angles(p, cfg)))(x[None, :, None], positions[None]))[0, :, 0]


def test_rotation_keeps_lengths_and_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 16)).astype(np.float32)
    near, far = np.arange(50), np.arange(50) + 900
    turned_q = {first: turned(np.tile(q, (50, 1)), at) for first, at in ((0, near), (900, far))}
    turned_k = {first: turned(np.tile(k, (50, 1)), at + 7) for first, at in ((0, near), (900, far))}
    np.testing.assert_allclose(np.linalg.norm(turned_q[900], axis=1), np.linalg.norm(q), rtol=1e-5)
    products = [np.sum(turned_q[first] * turned_k[first], axis=1) for first in (0, 900)]
    np.testing.assert_allclose(products[0], products[0][0], atol=2e-4)
    np.testing.assert_allclose(products[0], products[1], atol=2e-3)
    np.testing.assert_array_equal(turned(q, np.array([0])), q)
    assert abs(np.sum(turned(q, np.array([3])) * turned(k, np.array([5]))) - products[0][0]) > 0.1


# Norms.


def test_qk_norm_makes_queries_and_keys_blind_to_their_size():
    params = weights_of(CFG)
    louder = jax.tree.map(np.copy, params)
    for name in "qk":
        weight = louder["layers"]["attention"][name]
        louder["layers"]["attention"][name] = weight.replace(weight.get_value() * 8)
    normed = [logits_of(CFG, p, ROWS, {})[..., :250] for p in (params, louder)]
    np.testing.assert_allclose(normed[0], normed[1], atol=2e-4)


def test_rms_norm_is_in_float32_and_returns_the_type_it_got():
    x = np.random.default_rng(0).normal(size=(2, 3, 512)).astype(np.float32) * 100
    with jax.set_mesh(mesh_of()):
        scale = weights.scale_vector("D", CFG.model_copy(update={"d_model": 512}))
        out = rms_norm(jnp.asarray(x, jnp.bfloat16), scale, 1e-6)
    assert out.dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    expected = rounded / np.sqrt(np.mean(rounded**2, -1, keepdims=True))
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8)


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
        init = jax.jit(lambda key: nnx.split(Transformer(cfg, nnx.Rngs(params=key)))[1], compiler_options=QUICKLY)
        params = nnx.to_pure_dict(jax.device_get(init(jax.random.key(0))))
    layer = params["layers"]
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
    for vector in (layer["attention_norm"], layer["mlp_norm"], params["norm"]):
        assert (vector == 1).all()
    # No two layers, and no two matrices of a shape, start alike.
    starts = {tuple(x.ravel()[:4]) for x in [*layer["mlp"]["gate"], *layer["mlp"]["up"], *layer["attention"]["v"]]}
    assert len(starts) == 3 * cfg.n_layers


# LLVM may contract multiplications and additions, and differently in another loop: then the last bit is not the same.
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [pytest.param(QUICKLY, 0, id="quickly"), pytest.param({}, 1e-6, marks=pytest.mark.slow, id="optimised")],
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
        x_BTD, pull_back = jax.vjp(lambda t: look_up(weights.Weight(t, letters="VD"), tokens_BT), table_VD)
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
    with jax.set_mesh(devices):
        w_HCD = jax.device_put(w, jax.NamedSharding(devices, jax.P("tensor", None, None)))
        function = jax.jit(lambda x, w: weights.project("BTHC,HCD->BTD", x, w, out_sharding=transformer.acts("BTD")))
        y = function(put(x, "BTHC", devices), w_HCD)
    np.testing.assert_allclose(y, np.einsum("bthc,hcd->btd", x, w), atol=1e-5)


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
    ],
)
def test_fields_that_contradict_each_other_are_told(fields, told):
    with pytest.raises(ConfigError, match=told):
        ModelConfig(**fields).check()
