"""What a step communicates, counted in the compiled program; and that it is compiled once and moves nothing else."""

import collections
import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, P
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding

from llm_jax.mesh import acts, gathered
from llm_jax.model import layers
from llm_jax.model.config import ModelConfig
from llm_jax.model.paths import placed
from llm_jax.model.weights import Weight, after, stored
from llm_jax.objective.config import CausalConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.train.state import TrainState, abstract_state, init_state
from llm_jax.train.step import make_step
from tests.small import CFG, SETTINGS, B, U, mesh_of, put, ragged_rows, slowly

OPTIM = AdamWConfig()
Step = Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]
REMATERIALISES = "Involuntary full rematerialization"


def step_function() -> Step:
    return make_step(CFG, CausalConfig(z_loss=1e-3), OPTIM, **SETTINGS, steps=10)


def compile_anew(lowered: jax.stages.Lowered) -> str:
    """The optimised program, compiled anew: what comes from a cache has nothing to say on stderr."""
    jax.config.update("jax_enable_compilation_cache", False)
    # Whether there is a cache is decided once, until it is reset.
    compilation_cache.reset_cache()
    try:
        return text_of(lowered)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def text_of(lowered: jax.stages.Lowered) -> str:
    """The optimised program."""
    text = lowered.compile().as_text()
    assert text is not None
    return text


def compiled_step(mesh: dict[str, int], compiled: Callable[[jax.stages.Lowered], str]) -> str:
    devices = mesh_of(**mesh)
    with jax.set_mesh(devices):
        state = placed(abstract_state(CFG, OPTIM), devices)
        rows_ABU = jax.ShapeDtypeStruct((1, B, U), jnp.int32, sharding=NamedSharding(devices, acts("ABU")))
        return compiled(jax.jit(step_function(), donate_argnums=0).lower(state, rows_ABU))


def collectives(program: str) -> dict[str, int]:
    """How many of each kind stand in a program; those that sum over one device are none."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
    found = re.findall(rf" ({kinds})(?:-start)?\((.*)", program)
    return dict(collections.Counter(kind for kind, rest in found if not re.search(r"replica_groups=\{\{\d+\}", rest)))


# All-gathers: the layers' seven matrices over fsdp, forward and backward, and two tables; over context segments, and
# keys and values forward and backward.
# Reduce-scatters: the gradients of what is gathered over fsdp.
# All-reduces, most of them combined ones: at most so many, since newer versions of XLA combine more.
MESHES = {
    "data 8": ({"data": 8}, 0, 0, 4),
    "fsdp 8": ({"fsdp": 8}, 16, 9, 5),
    "tensor 4 x fsdp 2": ({"tensor": 4, "fsdp": 2}, 16, 9, 17),
    "context 2 x fsdp 2 x tensor 2": ({"context": 2, "fsdp": 2, "tensor": 2}, 21, 9, 23),
    "data 2 x expert 2 x tensor 2": ({"data": 2, "expert": 2, "tensor": 2}, 0, 0, 15),
}


def unexpected(name: str, compiled: Callable[[jax.stages.Lowered], str] = text_of) -> list[str]:
    """What a mesh's program communicates beyond what is written down."""
    mesh, gathers, scatters, reduces = MESHES[name]
    expected = {"all-gather": gathers, "reduce-scatter": scatters}
    counts = {"all-reduce": 0} | dict.fromkeys(expected, 0) | collectives(compiled_step(mesh, compiled))
    told = [f"{n} {kind}" for kind, n in counts.items() if kind != "all-reduce" and n != expected.get(kind, 0)]
    return told + ([f"{counts['all-reduce']} all-reduce"] if counts["all-reduce"] > reduces else [])


@pytest.mark.parametrize("name", [slowly("data 8"), slowly("fsdp 8"), "data 2 x expert 2 x tensor 2"])
def test_a_step_communicates_what_is_written_down(name):
    assert unexpected(name) == []


@pytest.mark.parametrize("name", [slowly("tensor 4 x fsdp 2"), "context 2 x fsdp 2 x tensor 2"])
def test_a_step_communicates_what_is_written_down_and_replicates_nothing(name, capfd):
    assert unexpected(name, compile_anew) == []
    assert REMATERIALISES not in capfd.readouterr().err


def test_planted_merge_of_two_sharded_axes_is_seen(monkeypatch):
    def merged(equation: str, x: Array, weight: Array, out_sharding: P | None = None) -> Array:
        flat = jnp.einsum(
            equation.replace("BT", "N"),
            x.reshape(-1, *x.shape[2:]),
            jax.reshard(weight, gathered(equation.split("->")[0].split(",")[1])),
            out_sharding=None if out_sharding is None else P(("fsdp", "context"), *out_sharding[2:]),
        )
        right = P(*jax.typeof(x).sharding.spec[:2], *jax.typeof(flat).sharding.spec[1:])
        return jax.reshard(flat.reshape(*x.shape[:2], *flat.shape[1:]), right)

    monkeypatch.setattr(layers, "project", merged)
    assert [told for told in unexpected("context 2 x fsdp 2 x tensor 2") if "all-to-all" in told]


@pytest.mark.slow
def test_planted_gather_of_weights_over_tensor_is_seen(monkeypatch):
    def whole_and_back(weight: Weight, cfg: ModelConfig) -> Array:
        value = stored(weight, cfg)
        return jax.reshard(jax.reshard(value, P(*[None] * value.ndim)), jax.typeof(value).sharding)

    monkeypatch.setattr(layers, "stored", whole_and_back)
    assert unexpected("tensor 4 x fsdp 2") != []


def test_what_comes_after_is_the_same_and_waits_on_cpus_alone():
    """XLA must not see that what it waits for is a zero; NaN, and infinity, in what it waits for is no matter."""
    value_D, done_D = np.arange(8, dtype=np.float32) - 3, np.array([np.nan, np.inf] * 4, np.float32)
    with jax.set_mesh(mesh_of(fsdp=8)):
        spec = P("fsdp")
        waiting = jax.jit(jax.shard_map(after, in_specs=(spec, spec), out_specs=spec, check_vma=False))
        both = tuple(jax.device_put(a, spec) for a in (value_D, done_D))
        np.testing.assert_array_equal(waiting(*both), value_D)
        _, entry = waiting.lower(*both).compile().as_text().split("ENTRY")
        name = re.search(r"(%\S+) = \S+ parameter\(1\)", entry)[1]
        assert re.search(rf"\({re.escape(name)}\b|, {re.escape(name)}\b", entry)
        for platform, waits in (("cpu", True), ("tpu", False), ("cuda", False)):
            lowered = waiting.trace(*both).lower(lowering_platforms=(platform,)).as_text()
            assert ("stablehlo.add" in lowered) == waits


def test_xla_tells_of_a_replicated_tensor_where_it_is_looked_for(capfd):
    """The message that the test above finds nothing of, from a program that is known to cause it."""
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def on(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, P(*axes))

    table = jax.ShapeDtypeStruct((256, 64), jnp.float32, sharding=on("tensor", "fsdp"))
    ids = jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=on("fsdp", "context"))
    look_up = jax.jit(lambda table, ids: jnp.take(table, ids, axis=0), out_shardings=on("fsdp", "context", None))
    compile_anew(look_up.lower(table, ids))
    assert REMATERIALISES in capfd.readouterr().err


def programs_compiled(wrap: Callable[[Step], Step], mesh: dict[str, int], donate: tuple[int, ...] = (0,)) -> int:
    """How many programs three updates need, each from the state before, with nothing moved between host and devices."""
    devices = mesh_of(**mesh)
    with jax.set_mesh(devices):
        state = jax.jit(lambda: init_state(CFG, OPTIM, 0))()
        batches = [put(ragged_rows(seed)[None], "ABU", devices) for seed in range(3)]
        step = jax.jit(wrap(step_function()), donate_argnums=donate)
        with jax.transfer_guard("disallow"):
            for rows_ABU in batches:
                state, _ = step(state, rows_ABU)
        assert int(state.step) == 3
    return step._cache_size()  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]


@pytest.mark.parametrize("name", [slowly("fsdp 8"), "data 2 x expert 2 x tensor 2"])
def test_a_step_is_compiled_once_and_moves_nothing_between_host_and_devices(name):
    assert programs_compiled(lambda step: step, MESHES[name][0]) == 1


@pytest.mark.slow
def test_planted_change_of_the_states_sharding_is_compiled_twice():
    def drifting(step: Step) -> Step:
        def drift(state: TrainState, rows_ABU: Array) -> tuple[TrainState, dict[str, Array]]:
            state, metrics = step(state, rows_ABU)
            whole = jax.tree.map(lambda x: jax.reshard(x, P(*[None] * x.ndim)), state.opt_state)
            return dataclasses.replace(state, opt_state=whole), metrics

        return drift

    assert programs_compiled(drifting, {"fsdp": 8}, donate=()) == 2


def test_planted_batch_from_the_host_is_refused():
    devices = mesh_of()
    with jax.set_mesh(devices), jax.transfer_guard("disallow"):
        rows = np.zeros((1, B, U), np.int32)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jax.jit(lambda rows: rows + rows)(rows)
