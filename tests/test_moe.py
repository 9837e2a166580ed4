"""Experts do what a plain loop over them does: forward and every gradient, on every mesh and however tokens travel."""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from llm_jax.config import ConfigError
from llm_jax.model import moe
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.model.grouped_matmul import group_rows, grouped_matmul
from llm_jax.model.moe import Moe, Routing, resolve_moe
from llm_jax.model.paths import placed
from llm_jax.model.weights import Balance
from llm_jax.train.step import rebalanced
from tests.small import mesh_of, put, slowly

B, T, D, F, E, X = 8, 16, 16, 8, 8, 2
TOLERANCE = 1e-6
# With a capacity of 1.25, an expert has 5 slots for the 32 choices of a row of 16 tokens.
SLOTS = 5
LOAD_BALANCE, ROUTER_Z = 0.3, 0.1


def config(**moe: Any) -> ModelConfig:
    fields = {"experts": E, "top_k": X, "d_ff": F, "balance_rate": 0.01} | moe
    return ModelConfig(
        d_model=D,
        mlp=fields.pop("mlp", "swiglu"),
        period=(LayerConfig(moe=True),),
        moe=MoeConfig.model_validate(fields),
    )


WAYS = {
    "all_gather x blocked": config(exchange="all_gather", grouped_matmul="blocked"),
    "all_to_all x blocked": config(exchange="all_to_all", grouped_matmul="blocked"),
    "all_gather x ragged": config(exchange="all_gather", grouped_matmul="ragged"),
    "all_to_all x ragged": config(exchange="all_to_all", grouped_matmul="ragged"),
    "capacity": config(exchange="all_to_all", grouped_matmul="einsum", capacity_factor=1.25),
    "other choices": config(
        exchange="all_to_all",
        grouped_matmul="blocked",
        scores="sigmoid",
        normalise_gates=False,
        gate_scale=2.5,
        top_k=3,
        shared_d_ff=12,
        mlp="gelu",
    ),
}
MESHES = {
    "one device": {},
    "expert 4 x fsdp 2": {"expert": 4, "fsdp": 2},
    "data 2 x expert 2 x tensor 2": {"data": 2, "expert": 2, "tensor": 2},
    "context 2 x expert 2 x tensor 2": {"context": 2, "expert": 2, "tensor": 2},
}

Arrays = dict[str, np.ndarray]


class Inputs(NamedTuple):
    weights: Arrays
    bias_E: np.ndarray
    x_BTD: np.ndarray
    real_BT: np.ndarray
    dy_BTD: np.ndarray


class Outcome(NamedTuple):
    y_BTD: np.ndarray
    routing: Routing
    gradients: Arrays


def inputs(cfg: ModelConfig, seed: int = 8, B: int = B, T: int = T) -> Inputs:
    """Random weights, a bias that changes some choices, tokens with padding at the ends of rows and in a whole row."""
    rng = np.random.default_rng(seed)
    with jax.set_mesh(mesh_of()):
        shapes = jax.tree.leaves_with_path(nnx.to_pure_dict(abstract_moe(cfg)[1]))
    weights = {name_of(path): rng.normal(size=shape.shape) / math.sqrt(shape.shape[-2]) for path, shape in shapes}
    lengths_B = [T, T, T // 2, 0, 1, T - 3, T, T][:B]
    real_BT = np.arange(T)[None] < np.array(lengths_B)[:, None]
    arrays = (rng.normal(scale=0.05, size=E), rng.normal(size=(B, T, D)), real_BT, rng.normal(size=(B, T, D)))
    bias_E, x_BTD, real_BT, dy_BTD = arrays
    f32 = np.float32
    weights = {name: value.astype(f32) for name, value in weights.items()}
    return Inputs(weights, bias_E.astype(f32), x_BTD.astype(f32), real_BT, dy_BTD.astype(f32))


def name_of(path: tuple) -> str:
    return ".".join(str(key.key) for key in path)


def abstract_moe(cfg: ModelConfig) -> tuple[Any, ...]:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: nnx.split(Moe(cfg, nnx.Rngs(params=key)), nnx.Param, Balance), key)


def laid_out(cfg: ModelConfig, mesh: Mesh, given: Inputs) -> tuple[Any, ...]:
    """The arguments of `outcome` as they lie on the mesh."""
    with jax.set_mesh(mesh):
        _, *shapes = abstract_moe(cfg)
    params, balance = placed(shapes, mesh)

    def lay(path: tuple, shape: jax.ShapeDtypeStruct) -> Array:
        return jax.device_put(given.weights[name_of(path[:-1])], shape.sharding)

    params = jax.tree_util.tree_map_with_path(lay, params)
    balance = jax.tree.map(lambda shape: jax.device_put(given.bias_E, shape.sharding), balance)
    return (
        params,
        balance,
        put(given.x_BTD, "BTD", mesh),
        put(given.real_BT, "BT", mesh),
        put(given.dy_BTD, "BTD", mesh),
    )


def compiled(cfg: ModelConfig, mesh: Mesh, given: Inputs) -> jax.stages.Compiled:
    """Forward and gradients, for inputs of the shapes given."""

    def outcome(params: nnx.State, balance: nnx.State, x_BTD: Array, real_BT: Array, dy_BTD: Array) -> Any:
        graph = abstract_moe(cfg)[0]

        def loss(params: nnx.State, x_BTD: Array) -> tuple[Array, Any]:
            y_BTD, routing = nnx.merge(graph, params, balance)(x_BTD, real_BT, cfg)
            total = jnp.sum(y_BTD * dy_BTD) + LOAD_BALANCE * routing.load_balance + ROUTER_Z * routing.router_z
            return total, (y_BTD, routing)

        gradients, (y_BTD, routing) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)
        return y_BTD, routing, gradients

    arguments = laid_out(cfg, mesh, given)
    with jax.set_mesh(mesh):
        return jax.jit(outcome).lower(*arguments).compile()


@functools.cache
def program(way: str, mesh: str) -> jax.stages.Compiled:
    return compiled(WAYS[way], mesh_of(**MESHES[mesh]), inputs(WAYS[way]))


def run(way: str, mesh: str, given: Inputs) -> Outcome:
    return result(program(way, mesh), WAYS[way], mesh_of(**MESHES[mesh]), given)


def result(program: jax.stages.Compiled, cfg: ModelConfig, mesh: Mesh, given: Inputs) -> Outcome:
    with jax.set_mesh(mesh):
        y_BTD, routing, (dparams, dx_BTD) = jax.device_get(program(*laid_out(cfg, mesh, given)))
    gradients = {name_of(path): g for path, g in jax.tree.leaves_with_path(nnx.to_pure_dict(dparams))}
    return Outcome(y_BTD, routing, gradients | {"x": dx_BTD})


# The plain loop.


class Decided(NamedTuple):
    """What follows from scores by counting."""

    experts_BTX: np.ndarray
    kept_BTX: np.ndarray
    """Choices that found a slot."""
    often_BE: np.ndarray
    """How many times its even share of a row's tokens chose an expert."""
    load_E: np.ndarray
    dropped: int


def decided(scores_BTE: np.ndarray, given: Inputs, moe: MoeConfig) -> Decided:
    """The choices, token by token. Fails where a score is so close to being chosen that rounding could decide."""
    ranked_BTE = scores_BTE + given.bias_E
    best_BTE = np.argsort(-ranked_BTE, axis=-1, kind="stable")
    in_order_BTE = np.take_along_axis(ranked_BTE, best_BTE, axis=-1)
    gaps_BT = in_order_BTE[..., : moe.top_k] - in_order_BTE[..., 1 : moe.top_k + 1]
    assert np.min(gaps_BT, initial=1, where=gaps_BT > 0) > 1e-4, "rounding could change a choice: take another seed"
    experts_BTX = best_BTE[..., : moe.top_k].astype(np.int32)
    B, T, X = experts_BTX.shape
    slots = T if moe.capacity_factor is None else math.ceil(moe.capacity_factor * T * X / moe.experts)
    kept_BTX = np.zeros((B, T, X), bool)
    asked_BE = np.zeros((B, moe.experts), np.int32)
    for b, x, t in np.ndindex(B, X, T):
        if given.real_BT[b, t]:
            e = experts_BTX[b, t, x]
            kept_BTX[b, t, x] = asked_BE[b, e] < slots
            asked_BE[b, e] += 1
    dropped = int(np.sum(given.real_BT[..., None] & ~kept_BTX))
    if moe.capacity_factor is None:
        kept_BTX[:] = True
    often_BE = asked_BE * (moe.experts / X / np.maximum(given.real_BT.sum(axis=1, keepdims=True), 1))
    return Decided(experts_BTX, kept_BTX, often_BE.astype(np.float32), asked_BE.sum(axis=0), dropped)


@functools.cache
def loop(way: str) -> Any:
    """A loop over experts in which each sees every token: (weights, x, dy, real, decided) -> (aux, gradients)."""
    cfg = WAYS[way]
    moe = cfg.moe
    assert moe is not None

    def mlp(weights: Any, x: Array, name: str, e: int | slice) -> Array:
        up = x @ weights[f"{name}up"][e]
        if cfg.mlp == "gelu":
            return jax.nn.gelu(up, approximate=False) @ weights[f"{name}down"][e]
        return (jax.nn.silu(x @ weights[f"{name}gate"][e]) * up) @ weights[f"{name}down"][e]

    def loss(weights: Any, x_BTD: Array, dy_BTD: Array, real_BT: Array, decided: Decided) -> Any:
        logits_BTE = x_BTD @ weights["router"]
        scores_BTE = score(logits_BTE, moe)
        gates_BTX = jnp.take_along_axis(scores_BTE, decided.experts_BTX, axis=-1)
        if moe.normalise_gates:
            gates_BTX /= jnp.sum(gates_BTX, axis=-1, keepdims=True)
        y_BTD = mlp(weights, x_BTD, "shared.", slice(None)) if moe.shared_d_ff else jnp.zeros_like(x_BTD)
        for e in range(moe.experts):
            mine_BTX = (decided.experts_BTX == e) & decided.kept_BTX
            gate_BT1 = moe.gate_scale * jnp.sum(jnp.where(mine_BTX, gates_BTX, 0), axis=-1, keepdims=True)
            y_BTD += gate_BT1 * mlp(weights, x_BTD, "", e)
        shares_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
        n_B1 = jnp.maximum(jnp.sum(real_BT, axis=1), 1)[:, None]
        mean_BE = jnp.sum(shares_BTE * real_BT[..., None], axis=1) / n_B1
        balance = jnp.sum(decided.often_BE * mean_BE)
        z = jnp.sum(real_BT * jnp.square(jnp.log(jnp.sum(jnp.exp(logits_BTE), axis=-1))))
        entropy = -jnp.sum(real_BT[..., None] * shares_BTE * jnp.log(shares_BTE))
        told = y_BTD, balance, z, entropy, moe.gate_scale * gates_BTX
        return jnp.sum(y_BTD * dy_BTD) + LOAD_BALANCE * balance + ROUTER_Z * z, told

    with jax.set_mesh(mesh_of()):
        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def score(logits_BTE: Array, moe: MoeConfig) -> Array:
    return jax.nn.softmax(logits_BTE) if moe.scores == "softmax" else jax.nn.sigmoid(logits_BTE)


def expected(way: str, given: Inputs) -> Outcome:
    moe = WAYS[way].moe
    assert moe is not None
    scores_BTE = np.asarray(score(jnp.asarray(given.x_BTD @ given.weights["router"]), moe))
    what = decided(scores_BTE, given, moe)
    arguments = (given.weights, given.x_BTD, given.dy_BTD, given.real_BT, what)
    (dweights, dx_BTD), (y_BTD, balance, z, entropy, gates_BTX) = jax.device_get(loop(way)(*arguments))
    routing: Any = (what.load_E, balance, z, entropy, what.dropped, what.experts_BTX, gates_BTX)
    return Outcome(y_BTD, Routing(*routing), dweights | {"x": dx_BTD})


def wrongness(outcome: Outcome, right: Outcome) -> float:
    """The largest difference of the result or a gradient leaf, as a share of its largest value."""
    pairs = [(outcome.y_BTD, right.y_BTD), *((outcome.gradients[name], g) for name, g in right.gradients.items())]
    assert outcome.gradients.keys() == right.gradients.keys()
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def assert_right(outcome: Outcome, right: Outcome) -> None:
    np.testing.assert_array_equal(outcome.routing.experts_LBTX, right.routing.experts_LBTX)
    np.testing.assert_array_equal(outcome.routing.load_LE, right.routing.load_LE)
    np.testing.assert_allclose(outcome.routing.gates_LBTX, right.routing.gates_LBTX, rtol=1e-6)
    assert outcome.routing.dropped == right.routing.dropped
    for name in ("load_balance", "router_z", "entropy"):
        np.testing.assert_allclose(getattr(outcome.routing, name), getattr(right.routing, name), rtol=2e-6)
    assert wrongness(outcome, right) <= TOLERANCE


# Every way with every mesh; on one device nothing is exchanged, and the two ways are one. Compiles take the time: what
# is not quick waits for the slow tests.
QUICK = {
    "one device": ("all_gather x blocked", "capacity"),
    "expert 4 x fsdp 2": ("all_gather x blocked", "all_to_all x ragged", "capacity"),
    "data 2 x expert 2 x tensor 2": ("other choices",),
    "context 2 x expert 2 x tensor 2": ("all_gather x ragged",),
}
CASES = [
    pytest.param(way, mesh, marks=[] if way in QUICK[mesh] else pytest.mark.slow)
    for mesh in MESHES
    for way in WAYS
    if not (mesh == "one device" and way.startswith("all_to_all"))
]


@pytest.mark.parametrize(("way", "mesh"), CASES)
def test_forward_and_every_gradient_are_the_loops(way, mesh):
    given = inputs(WAYS[way])
    right = expected(way, given)
    assert (right.routing.dropped > 0) == (way == "capacity")
    assert_right(run(way, mesh, given), right)


@pytest.mark.parametrize("way", ["all_gather x blocked", "all_to_all x ragged", "capacity"])
def test_permuting_rows_permutes_the_output(way):
    given = inputs(WAYS[way])
    order_B = np.random.default_rng(1).permutation(B)
    permuted = given._replace(x_BTD=given.x_BTD[order_B], real_BT=given.real_BT[order_B], dy_BTD=given.dy_BTD[order_B])
    outcome, right = run(way, "expert 4 x fsdp 2", permuted), run(way, "expert 4 x fsdp 2", given)
    in_order = right._replace(
        y_BTD=right.y_BTD[order_B],
        routing=right.routing._replace(
            experts_LBTX=right.routing.experts_LBTX[order_B], gates_LBTX=right.routing.gates_LBTX[order_B]
        ),
        gradients=right.gradients | {"x": right.gradients["x"][order_B]},
    )
    assert_right(outcome, in_order)


@pytest.mark.parametrize("way", ["all_gather x blocked", "all_to_all x ragged", "capacity"])
def test_all_tokens_to_the_same_experts(way):
    given = inputs(WAYS[way])
    bias_E = np.zeros(E, np.float32)
    bias_E[[3, 6]] = 8, 4
    given = given._replace(bias_E=bias_E)
    right = expected(way, given)
    n_B = given.real_BT.sum(axis=1)
    np.testing.assert_array_equal(right.routing.load_LE, n_B.sum() * (bias_E > 0))
    assert right.routing.dropped == (X * np.maximum(n_B - SLOTS, 0).sum() if way == "capacity" else 0)
    assert_right(run(way, "expert 4 x fsdp 2", given), right)


@pytest.mark.parametrize("way", ["all_gather x blocked", "capacity"])
def test_ties_are_broken_the_same_way_everywhere(way):
    given = inputs(WAYS[way])
    router_DE, x_BTD = given.weights["router"].copy(), given.x_BTD.copy()
    # Experts whose scores are equal for every token, and tokens that are equal.
    router_DE[:, 5], router_DE[:, 7] = router_DE[:, 1], router_DE[:, 2]
    x_BTD[:, 1::2] = x_BTD[:, ::2]
    given = given._replace(weights=given.weights | {"router": router_DE}, x_BTD=x_BTD, bias_E=np.zeros(E, np.float32))
    right = expected(way, given)
    assert np.any(right.routing.experts_LBTX == 1) and not np.any(right.routing.experts_LBTX[..., 0] == 5)
    for mesh in ("one device", "expert 4 x fsdp 2"):
        assert_right(run(way, mesh, given), right)


@pytest.mark.parametrize("way", ["all_gather x blocked", slowly("capacity")])
def test_a_batch_of_one_token(way):
    given = inputs(WAYS[way], B=1, T=1)
    outcome = result(compiled(WAYS[way], mesh_of(), given), WAYS[way], mesh_of(), given)
    assert_right(outcome, expected(way, given))


def test_the_bias_has_a_say_in_the_choice_alone():
    given = inputs(WAYS["all_gather x blocked"])
    without, same, other = (
        run("all_gather x blocked", "one device", given._replace(bias_E=bias_E))
        for bias_E in (np.zeros(E, np.float32), np.full(E, 0.25, np.float32), given.bias_E)
    )
    assert_right(same, without)
    assert np.any(other.routing.experts_LBTX != without.routing.experts_LBTX)


def test_narrow_activations_and_wide_gradients():
    """Experts in bfloat16 on weights gathered in float32: gradients are the float32 run's as far as bfloat16 goes."""
    way = "all_gather x blocked"
    given = inputs(WAYS[way])
    right = run(way, "one device", given)
    for backend in ("blocked", "ragged"):
        cfg = config(exchange="all_gather", grouped_matmul=backend)
        cfg = cfg.model_copy(update={"compute_dtype": "bfloat16", "gather_dtype": "float32"})
        narrow = given._replace(x_BTD=given.x_BTD.astype(jnp.bfloat16), dy_BTD=given.dy_BTD.astype(jnp.bfloat16))
        mesh = mesh_of(data=2, expert=2)
        outcome = result(compiled(cfg, mesh, narrow), cfg, mesh, narrow)
        assert outcome.y_BTD.dtype == outcome.gradients["x"].dtype == jnp.bfloat16
        assert all(g.dtype == np.float32 for name, g in outcome.gradients.items() if name != "x")
        assert wrongness(outcome, right) < 0.05


@pytest.mark.parametrize("backend", ["blocked", "ragged"])
def test_grouped_matmul_is_a_matmul_a_group(backend):
    """For blocked groups of several blocks and of none, blocks after the last group, and zeros where nobody sits."""
    sizes_E, rows = np.array([320, 0, 256, 64]), group_rows(backend, 600, 4)
    assert rows == (32 if backend == "blocked" else 1) and not np.any(sizes_E % rows)
    rng = np.random.default_rng(0)
    R = int(sizes_E.sum()) + 2 * rows
    x_RD, weight_EDF, dy_RF = (rng.normal(size=s).astype(np.float32) for s in ((R, 5), (4, 5, 3), (R, 3)))
    x_RD[sizes_E.sum() :] = 0

    @jax.jit
    def both(x_RD: Array, weight_EDF: Array, dy_RF: Array) -> Any:
        y_RF, pull = jax.vjp(
            lambda x, weight: grouped_matmul(x, weight, jnp.asarray(sizes_E), backend, rows), x_RD, weight_EDF
        )
        return y_RF, *pull(dy_RF)

    y_RF, dx_RD, dweight_EDF = jax.device_get(both(x_RD, weight_EDF, dy_RF))
    stops = np.cumsum(sizes_E)
    for e, (start, stop) in enumerate(zip(stops - sizes_E, stops, strict=True)):
        np.testing.assert_allclose(y_RF[start:stop], x_RD[start:stop] @ weight_EDF[e], atol=1e-5)
        np.testing.assert_allclose(dx_RD[start:stop], dy_RF[start:stop] @ weight_EDF[e].T, atol=1e-5)
        np.testing.assert_allclose(dweight_EDF[e], x_RD[start:stop].T @ dy_RF[start:stop], atol=1e-4)


# What a CPU does not have, by its definition in JAX's documentation.


def by_definition(
    operand: Array, output: Array, starts: Array, sizes: Array, places: Array, received: Array, *, axis_name: str
) -> Array:
    """lax.ragged_all_to_all; not a number everywhere if a device expects other sizes than it is sent."""
    operands = jax.lax.all_gather(operand, axis_name)
    me = jax.lax.axis_index(axis_name)
    starts, sizes, places = (jax.lax.all_gather(a, axis_name)[:, me] for a in (starts, sizes, places))
    for sender in range(jax.lax.axis_size(axis_name)):
        at = jnp.arange(output.shape[0]) - places[sender]
        from_sender = ((at >= 0) & (at < sizes[sender])).reshape(-1, *[1] * (output.ndim - 1))
        output = jnp.where(from_sender, operands[sender].at[starts[sender] + at].get(mode="clip"), output)
    return jnp.where(jnp.all(sizes == received), output, jnp.nan)


def test_ragged_all_to_all_as_it_is_defined(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", by_definition)
    cfg = config(exchange="ragged_all_to_all", grouped_matmul="blocked")
    given, mesh = inputs(cfg), mesh_of(**MESHES["expert 4 x fsdp 2"])
    assert_right(result(compiled(cfg, mesh, given), cfg, mesh, given), expected("all_gather x blocked", given))


# Communication.


def collectives(program: jax.stages.Compiled) -> list[str]:
    """The lines of what moves something to another place, and does not just add up."""
    return re.findall(r".* (?:all-gather|all-to-all|reduce-scatter|collective-permute).*\(.*", program.as_text() or "")


@pytest.mark.parametrize("way", ["all_gather x blocked", slowly("capacity")])
def test_without_an_expert_axis_nothing_is_exchanged(way):
    assert collectives(compiled(WAYS[way], mesh_of(data=2), inputs(WAYS[way]))) == []


def test_choosing_moves_nothing():
    lines = collectives(program("all_gather x blocked", "expert 4 x fsdp 2"))
    assert lines and not any("top_k" in line for line in lines)


# Planted defects: each turns the proof red.


def test_results_that_are_not_added_up_over_expert_are_seen(monkeypatch):
    def own_part(y: Array, axis: str, tiled: bool) -> Array:
        n = y.shape[0] // jax.lax.axis_size(axis)
        return jax.lax.dynamic_slice_in_dim(y, jax.lax.axis_index(axis) * n, n)

    monkeypatch.setattr(jax.lax, "psum_scatter", own_part)
    assert planted("all_gather x blocked", {"expert": 2}) > 100 * TOLERANCE


def test_results_that_are_not_added_up_over_tensor_do_not_trace(monkeypatch):
    monkeypatch.setattr(jax.lax, "psum", lambda x, axes: x)
    # JAX 0.12 stumbles over telling which result it was.
    with pytest.raises(ValueError, match=r"tensor|expected 15, got 14"):
        planted("all_gather x blocked", {"tensor": 2})


@pytest.mark.slow
def test_gates_from_biased_scores_are_seen(monkeypatch):
    choose = moe.choose
    monkeypatch.setattr(moe, "choose", lambda scores, bias, cfg: choose(scores + bias[None, None], None, cfg))
    assert planted("all_gather x blocked", {}) > 100 * TOLERANCE


def planted(way: str, sizes: dict[str, int]) -> float:
    given = inputs(WAYS[way])
    mesh = mesh_of(**sizes)
    return wrongness(result(compiled(WAYS[way], mesh, given), WAYS[way], mesh, given), expected(way, given))


# Settling what is auto.


def test_auto_is_settled_by_platform_and_mesh():
    dropless, capacity = MoeConfig(top_k=2), MoeConfig(capacity_factor=1.25)

    def settled(moe: MoeConfig, platform: str, expert_axis: int) -> tuple[str, str]:
        resolved = resolve_moe(moe, platform, expert_axis)
        return resolved.exchange, resolved.grouped_matmul

    assert settled(dropless, "cpu", 4) == ("all_gather", "blocked")
    assert settled(dropless, "gpu", 4) == ("all_gather", "tiled")
    assert settled(dropless, "tpu", 2) == ("all_gather", "mosaic")
    assert settled(dropless, "tpu", 4) == ("ragged_all_to_all", "mosaic")
    assert settled(MoeConfig(exchange="all_to_all"), "tpu", 4) == ("all_to_all", "mosaic")
    for platform in ("cpu", "gpu", "tpu"):
        assert settled(capacity, platform, 4) == ("all_to_all", "einsum")


def test_a_cpu_has_no_ragged_all_to_all():
    with pytest.raises(ConfigError) as error:
        resolve_moe(MoeConfig(exchange="ragged_all_to_all"), "cpu", 4)
    assert str(error.value) == (
        "model.moe.exchange = 'ragged_all_to_all' does not run on a CPU; all_gather and all_to_all do"
    )


# Balancing.


def test_the_bias_evens_out_a_skewed_load():
    """Tokens that all lean one way crowd few experts, whatever a little training does; the bias spreads them."""
    way = "all_gather x blocked"
    given = inputs(WAYS[way])._replace(bias_E=np.zeros(E, np.float32), real_BT=np.ones((B, T), bool))
    lean_D = 0.5 * np.random.default_rng(0).normal(size=D).astype(np.float32)
    given = given._replace(x_BTD=given.x_BTD + lean_D)

    def max_over_mean(rate: float) -> float:
        """The worst of the last 20 updates."""
        moe = WAYS[way].moe
        assert moe is not None
        cfg = WAYS[way].model_copy(update={"moe": moe.model_copy(update={"balance_rate": rate})})
        ratios = []
        with jax.set_mesh(mesh_of()):
            params, balance, *batch = laid_out(WAYS[way], mesh_of(), given)
            for _ in range(60):
                _, routing, (gradient, _) = program(way, "one device")(params, balance, *batch)
                params = jax.tree.map(lambda p, g: p - 3e-5 * g, params, gradient)
                balance = rebalanced(nnx.State({"0": balance}), {"0": routing.load_LE[None]}, cfg)["0"]
                load_E = np.asarray(routing.load_LE)
                ratios.append(float(load_E.max() / load_E.mean()))
        return max(ratios[-20:])

    assert max_over_mean(0.0) > 2
    assert max_over_mean(0.006) < 1.3
