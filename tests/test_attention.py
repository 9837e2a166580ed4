"""Attention backends give the numbers and gradients of the definition for all sights, lengths, heads and meshes."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from llm_jax.config import ConfigError
from llm_jax.mesh import acts
from llm_jax.model import attention as attention_module
from llm_jax.model import chunked, kernels
from llm_jax.model.attention import attention
from llm_jax.model.backends import resolve
from llm_jax.model.config import LayerConfig, ModelConfig
from llm_jax.model.sight import Places, Sight
from tests.reference_attention import Inputs, inputs, reference, sees
from tests.small import mesh_of, put, slowly

SHARDED = {"context": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(autouse=True)
def read_aloud(monkeypatch):
    """A kernel for TPUs is interpreted here."""
    monkeypatch.setattr(kernels, "INTERPRET", True)


class Case(NamedTuple):
    """What attention is asked for, beside arrays."""

    sight: Sight
    soft_cap: float | None = None
    sinks: bool = False


# Every kind of sight. In rows of 256 `chunked` goes from block to block where at most 85 keys are in question, and
# else from span to span: of both there are some, with and without a mask that is causal, and with one key to spare.
CASES = {
    "causal": Case(Sight(True), soft_cap=2.0, sinks=True),
    "bidirectional": Case(Sight(False), sinks=True),
    "short window": Case(Sight(True, window=22), soft_cap=2.0),
    "short window to both sides": Case(Sight(False, window=20), sinks=True),
    "window": Case(Sight(True, window=70)),
    "odd window to both sides": Case(Sight(False, window=71), soft_cap=2.0),
    "blocks": Case(Sight(True, block=11)),
    "long blocks to both sides": Case(Sight(False, block=40), soft_cap=2.0),
    "blocks and global tokens": Case(Sight(True, block=11, global_tokens=3), sinks=True),
    "blocks and global tokens to both sides": Case(Sight(False, block=11, global_tokens=3)),
}
T, STARTS = 256, (0, 61, 64, 130, 131, 199)
# Of two rows, the queries whose dependences are looked at: around borders of documents, blocks and windows.
ASKED = np.reshape([0, 60, 61, 63, 64, 85, 127, 128, 129, 130, 131, 152, 198, 199, 220, 255], (-1, 2))


@functools.cache
def program(backend: str, case: Case, shape: tuple[int, ...], K: int, mesh: tuple[tuple[str, int], ...]) -> Callable:
    """Compiled: (q, k, v, sinks, segments, positions, do) -> the output and the gradients of the first four."""

    def with_gradients(
        q: Array, k: Array, v: Array, sinks: Array, segments: Array, positions: Array, do: Array
    ) -> tuple[Array, ...]:
        here = Places(segments, positions)

        def attend(q: Array, k: Array, v: Array, sinks: Array) -> Array:
            k_BSKC, v_BSKC = (jax.reshard(x, acts("BSKC")) for x in (k, v))
            there = Places(*(jax.reshard(x, acts("BS")) for x in here))
            how: dict[str, Any] = {"sight": case.sight, "soft_cap": case.soft_cap, "backend": backend}
            return attention(q, k_BSKC, v_BSKC, here, there, sinks_H=sinks if case.sinks else None, **how)

        o, pull_back = jax.vjp(attend, q, k, v, sinks)
        return o, *pull_back(do)

    devices = mesh_of(**dict(mesh))
    B, T, H, C = shape
    kinds = {"B": B, "T": T, "H": H, "K": K, "C": C}

    def example(letters: str, dtype: type) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(devices, acts(letters) if len(letters) > 1 else jax.P())
        return jax.ShapeDtypeStruct(tuple(kinds[a] for a in letters), dtype, sharding=sharding)

    with jax.set_mesh(devices):
        floats, ints = [example(a, jnp.float32) for a in ("BTHC", "BTKC", "BTKC", "H")], example("BT", jnp.int32)
        lowered = jax.jit(with_gradients).lower(*floats, ints, ints, floats[0])
        return lowered.compile()


def run(backend: str, case: Case, x: Inputs, mesh: dict[str, int]) -> list[np.ndarray]:
    """The output and the gradients of q, k, v and, if there are sinks, of them."""
    devices = mesh_of(**mesh)
    compiled = program(backend, case, x.q_BTHC.shape, x.k_BTKC.shape[2], tuple(mesh.items()))
    letters = ("BTHC", "BTKC", "BTKC", "", "BT", "BT", "BTHC")
    results = jax.device_get(compiled(*(put(a, spec, devices) for a, spec in zip(x, letters, strict=True))))
    return list(results) if case.sinks else list(results[:4])


def difference(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The worst difference of output and gradients as a share of the largest value, or of one where that is more."""
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1)) for a, b in zip(got, expected, strict=True))


@functools.cache
def expected(case: Case) -> tuple[Inputs, list[np.ndarray]]:
    x = inputs(2, T, 4, 2, 8)
    return x, reference(x, *case)


def test_the_references_gradients_are_its_outputs():
    """Numerically: its change along a direction is the gradient times the direction, in float64."""
    x = inputs(2, 24, 4, 2, 8)
    case = Case(Sight(True, window=9), soft_cap=2.0, sinks=True)
    rng = np.random.default_rng(0)
    along = [rng.normal(size=a.shape) for a in x[:4]]
    ends = [
        np.sum(reference(x._replace(**dict(zip(x._fields, moved, strict=False))), *case)[0] * x.do_BTHC)
        for step in (1e-5, -1e-5)
        for moved in [[a + step * d for a, d in zip(x[:4], along, strict=True)]]
    ]
    slope = sum(float(np.sum(g * d)) for g, d in zip(reference(x, *case)[1:], along, strict=True))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


# Splash knows no global tokens.
OF_SPLASH = [name for name, case in CASES.items() if not case.sight.global_tokens]
# Every backend with these every day, and with the other sights where that is slow: a compile takes a second.
OFTEN = ("causal", "odd window to both sides", "blocks and global tokens")


def some(backend: str, names: Iterable[str]) -> list[Any]:
    """Cases of a backend, those that are not OFTEN slow."""
    return [(backend, name) if name in OFTEN else slowly(backend, name) for name in names]


@pytest.mark.parametrize(
    ("backend", "name"),
    [*itertools.product(["chunked"], CASES), *some("xla", CASES), *some("splash", OF_SPLASH)],
)
def test_output_and_gradients_are_those_of_the_definition(backend, name):
    x, numbers = expected(CASES[name])
    assert difference(run(backend, CASES[name], x, {}), numbers) < 5e-6


# The reference knows nothing of meshes but what the compiler does.
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *some("chunked", CASES),
        *[("xla", name) if name == "causal" else slowly("xla", name) for name in CASES],
        *[("splash", name) if name == "causal" else slowly("splash", name) for name in OF_SPLASH],
    ],
)
def test_output_and_gradients_are_those_of_the_definition_where_sharded(backend, name):
    x, numbers = expected(CASES[name])
    assert difference(run(backend, CASES[name], x, SHARDED), numbers) < 5e-6


def wrong_dependences(backend: str, case: Case) -> int:
    """In how many pairs a query's output has a gradient at a value that it must not see, or none at one it must."""
    x = inputs(2, T, 4, 2, 8, STARTS)
    seen = sees(case.sight, x.segments_BT[0], x.positions_BT[0])
    wrong = 0
    for asked in ASKED:
        do = np.zeros_like(x.do_BTHC)
        do[np.arange(2), asked] = x.do_BTHC[np.arange(2), asked]
        dk, dv = run(backend, case, x._replace(do_BTHC=do), {})[2:4]
        wrong += int(np.sum(np.any(dv != 0, axis=(2, 3)) != seen[asked]))
        wrong += int(np.sum(np.any(dk != 0, axis=(2, 3)) & ~seen[asked]))
    return wrong


@pytest.mark.parametrize("backend", [pytest.param("xla", marks=pytest.mark.slow), "chunked"])
@pytest.mark.parametrize("name", CASES)
def test_a_query_depends_on_exactly_the_keys_that_it_sees(name, backend):
    assert wrong_dependences(backend, CASES[name]) == 0


@pytest.mark.parametrize("name", [name if name in OFTEN else slowly(name) for name in OF_SPLASH])
def test_a_query_of_splash_depends_on_exactly_the_keys_that_it_sees(name):
    assert wrong_dependences("splash", CASES[name]) == 0


# 62 and 97 are filled up to 128, 265 to 384; of 192 each of two devices has 96, too few for it to compute them alone.
@pytest.mark.parametrize(
    ("length", "mesh"),
    [slowly(62, {}), (97, {}), slowly(265, {}), (192, {"context": 2}), slowly(512, {"context": 2})],
)
def test_splash_is_right_at_every_length(length, mesh):
    x, case = inputs(2, length, 4, 2, 8), Case(Sight(True), sinks=True)
    assert difference(run("splash", case, x, mesh), reference(x, *case)) < 5e-6


@pytest.mark.parametrize("backend", [slowly("xla"), "chunked", slowly("splash")])
def test_a_long_window_is_none_and_a_window_of_one_sees_itself(backend):
    x = inputs(2, T, 4, 2, 8)
    plain = Case(Sight(True))
    everything = run(backend, plain, x, {})
    assert difference(run(backend, Case(Sight(True, window=T)), x, {}), everything) < 5e-6
    itself = run(backend, Case(Sight(True, window=1)), x, {})[0]
    assert np.max(np.abs(itself - np.repeat(x.v_BTKC, 2, axis=2))) < 1e-6


# 128: two blocks. 97: prime, so one block. 265: five blocks of 53, in loops of two. 62: shorter than a block.
@pytest.mark.parametrize(
    ("length", "causal"),
    [(265, True), (97, False), (62, True)]
    + [slowly(*of) for of in ((128, True), (128, False), (97, True))]
    + [slowly(265, False), slowly(62, False)],
)
def test_chunked_is_right_at_every_length(length, causal):
    x, case = inputs(2, length, 4, 2, 8), Case(Sight(causal))
    assert difference(run("chunked", case, x, {}), reference(x, *case)) < 5e-6


# 318: six blocks of 53 in a loop.
def test_short_windows_are_right_where_64_does_not_divide_the_row():
    x, case = inputs(2, 318, 4, 2, 8), Case(Sight(False, window=20))
    assert difference(run("chunked", case, x, {}), reference(x, *case)) < 5e-6


@pytest.mark.parametrize("backend", ["xla", "chunked", "splash"])
@pytest.mark.parametrize(("H", "K"), [slowly(4, 4), (4, 1)])
def test_every_grouping_of_heads_is_right(H, K, backend):
    x, case = inputs(2, 64, H, K, 8), Case(Sight(True), sinks=True)
    assert difference(run(backend, case, x, {}), reference(x, *case)) < 5e-6


def test_blocks_divide_the_row():
    for length in range(1, 4097):
        assert length % chunked._block_length(length, length // 4) == 0
    lengths = [chunked._block_length(length, length // 4) for length in (32, 128, 265, 1024, 2048, 4096, 97)]
    assert lengths == [32, 64, 53, 256, 512, 512, 97]
    assert [chunked._block_length(1024, wished) for wished in (1, 64, 129, 1000)] == [64, 64, 128, 512]


def cost(backend: str, case: Case, length: int) -> tuple[int, float]:
    """Bytes that a gradient of one row takes beside arguments and results, and the scores that it makes."""

    def loss(q: Array, k: Array, v: Array, at: Array) -> Array:
        here = Places(at, at)
        how: dict[str, Any] = {"sight": case.sight, "soft_cap": None, "sinks_H": None, "backend": backend}
        return jnp.sum(attention(q, k, v, here, here, **how))

    with jax.set_mesh(mesh_of()):
        x, at = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x, at)
        memory = traced.lower().compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes, exponentials(traced.jaxpr.jaxpr)


def exponentials(jaxpr: Any) -> float:
    """Elements that a program takes the exponential of, loops counted as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        total += equation.outvars[0].aval.size if equation.primitive.name == "exp" else 0
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += times * exponentials(inner) if hasattr(inner, "eqns") else 0
    return total


def test_chunked_keeps_no_scores_of_a_long_row():
    reference_memory, _ = cost("xla", Case(Sight(True)), 4096)
    assert cost("chunked", Case(Sight(True)), 4096)[0] < reference_memory / 4
    assert cost("chunked", Case(Sight(True, window=128)), 4096)[0] < reference_memory / 64


def test_a_short_window_costs_what_it_sees():
    """Scores made forward and backward: in rows of 1024 a window of 128 makes a third of the full ones, or less."""
    full, local = (cost("chunked", Case(Sight(True, window)), 1024)[1] for window in (None, 128))
    assert local < full / 3
    assert cost("chunked", Case(Sight(True, 128)), 2048)[1] < 2.1 * local


def test_scores_and_softmax_are_float32_in_bfloat16():
    """Twice the rounding of the inputs is allowed, not a softmax in bfloat16."""
    x = inputs(2, 128, 4, 2, 8)
    qkv = [jnp.asarray(a, jnp.bfloat16) for a in x[:3]]
    q, k, v = (np.asarray(a.astype(jnp.float32)) for a in qkv)
    right = reference(x._replace(q_BTHC=q, k_BTKC=k, v_BTKC=v), Sight(True), 2.0, True)[0]
    here = Places(jnp.asarray(x.segments_BT), jnp.asarray(x.positions_BT))
    how: dict[str, Any] = {"sight": Sight(True), "soft_cap": 2.0, "sinks_H": jnp.asarray(x.sinks_H)}
    with jax.set_mesh(mesh_of()):
        for backend in ("xla", "chunked", "splash"):
            o = jax.jit(
                lambda q, k, v, backend=backend: attention(q, k, v, here, here, backend=backend, **how),
            )(*qkv)
            assert o.dtype == jnp.bfloat16
            assert np.max(np.abs(np.asarray(o, np.float64) - right)) < 2**-6


GLOBAL: dict[str, Any] = {"period": (LayerConfig(block=8),), "global_tokens": 2}


def test_auto_is_settled_once_and_an_unsettled_backend_is_an_error():
    platforms = ("cpu", "gpu", "tpu")
    assert [resolve(ModelConfig(), platform, 1).attention for platform in platforms] == ["chunked", "flash", "splash"]
    assert [resolve(ModelConfig(**GLOBAL), platform, 1).attention for platform in platforms] == [
        "chunked",
        "xla",
        "xla",
    ]
    assert resolve(ModelConfig(attention="xla"), "cpu", 1).attention == "xla"
    with pytest.raises(AssertionError, match="'auto' was not resolved"):
        run("auto", Case(Sight(True)), inputs(1, 8, 1, 1, 2), {})


@pytest.mark.parametrize(
    ("kernel", "platform", "changes", "why"),
    [
        ("splash", "cpu", {}, "is a kernel for TPUs, and this is a cpu; there are xla and chunked"),
        ("splash", "gpu", {}, "is a kernel for TPUs, and this is a gpu; there are xla, flash and chunked"),
        ("splash", "tpu", GLOBAL, "knows no model.global_tokens; there are xla and chunked"),
        (
            "splash",
            "tpu",
            {"d_head": 192},
            "has no model.d_head = 192: up to 128, or a multiple of it; there are xla and chunked",
        ),
        ("flash", "cpu", {}, "is a kernel for GPUs, and this is a cpu; there are xla and chunked"),
        ("flash", "tpu", {}, "is a kernel for GPUs, and this is a tpu; there are xla, splash and chunked"),
        ("flash", "gpu", GLOBAL, "knows no model.global_tokens; there are xla and chunked"),
        ("flash", "gpu", {"d_head": 256}, "has no model.d_head = 256: up to 128; there are xla and chunked"),
    ],
)
def test_kernels_are_refused_in_a_line_where_they_cannot_be(kernel, platform, changes, why):
    with pytest.raises(ConfigError) as refused:
        resolve(ModelConfig(attention=kernel, **changes), platform, 1)
    assert str(refused.value) == f"model.attention = {kernel} {why}"


# Planted defects. The programs of the right code are forgotten before, and the wrong ones after.


@pytest.fixture
def planted(monkeypatch):
    program.cache_clear()
    yield monkeypatch
    program.cache_clear()


def first_query_of_rank_forgotten(monkeypatch):
    """Every context rank masks as if its queries were the row's first ones."""
    monkeypatch.setattr(jax.lax, "axis_index", lambda axis: jnp.zeros((), jnp.int32))


def keys_cut_one_early(monkeypatch):
    """The last block of keys ends one key too soon."""
    block = chunked._block

    def short(soft_cap, q, k, v, sinks, visible):
        visible = visible.at[:, -1, -1].set(False) if visible.shape[1] != visible.shape[2] else visible
        return block(soft_cap, q, k, v, sinks, visible)

    monkeypatch.setattr(chunked, "_block", short)


def heads_paired_wrongly(monkeypatch):
    """Query head h reads key head h modulo K instead of h divided by the group."""
    dense = attention_module.dense

    def interleaved(q, k, v, *rest):
        H, K = q.shape[2], k.shape[2]
        order = np.arange(H).reshape(H // K, K).T.reshape(-1)
        return dense(q[:, :, order], k, v, *rest)[:, :, np.argsort(order)]

    monkeypatch.setattr(attention_module, "dense", interleaved)


def mask_replaced(change: Callable) -> Callable:
    """visible(), whose arguments are changed on their way."""

    def plant(monkeypatch):
        visible = chunked.visible
        for module in (attention_module, chunked):
            monkeypatch.setattr(module, "visible", lambda *arguments: visible(*change(*arguments)))

    return plant


@mask_replaced
def window_off_by_one(here, there, t_T, s_S, sight):
    return here, there, t_T, s_S, sight._replace(window=sight.window + 1)


@mask_replaced
def blocks_of_the_row(here, there, t_T, s_S, sight):
    return (
        here._replace(positions=0 * here.positions + t_T[None]),
        there._replace(positions=0 * there.positions + s_S[None]),
        t_T,
        s_S,
        sight,
    )


def segments_ignored_for_global_tokens(monkeypatch):
    """A document's first tokens are seen by those of every document."""
    visible = chunked.visible

    def leaking(here, there, t_T, s_S, sight):
        seen = (there.positions < sight.global_tokens)[:, None, :] & (s_S[None, :] <= t_T[:, None])[None]
        return visible(here, there, t_T, s_S, sight) | seen

    for module in (attention_module, chunked):
        monkeypatch.setattr(module, "visible", leaking)


def reach_too_short(monkeypatch):
    """A block's keys start one place too late."""
    reach = chunked.reach
    monkeypatch.setattr(chunked, "reach", lambda sight, S: (reach(sight, S)[0] - 1, reach(sight, S)[1]))


def documents_ignored(monkeypatch):
    """The kernel is told of one document a row."""
    monkeypatch.setattr(kernels, "_documents", lambda places, sight, S: 0 * places.segments)


def blocks_begin_with_the_row(monkeypatch):
    """The kernel is told of blocks that documents do not begin anew."""
    right = kernels._documents

    def of_row(places, sight, S):
        return right(
            places._replace(positions=0 * places.positions + jnp.arange(places.positions.shape[1])[None]), sight, S
        )

    monkeypatch.setattr(kernels, "_documents", of_row)


def sinks_get_no_gradient_of_other_rows(monkeypatch):
    """Every device keeps the gradient of its own queries."""
    shard_map = jax.shard_map

    def local(function, **specs):
        def stopped(q, k, v, sinks, *rest):
            mine = jax.lax.axis_index("fsdp") == 0
            return function(q, k, v, jnp.where(mine, sinks, jax.lax.stop_gradient(sinks)), *rest)

        return shard_map(stopped, **specs)

    monkeypatch.setattr(jax, "shard_map", local)


@pytest.mark.parametrize(
    ("plant", "name", "backend", "mesh"),
    [
        (first_query_of_rank_forgotten, "causal", "chunked", {"context": 2}),
        slowly(first_query_of_rank_forgotten, "short window", "chunked", {"context": 2}),
        slowly(keys_cut_one_early, "causal", "chunked", {}),
        (heads_paired_wrongly, "causal", "xla", {}),
        (window_off_by_one, "short window", "chunked", {}),
        slowly(reach_too_short, "short window", "chunked", {}),
        slowly(reach_too_short, "window", "chunked", {}),
        slowly(blocks_of_the_row, "blocks", "xla", {}),
        slowly(segments_ignored_for_global_tokens, "blocks and global tokens", "xla", {}),
        (sinks_get_no_gradient_of_other_rows, "bidirectional", "chunked", {"fsdp": 2}),
        (documents_ignored, "causal", "splash", {}),
        slowly(blocks_begin_with_the_row, "blocks", "splash", {}),
    ],
)
def test_planted_defect_is_seen(plant, name, backend, mesh, planted):
    x, numbers = expected(CASES[name])
    plant(planted)
    assert difference(run(backend, CASES[name], x, mesh), numbers) > 1e-3


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (window_off_by_one, "short window"),
        slowly(segments_ignored_for_global_tokens, "blocks and global tokens"),
    ],
)
def test_planted_defect_is_seen_by_gradient(plant, name, planted):
    plant(planted)
    assert wrong_dependences("chunked", CASES[name]) > 0
