"""Decoding with a cache gives the numbers of a full forward pass, for every kind of attention, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_jax.config import ConfigError
from llm_jax.eval.generate import by_row
from llm_jax.eval.scorer import on_mesh
from llm_jax.model import decode
from llm_jax.model.backends import resolve
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.model.transformer import abstract_model, logits
from tests.small import CFG, mesh_of

T, N = 12, 10
LENGTHS = (5, 9, 12, 3)
# Every kind of layer, in as few models as can have them.
KINDS: dict[str, dict] = {
    "windows": {"n_layers": 3, "period": (LayerConfig(window=6), LayerConfig(), LayerConfig(window=64))},
    "local_global": {"global_tokens": 2, "period": (LayerConfig(block=8), LayerConfig())},
    "experts": {
        "period": (LayerConfig(moe=True), LayerConfig(block=4)),
        "moe": MoeConfig(experts=4, top_k=2, d_ff=16),
    },
    "learned": {"learned_positions": 32, "qk_norm": False, "attention_sinks": True, "norm_place": "post"},
}


def cfg_of(kind: str, mesh: jax.sharding.Mesh) -> ModelConfig:
    cfg = CFG.model_copy(update=KINDS[kind])
    return resolve(decode.unrolled(cfg), "cpu", mesh.shape["expert"])


@functools.cache
def prompts() -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.random.default_rng(0).integers(8, CFG.vocab_size, (len(LENGTHS), T)).astype(np.int32)
    start_B = np.array([T - n for n in LENGTHS], np.int32)
    tokens_BT[np.arange(T)[None] < start_B[:, None]] = 0
    return tokens_BT, start_B


@functools.cache
def weights(kind: str) -> tuple[nnx.State, nnx.State]:
    """Numpy weights, all of them drawn: what is zero or one would hide where it goes."""
    rng = np.random.default_rng(2)
    with jax.set_mesh(mesh_of()):
        _, *abstract = abstract_model(cfg_of(kind, mesh_of()))
    return jax.tree.map(lambda x: rng.normal(float(x.ndim == 1), 0.2, x.shape).astype(x.dtype), tuple(abstract))


def put(kind: str, cfg: ModelConfig, mesh: jax.sharding.Mesh) -> tuple:
    _, *abstract = abstract_model(cfg)
    return jax.tree.map(
        lambda x, like: jax.device_put(x, jax.NamedSharding(mesh, like.sharding.spec)), weights(kind), tuple(abstract)
    )


@functools.cache
def greedy(kind: str, sizes: tuple[tuple[str, int], ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """N greedy tokens of each prompt, and the logits that each came from."""
    mesh = mesh_of(**dict(sizes))
    tokens_BT, start_B = prompts()
    with jax.set_mesh(mesh):
        cfg = cfg_of(kind, mesh)
        graph, w = abstract_model(cfg).graph, put(kind, cfg, mesh)
        begin = jax.jit(
            lambda w, tokens_BT, start_B: decode.prefill(nnx.merge(graph, *w), tokens_BT, start_B, T + N, cfg),
        )
        step = jax.jit(
            lambda w, token_B, t, cache: decode.step(nnx.merge(graph, *w), token_B, t, cache, cfg),
        )
        logits_BV, cache = begin(w, on_mesh(tokens_BT), by_row(start_B))
        seen, new = [], []
        for i in range(N):
            seen.append(np.asarray(logits_BV))
            new.append(seen[-1].argmax(-1).astype(np.int32))
            logits_BV, cache = step(w, by_row(new[-1]), jnp.int32(T + i), cache)
        return np.stack(new, 1), np.stack(seen, 1)


@functools.cache
def full(kind: str) -> np.ndarray:
    """The logits [B, N, V] that a full forward pass over each whole text gives where `greedy` was."""
    tokens_BT, start_B = prompts()
    new_BN, _ = greedy(kind)
    with jax.set_mesh(mesh_of()):
        cfg = cfg_of(kind, mesh_of())
        graph, w = abstract_model(cfg).graph, put(kind, cfg, mesh_of())

        @jax.jit
        def forward(w, tokens_BT, positions_BT):
            model = nnx.merge(graph, *w)
            return logits(model, model(tokens_BT, jnp.zeros_like(tokens_BT), positions_BT, cfg)[0], cfg)

        U = T + N
        aligned_BU = np.zeros((len(LENGTHS), U), np.int32)
        for row, (tokens_T, new_N, start) in enumerate(zip(tokens_BT, new_BN, start_B, strict=True)):
            text = np.concatenate([tokens_T[start:], new_N])
            aligned_BU[row, : len(text)] = text
        positions_BU = np.broadcast_to(np.arange(U, dtype=np.int32), aligned_BU.shape)
        all_BUV = np.asarray(forward(w, on_mesh(aligned_BU), on_mesh(positions_BU)))
    return np.stack([all_BUV[row, n - 1 : n - 1 + N] for row, n in enumerate(LENGTHS)])


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_a_cache_is_greedy_by_full_forward(kind: str) -> None:
    new_BN, seen_BNV = greedy(kind)
    expected_BNV = full(kind)
    V = CFG.vocab_size
    np.testing.assert_allclose(seen_BNV[..., :V], expected_BNV[..., :V], atol=2e-5)
    assert np.isneginf(seen_BNV[..., V:]).all()
    second, first = np.moveaxis(np.sort(expected_BNV)[..., -2:], -1, 0)
    clear = first - second > 1e-4
    assert clear.mean() > 0.95, "choose another seed: too many ties"
    assert (expected_BNV.argmax(-1) == new_BN)[clear].all()


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("windows", {"fsdp": 2, "tensor": 2}),
        ("experts", {"expert": 2, "data": 2}),
        pytest.param("windows", {"data": 2, "tensor": 4}, marks=pytest.mark.slow),
        pytest.param("windows", {"fsdp": 4}, marks=pytest.mark.slow),
        pytest.param("local_global", {"data": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(kind: str, sizes: dict[str, int]) -> None:
    new_BN, seen_BNV = greedy(kind)
    on_mesh_BN, seen_on_mesh_BNV = greedy(kind, tuple(sizes.items()))
    V = CFG.vocab_size
    np.testing.assert_allclose(seen_on_mesh_BNV[..., :V], seen_BNV[..., :V], atol=2e-5)
    assert (on_mesh_BN == new_BN).all()


def cache_lengths(kind: str) -> list[int]:
    tokens_BT, start_B = prompts()
    with jax.set_mesh(mesh_of()):
        cfg = cfg_of(kind, mesh_of())
        graph, *w = abstract_model(cfg)
        _, cache = jax.eval_shape(
            lambda w, tokens_BT, start_B: decode.prefill(nnx.merge(graph, *w), tokens_BT, start_B, T + N, cfg),
            w,
            on_mesh(tokens_BT),
            by_row(start_B),
        )
    return [pair.keys_BKCS.shape[-1] for pair in cache.pairs.values()]


def test_a_cache_is_as_long_as_its_layer_looks_back() -> None:
    assert cache_lengths("windows") == [6, T + N, T + N]
    assert cache_lengths("experts") == [T + N, 4]
    # Whatever is in reach of global tokens may be as far away as the text is long.
    assert cache_lengths("local_global") == [T + N] * 2


def test_rows_can_be_taken_again_and_moved() -> None:
    mesh = mesh_of(data=2, tensor=2)
    with jax.set_mesh(mesh):
        spec = jax.P("data", "tensor", None, None)
        x_BKCS = jax.device_put(np.arange(4 * 2 * 3 * 2.0).reshape(4, 2, 3, 2), jax.NamedSharding(mesh, spec))
        taken = jax.jit(decode.rows_of)((x_BKCS, None), by_row(np.array([3, 3, 0, 1], np.int32)))[0]
        assert jax.typeof(taken).sharding.spec == jax.typeof(x_BKCS).sharding.spec
    assert (np.asarray(taken) == np.asarray(x_BKCS)[[3, 3, 0, 1]]).all()


def test_a_context_axis_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.context = 2: decoding has no positions to divide"):
        decode.check_mesh(mesh_of(context=2))
