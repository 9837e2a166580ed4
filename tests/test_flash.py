"""Attention's kernels for GPUs, read aloud on a CPU: they give the numbers of the definition, and lower for CUDA."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AbstractDevice, AbstractMesh

from llm_jax.alphabet import MESH_AXES
from llm_jax.mesh import EXPLICIT
from llm_jax.model import flash_backward, flash_tiles, kernels
from llm_jax.model.attention import attention
from llm_jax.model.flash_tiles import tiles_for
from llm_jax.model.intervals import Intervals, intervals, visits
from llm_jax.model.sight import Places, Sight
from tests.reference_attention import inputs, places, reference, sees
from tests.small import mesh_of
from tests.test_attention import CASES, SHARDED, STARTS, Case, T, difference, expected, program, run, wrong_dependences

KNOWN = [name for name, case in CASES.items() if not case.sight.global_tokens]


@pytest.fixture
def read_aloud(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", True)


def rarely(name: str, often: tuple[str, ...]) -> Any:
    """A case that is run every day if it is one of these."""
    return pytest.param(name, marks=[] if name in often else pytest.mark.slow)


@pytest.mark.parametrize("name", KNOWN)
def test_a_query_sees_an_interval(name):
    """Exactly that which the definition gives, pair by pair: documents that are cut, filled up, of one token."""
    sight = CASES[name].sight
    borders = np.isin(np.arange(T), (1, *STARTS))[None]
    segments, positions = places(borders)
    segments[segments == segments.max()] = -1
    # Compiled as one: operation by operation it is dozens of programs.
    seen = jax.jit(lambda *places: intervals(Places(*places), sight))(segments, positions)
    low_T1, high_T1 = (np.asarray(x)[0][:, None] for x in seen)
    s_1S = np.arange(T)[None]
    assert np.array_equal((low_T1 <= s_1S) & (s_1S < high_T1), sees(sight, segments[0], positions[0]))


@pytest.mark.parametrize("name", KNOWN)
def test_tiles_outside_are_not_visited_and_those_inside_have_no_mask(name):
    x = inputs(3, T, 1, 1, 8)
    queries, keys = 32, 16

    def visited(segments: Array, positions: Array) -> Any:
        seen = intervals(Places(segments, positions), CASES[name].sight)
        # Queries that were added to fill a tile see nobody.
        padded = (jnp.pad(a, ((0, 0), (0, 64)), constant_values=v) for a, v in zip(seen, (T, 0), strict=True))
        return visits(Intervals(*padded), queries, keys, T)

    found = jax.jit(visited)(x.segments_BT, x.positions_BT)
    of_queries, of_keys = np.asarray(found.of_queries), np.asarray(found.of_keys)
    for b in range(3):
        pairs = sees(CASES[name].sight, x.segments_BT[b], x.positions_BT[b])
        pairs = np.concatenate([pairs, np.zeros((64, T), bool)])
        tiles_IJ = pairs.reshape(-1, queries, T // keys, keys).swapaxes(1, 2)
        some_IJ, all_IJ = np.any(tiles_IJ, axis=(2, 3)), np.all(tiles_IJ, axis=(2, 3))
        for spans, some, whole in ((of_queries[b], some_IJ, all_IJ), (of_keys[b], some_IJ.T, all_IJ.T)):
            for (start, first, after, stop), some_here, all_here in zip(spans, some, whole, strict=True):
                met, inside = np.flatnonzero(some_here), np.flatnonzero(all_here)
                assert start >= stop if met.size == 0 else (start, stop) == (met[0], met[-1] + 1)
                assert first == after == stop if inside.size == 0 else (first, after) == (inside[0], inside[-1] + 1)


@pytest.mark.parametrize("name", [rarely(name, ("causal", "odd window to both sides")) for name in KNOWN])
def test_output_and_gradients_are_those_of_the_definition(name, read_aloud):
    x, numbers = expected(CASES[name])
    assert difference(run("flash", CASES[name], x, {}), numbers) < 5e-6


@pytest.mark.parametrize("name", ["causal", pytest.param("odd window to both sides", marks=pytest.mark.slow)])
def test_output_and_gradients_are_those_of_the_definition_where_sharded(name, read_aloud):
    x, numbers = expected(CASES[name])
    assert difference(run("flash", CASES[name], x, SHARDED), numbers) < 5e-6


@pytest.mark.parametrize("name", ["causal", "odd window to both sides"])
def test_a_query_depends_on_exactly_the_keys_that_it_sees(name, read_aloud):
    assert wrong_dependences("flash", CASES[name]) == 0


# 8 is shorter than a tile, 265 is filled up; of 192 each of two devices has 96.
@pytest.mark.slow
@pytest.mark.parametrize(("length", "mesh"), [(8, {}), (265, {}), (192, {"context": 2})])
def test_every_length_is_right(length, mesh, read_aloud):
    x, case = inputs(2, length, 4, 2, 8), Case(Sight(True), sinks=True)
    assert difference(run("flash", case, x, mesh), reference(x, *case)) < 5e-6


# 24 channels are filled up to 32; three query heads are no power of two.
@pytest.mark.parametrize(("H", "K", "C"), [(3, 1, 24), pytest.param(4, 4, 16, marks=pytest.mark.slow)])
def test_every_grouping_of_heads_and_width_is_right(H, K, C, read_aloud):
    x, case = inputs(2, 64, H, K, C), Case(Sight(True), sinks=True)
    assert difference(run("flash", case, x, {}), reference(x, *case)) < 5e-6


@pytest.mark.slow
def test_scores_and_softmax_are_float32_in_bfloat16(read_aloud):
    """Twice the rounding of the inputs is allowed, not a softmax in bfloat16."""
    x = inputs(2, 128, 4, 2, 8)
    qkv = [jnp.asarray(a, jnp.bfloat16) for a in x[:3]]
    q, k, v = (np.asarray(a.astype(jnp.float32)) for a in qkv)
    right = reference(x._replace(q_BTHC=q, k_BTKC=k, v_BTKC=v), Sight(True), 2.0, True)[0]
    here = Places(jnp.asarray(x.segments_BT), jnp.asarray(x.positions_BT))
    how: dict[str, Any] = {"sight": Sight(True), "soft_cap": 2.0, "sinks_H": jnp.asarray(x.sinks_H)}
    with jax.set_mesh(mesh_of()):
        o = jax.jit(lambda q, k, v: attention(q, k, v, here, here, backend="flash", **how))(*qkv)
    assert o.dtype == jnp.bfloat16
    assert np.max(np.abs(np.asarray(o, np.float64) - right)) < 2**-6


def test_tiles_are_no_longer_than_rows():
    for length, C in ((1, 8), (100, 64), (4096, 64), (4096, 128)):
        for tiles in tiles_for(length, length, C):
            assert 16 <= min(tiles.queries, tiles.keys) and max(tiles.queries, tiles.keys) < max(32, 2 * length)
            assert all(math.log2(n).is_integer() for n in (tiles.queries, tiles.keys, tiles.warps))


# The way to a GPU, as far as a CPU can go it: JAX's, to Triton's language.

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")


def gpus(**sizes: int) -> AbstractMesh:
    """A mesh of H100s; axes that are not named are 1."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=EXPLICIT, abstract_device=H100)


def lowered_for_cuda(function: Callable, mesh: AbstractMesh, *arguments: Any) -> str:
    """The program as it is handed to XLA on a machine with GPUs; arguments as shapes, whole where they do not say."""

    def example(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x.update(sharding=x.sharding or jax.NamedSharding(mesh, jax.P()))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*jax.tree.map(example, arguments))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


# From 0.11 on JAX announces that its way to Triton will go one day.
ANNOUNCED = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@ANNOUNCED
@pytest.mark.parametrize(
    ("C", "H", "K", "case"),
    [
        (64, 4, 4, Case(Sight(True))),
        (96, 6, 2, Case(Sight(False, window=128), soft_cap=20.0, sinks=True)),
        pytest.param(80, 3, 1, Case(Sight(True, window=500)), marks=pytest.mark.slow),
    ],
)
def test_kernels_lower_for_a_gpu(C, H, K, case):
    """Forward and backward, in bfloat16: three kernels, of operations and shapes that Triton has."""
    B, T = 2, 1000

    def loss(q: Array, k: Array, v: Array, sinks: Array, segments: Array, positions: Array) -> Array:
        here = Places(segments, positions)
        how: dict[str, Any] = {"sight": case.sight, "soft_cap": case.soft_cap, "backend": "flash"}
        o_BTHC = attention(q, k, v, here, here, sinks_H=sinks if case.sinks else None, **how)
        return jnp.sum(o_BTHC.astype(jnp.float32))

    heads = [jax.ShapeDtypeStruct((B, T, n, C), jnp.bfloat16) for n in (H, K, K)]
    sinks, place = jax.ShapeDtypeStruct((H,), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.int32)
    text = lowered_for_cuda(jax.grad(loss, (0, 1, 2)), gpus(), *heads, sinks, place, place)
    assert text.count("__gpu$xla.gpu.triton") == 3


# Planted defects.


@pytest.fixture
def planted(monkeypatch):
    program.cache_clear()
    yield monkeypatch
    program.cache_clear()


def one_tile_too_few(monkeypatch):
    """The last tile that a query may see is left out."""
    monkeypatch.setattr(
        flash_tiles,
        "visits",
        lambda *arguments: (v := visits(*arguments))._replace(
            of_queries=v.of_queries - jnp.array([0, 1, 1, 1])[None, None]
        ),
    )


def masks_forgotten(monkeypatch):
    """Every tile that is visited is taken to be seen as a whole, by the queries' gradients."""

    def unmasked(span, step, carry):
        return flash_tiles.along(span, lambda i, carry, masked: step(i, carry, False), carry)

    monkeypatch.setattr(flash_backward, "along", unmasked)


def first_query_of_rank_forgotten(monkeypatch):
    """Every context rank masks as if its queries were the row's first ones."""
    monkeypatch.setattr(jax.lax, "axis_index", lambda axis: jnp.zeros((), jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "mesh"),
    [(one_tile_too_few, {}), (masks_forgotten, {}), (first_query_of_rank_forgotten, {"context": 2})],
)
def test_planted_defect_is_seen(plant, mesh, planted, read_aloud):
    x, numbers = expected(CASES["short window"])
    plant(planted)
    assert difference(run("flash", CASES["short window"], x, mesh), numbers) > 1e-3
