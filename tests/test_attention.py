"""Attention backends give the reference's numbers and gradients for all lengths, heads, segments and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from llm_jax.mesh import acts
from llm_jax.model import attention as module
from llm_jax.model.attention import attention, resolve
from llm_jax.model.config import ModelConfig
from llm_jax.model.sight import Places, Sight
from tests.small import QUICKLY, mesh_of, put

SHARDED = {"context": 2, "fsdp": 2, "tensor": 2}


def segments_of(rng: np.random.Generator, B: int, T: int) -> np.ndarray:
    """int32 [B, T]: a row of one document, and rows of a few."""
    starts = rng.random((B, T)) < 4 / T
    starts[0] = False
    return np.cumsum(starts, axis=1).astype(np.int32)


def inputs(B: int, T: int, H: int, K: int, C: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v, segments and the output's cotangent."""
    rng = np.random.default_rng(T)
    q, k, v, do = (rng.normal(size=(B, T, heads, C)).astype(np.float32) for heads in (H, K, K, H))
    return q, k, v, segments_of(rng, B, T), do


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray, causal: bool) -> np.ndarray:
    """Attention by its definition, in float64: one row, one head and one query at a time."""
    B, T, H, C = q.shape
    group = H // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = segments[b] == segments[b, t]
                if causal:
                    seen[t + 1 :] = False
                scores = k[b, seen, h // group].astype(np.float64) @ q[b, t, h] / np.sqrt(C)
                shares = np.exp(scores - scores.max())
                out[b, t, h] = shares @ v[b, seen, h // group] / shares.sum()
    return out


def full(q: Array, k: Array, v: Array, segments_BT: Array, segments_BS: Array, causal: bool, backend: str) -> Array:
    places = (Places(segments_BT, jnp.zeros_like(segments_BT)), Places(segments_BS, jnp.zeros_like(segments_BS)))
    return attention(q, k, v, *places, sight=Sight(causal), soft_cap=None, sinks_H=None, backend=backend)


def run(backend: str, causal: bool, arrays: tuple[np.ndarray, ...], mesh: dict[str, int]) -> list[np.ndarray]:
    """The output and the gradients of q, k and v."""
    devices = mesh_of(**mesh)

    def with_gradients(q: Array, k: Array, v: Array, segments: Array, do: Array) -> tuple[Array, ...]:
        def attend(q: Array, k: Array, v: Array) -> Array:
            k_BSKC, v_BSKC, segments_BS = (
                jax.reshard(x, acts(a)) for x, a in ((k, "BSKC"), (v, "BSKC"), (segments, "BS"))
            )
            return full(q, k_BSKC, v_BSKC, segments, segments_BS, causal, backend)

        o, pull_back = jax.vjp(attend, q, k, v)
        return o, *pull_back(do)

    with jax.set_mesh(devices):
        placed = [
            put(x, letters, devices) for x, letters in zip(arrays, ("BTHC", "BTKC", "BTKC", "BT", "BTHC"), strict=True)
        ]
        return jax.device_get(jax.jit(with_gradients, compiler_options=QUICKLY)(*placed))


def difference(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The worst difference of output and gradients, whose values are of the order of one."""
    return max(float(np.max(np.abs(a - b))) for a, b in zip(got, expected, strict=True))


def same_as_reference(T: int, causal: bool, mesh: dict[str, int], H: int = 4, K: int = 2) -> float:
    arrays = inputs(4, T, H, K, 8)
    return difference(run("chunked", causal, arrays, mesh), run("xla", causal, arrays, {}))


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_attention_by_its_definition(causal):
    arrays = inputs(2, 24, 4, 2, 8)
    assert (
        np.max(np.abs(run("xla", causal, arrays, {})[0] - naive(arrays[0], arrays[1], arrays[2], arrays[3], causal)))
        < 2e-6
    )


# 128: two blocks. 97: prime, so one block. 265: five blocks of 53, in loops of two. 62: shorter than a block.
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [128, 97, 265, 62])
def test_chunked_is_the_reference(T, causal):
    assert same_as_reference(T, causal, {}) < 5e-6


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 1)])
def test_chunked_is_the_reference_with_every_grouping_of_heads(H, K):
    assert same_as_reference(128, True, {}, H, K) < 5e-6


@pytest.mark.parametrize("causal", [True, False])
def test_chunked_is_the_reference_where_positions_are_sharded(causal):
    assert same_as_reference(256, causal, SHARDED) < 5e-6


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_itself_where_positions_are_sharded(causal):
    arrays = inputs(4, 64, 4, 2, 8)
    assert difference(run("xla", causal, arrays, SHARDED), run("xla", causal, arrays, {})) < 5e-6


def test_blocks_divide_the_row():
    for T in range(1, 4097):
        block = module._block_length(T)
        assert T % block == 0
    assert [module._block_length(T) for T in (32, 128, 265, 1024, 2048, 4096, 97)] == [32, 64, 53, 256, 512, 512, 97]


def test_chunked_keeps_no_scores_of_a_long_row():
    def memory(backend: str) -> int:
        def loss(q: Array, k: Array, v: Array, segments: Array) -> Array:
            return jnp.sum(full(q, k, v, segments, segments, True, backend))

        with jax.set_mesh(mesh_of()):
            x, segments = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32), jax.ShapeDtypeStruct((1, 4096), jnp.int32)
            compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, segments).compile(QUICKLY)
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert memory("chunked") < memory("xla") / 4


def test_scores_and_softmax_are_float32_in_bfloat16():
    """Twice the rounding of the inputs is allowed, not a softmax in bfloat16."""
    q, k, v, segments, _ = inputs(2, 128, 4, 2, 8)
    qkv = q, k, v
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in qkv]
    with jax.set_mesh(mesh_of()):
        for backend in ("xla", "chunked"):
            o = jax.jit(
                lambda q, k, v, s, backend=backend: full(q, k, v, s, s, True, backend),
                compiler_options=QUICKLY,
            )(*(jnp.asarray(x, jnp.bfloat16) for x in qkv), jnp.asarray(segments))
            assert o.dtype == jnp.bfloat16
            expected = naive(rounded[0], rounded[1], rounded[2], segments, True)
            assert np.max(np.abs(np.asarray(o, np.float64) - expected)) < 2**-6


def test_auto_is_settled_once_and_an_unsettled_backend_is_an_error():
    assert [resolve(ModelConfig(), platform).attention for platform in ("cpu", "gpu", "tpu")] == [
        "chunked",
        "xla",
        "xla",
    ]
    assert resolve(ModelConfig(attention="xla"), "cpu").attention == "xla"
    arrays = inputs(1, 8, 1, 1, 2)
    with pytest.raises(AssertionError, match="'auto' was not resolved"):
        run("auto", True, arrays, {})


# Planted defects.


def first_query_of_rank_forgotten(monkeypatch):
    """Every context rank masks as if its queries were the row's first ones."""
    monkeypatch.setattr(jax.lax, "axis_index", lambda axis: jnp.zeros((), jnp.int32))


def keys_cut_one_early(monkeypatch):
    """The last block of keys ends one key too soon."""
    block = module._block

    def short(soft_cap, q, k, v, sinks, visible):
        visible = visible.at[:, -1, -1].set(False) if visible.shape[1] != visible.shape[2] else visible
        return block(soft_cap, q, k, v, sinks, visible)

    monkeypatch.setattr(module, "_block", short)


def heads_paired_wrongly(monkeypatch):
    """Query head h reads key head h modulo K instead of h divided by the group."""
    dense = module._dense

    def interleaved(q, k, v, *rest):
        H, K = q.shape[2], k.shape[2]
        order = np.arange(H).reshape(H // K, K).T.reshape(-1)
        return dense(q[:, :, order], k, v, *rest)[:, :, np.argsort(order)]

    monkeypatch.setattr(module, "_dense", interleaved)


@pytest.mark.parametrize(("plant", "mesh"), [(first_query_of_rank_forgotten, {"context": 2}), (keys_cut_one_early, {})])
def test_planted_defect_of_chunked_is_seen(plant, mesh, monkeypatch):
    arrays = inputs(4, 128, 4, 2, 8)
    expected = run("xla", True, arrays, {})
    plant(monkeypatch)
    assert difference(run("chunked", True, arrays, mesh), expected) > 1e-2


def test_planted_wrong_pairing_of_heads_is_seen(monkeypatch):
    arrays = inputs(2, 24, 4, 2, 8)
    heads_paired_wrongly(monkeypatch)
    assert (
        np.max(np.abs(run("xla", True, arrays, {})[0] - naive(arrays[0], arrays[1], arrays[2], arrays[3], True))) > 1e-2
    )
