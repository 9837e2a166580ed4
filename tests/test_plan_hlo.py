"""What a plan reads in a compiled program: small programs whose collectives are known by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import Array, P
from jax.sharding import NamedSharding

from llm_jax.plan import hlo, traffic
from llm_jax.plan.arrays import largest_arrays
from llm_jax.plan.collectives import Collective, collectives, crossed, member_group
from tests.small import mesh_of

AXES = {"data": 2, "fsdp": 4, "tensor": 1, "context": 1, "expert": 1}
ONE_HOST = [0] * 8
TURNS = 5


def on(*axes: str | None) -> NamedSharding:
    return NamedSharding(mesh_of(data=2, fsdp=4), P(*axes))


def text_of(function, *shapes: tuple[tuple[int, ...], tuple[str | None, ...]]) -> str:
    """The optimised program of a function of float32 arrays with these shapes and places."""
    mesh = mesh_of(data=2, fsdp=4)
    with jax.set_mesh(mesh):
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on(*axes)) for shape, axes in shapes]
        text = jax.jit(function).lower(*inputs).compile().as_text()
    assert text is not None
    return text


def read(text: str, domains: list[int] = ONE_HOST) -> list[Collective]:
    return collectives(hlo.parse(text), AXES, domains)


@functools.cache
def sums_in_a_loop() -> str:
    """Five times the sum over fsdp of [8, 16] a device: 512 bytes each."""

    def local(x: Array) -> Array:
        def turn(x: Array, _: None) -> tuple[Array, None]:
            return jnp.sin(jax.lax.pcast(jax.lax.psum(x, "fsdp"), "fsdp", to="varying")), None

        return jax.lax.scan(turn, x, None, length=TURNS)[0]

    spec = P("data", "fsdp")
    return text_of(jax.shard_map(local, in_specs=spec, out_specs=spec), ((16, 64), ("data", "fsdp")))


def test_what_a_kernel_says_of_itself_ends_no_computation() -> None:
    """It goes over lines, of which one begins with braces; what comes after it in the loop's body counts."""
    text = sums_in_a_loop()
    said = 'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{}"\n}}, metadata={op_name="kernel"}'
    within = re.sub(r"(?m)^( +%?[\w.]+ = .*parameter\(0\).*)$", rf"\1, {said}".replace("\n", r"\n"), text)
    assert within.count("\n}}, metadata") > 3
    assert read(within) == read(text)


def test_a_loops_sums_count_as_often_as_it_turns() -> None:
    (one,) = read(sums_in_a_loop())
    assert (one.kind, one.axes, one.devices, one.runs) == ("all-reduce", ("fsdp",), 4, TURNS)
    assert one.payload == TURNS * 8 * 16 * 4
    assert one.sent == one.payload * 2 * 3 / 4
    assert hlo.unknown_loops(hlo.parse(sums_in_a_loop())) == []


def test_the_condition_tells_where_xla_does_not() -> None:
    text = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", sums_in_a_loop())
    assert "known_trip_count" not in text and text != sums_in_a_loop()
    # Some versions of XLA put the comparison into a fusion on a CPU; on a TPU it is plain.
    unfused = """
HloModule loop
%condition (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[] constant(7)
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p.1), index=1
  %sum = f32[4]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[4]{0}) tuple(%i.1, %sum)
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %first = s32[] constant(2)
  %start = (s32[], f32[4]{0}) tuple(%first, %a)
  %while = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[4]{0} get-tuple-element(%while), index=1
}
"""
    (one,) = read(unfused)
    assert (one.runs, one.axes) == (5, ("fsdp",))
    unknown = unfused.replace("direction=LT", "direction=NE")
    assert hlo.unknown_loops(hlo.parse(unknown)) == ["while"]
    assert read(unknown)[0].runs == 1


def test_planted_wrong_number_of_turns_is_seen() -> None:
    planted = sums_in_a_loop().replace(f'"known_trip_count":{{"n":"{TURNS}"}}', '"known_trip_count":{"n":"4"}')
    assert planted != sums_in_a_loop(), "this version of XLA says it otherwise"
    assert read(planted)[0].payload != TURNS * 8 * 16 * 4


def test_every_kind_is_found_with_its_bytes_and_axes() -> None:
    def local(x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
        gathered = jax.lax.all_gather(x, "data", tiled=True)
        scattered = jax.lax.psum_scatter(y, "fsdp", tiled=True)
        exchanged = jax.lax.all_to_all(y, "fsdp", 0, 1, tiled=True)
        moved = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        return gathered, scattered, exchanged, moved

    spec = P("data", "fsdp")
    outs = (P(None, "fsdp"), P(("data", "fsdp")), spec, spec)
    mapped = jax.shard_map(local, in_specs=(spec, P(None, None)), out_specs=outs, check_vma=False)
    found = {one.kind: one for one in read(text_of(mapped, ((16, 64), ("data", "fsdp")), ((8, 24), (None, None))))}
    assert found["all-gather"].axes == ("data",) and found["all-gather"].payload == 2 * 8 * 16 * 4
    assert found["all-gather"].sent == 8 * 16 * 4 and found["all-gather"].largest_gather == 2 * 8 * 16 * 4
    assert found["reduce-scatter"].axes == ("fsdp",) and found["reduce-scatter"].sent == 8 * 24 * 4 * 3 / 4
    assert found["all-to-all"].axes == ("fsdp",) and found["all-to-all"].payload == 8 * 24 * 4
    assert found["collective-permute"].axes == ("data",) and found["collective-permute"].sent == 8 * 16 * 4


def test_a_ragged_exchange_sends_what_the_smaller_side_has_room_for() -> None:
    text = """
HloModule step
ENTRY %main (a: f32[64,8], b: f32[16,8], o: s64[8]) -> f32[16,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[16,8]{1,0} parameter(1)
  %o = s64[8]{0} parameter(2)
  ROOT %back = f32[16,8]{1,0} ragged-all-to-all(%a, %b, %o, %o, %o, %o), replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""
    (one,) = read(text)
    assert (one.payload, one.sent) == (16 * 8 * 4, 16 * 8 * 4 * 3 / 4)


@pytest.mark.parametrize(
    ("written", "group", "axes"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", [0, 4], ("data",)),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3], ("fsdp",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4], ("data",)),
        ("replica_groups=[1,8]<=[8], dimensions={0}", list(range(8)), ("data", "fsdp")),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=1] {'fsdp'}", [0, 1, 2, 3], ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={1}", [0, 4], ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2], ("fsdp",)),
        ("replica_groups={}", list(range(8)), ("data", "fsdp")),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", [0, 1, 2, 3], ("fsdp",)),
        ("source_target_pairs={{0,0},{1,1}}", [], ()),
    ],
)
def test_groups_are_read_as_they_are_written(written: str, group: list[int], axes: tuple[str, ...]) -> None:
    found = member_group(f", channel_id=1, {written}, use_global_device_ids=true", 8)
    assert found == group
    assert not group or crossed(found, AXES) == axes


def test_arrays_inside_a_shard_map_are_a_devices_own() -> None:
    spec = P("data", "fsdp")
    mapped = jax.shard_map(lambda x: jnp.sin(x), in_specs=spec, out_specs=spec)
    with jax.set_mesh(mesh_of(data=2, fsdp=4)):
        traced = jax.jit(mapped).trace(jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=on("data", "fsdp")))
    assert [array.bytes for array in largest_arrays(traced.jaxpr.jaxpr, 3)] == [8 * 16 * 4]


def test_what_crosses_hosts_is_told_from_what_does_not() -> None:
    hosts = [0] * 4 + [1] * 4
    assert [one.slow for one in read(sums_in_a_loop(), hosts)] == [False]
    assert [one.slow for one in read(sums_in_a_loop(), [0, 0, 1, 1] * 2)] == [True]


ON_A_TPU = """
HloModule step
%all-reduce-scatter.1 (p.0: f32[64,8]) -> f32[16,8] {
  %p.0 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %sum = f32[64,8]{1,0:T(8,128)} all-reduce(%p.0), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[16,8]{1,0:T(8,128)} dynamic-slice(%sum, %zero), dynamic_slice_sizes={16,8}
}
%sliced (p.1: f32[32,64,8], p.2: s32[]) -> f32[64,8] {
  %p.1 = f32[32,64,8]{2,1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %slice = f32[1,64,8]{2,1,0} dynamic-slice(%p.1, %p.2), dynamic_slice_sizes={1,64,8}
  ROOT %layer = f32[64,8]{1,0} bitcast(%slice)
}
ENTRY %main (a: f32[32,64,8], i: s32[]) -> f32[16,8] {
  %a = f32[32,64,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %near = f32[64,8]{1,0:T(8,128)S(1)} fusion(%a, %i), kind=kLoop, calls=%sliced
  %copy-start = (f32[64,8]{1,0}, f32[64,8]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%near)
  %copy-done = f32[64,8]{1,0} copy-done(%copy-start)
  %gather-start = (f32[64,8]{1,0}, f32[256,8]{1,0}) all-gather-start(%copy-done), replica_groups={{0,1,2,3},{4,5,6,7}}
  %gather-done = f32[256,8]{1,0} all-gather-done(%gather-start)
  ROOT %out = f32[16,8]{1,0} fusion(%copy-done), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_tpus_reduce_scatter_and_started_gathers_are_read_as_such() -> None:
    found = {one.kind: one for one in read(ON_A_TPU)}
    assert set(found) == {"reduce-scatter", "all-gather"}
    assert found["reduce-scatter"].sent == 64 * 8 * 4 * 3 / 4
    assert found["all-gather"].payload == 256 * 8 * 4


def test_traffic_counts_the_slice_of_what_is_sliced_and_nothing_on_the_chip() -> None:
    layer = 64 * 8 * 4
    # The slice is read (its result stays on the chip), with an index of 4 bytes; written by the copy; read and written
    # by the gather's start; read again, and a quarter of it written.
    assert traffic.moved_bytes(hlo.parse(ON_A_TPU)) == (layer + 4) + layer + 2 * layer + (layer + layer // 4)


def test_the_largest_arrays_are_those_in_main_memory() -> None:
    (largest, *_) = traffic.largest_temporaries(hlo.parse(ON_A_TPU), 3)
    assert largest.bytes == 256 * 8 * 4 and largest.what.startswith("f32[256,8]")


def test_a_fusion_that_is_started_moves_what_the_fusion_does() -> None:
    """GPUs update parts of large arrays like that: neither the whole is moved, nor the part twice."""
    text = """
HloModule step
%update (p.0: f32[64,8], p.1: f32[1,8], p.2: s32[]) -> f32[64,8] {
  %p.0 = f32[64,8]{1,0} parameter(0)
  %p.1 = f32[1,8]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  ROOT %out = f32[64,8]{1,0} dynamic-update-slice(%p.0, %p.1, %p.2, %p.2)
}
ENTRY %main (a: f32[64,8], b: f32[1,8], i: s32[]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %start = ((f32[64,8]{1,0}, f32[1,8]{1,0}, s32[]), f32[64,8]{1,0}, u32[]) fusion-start(%a, %b, %i), calls=%update
  ROOT %done = f32[64,8]{1,0} fusion-done(%start)
}
"""
    assert traffic.moved_bytes(hlo.parse(text)) == 2 * 8 * 4 + 4


def test_a_slice_that_is_started_moves_the_slice_and_a_call_that_is_started_what_it_does() -> None:
    """TPUs fetch parts of large arrays like that, and name arrays by calls that do nothing."""
    text = """
HloModule step
%part (p.0: f32[64,8], p.1: s32[4]) -> f32[4,8] {
  %p.0 = f32[64,8]{1,0} parameter(0)
  %p.1 = s32[4]{0} parameter(1)
  ROOT %out = f32[4,8]{1,0} gather(%p.0, %p.1)
}
ENTRY %main (a: f32[64,8], i: s32[4]) -> f32[4,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %near-start = ((f32[64,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:8]}
  %near = f32[2,8]{1,0:S(1)} slice-done(%near-start)
  %on-the-chip = f32[1,8]{1,0} slice(%near), slice={[0:1], [0:8]}
  %room = f32[512,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = ((f32[64,8]{1,0}, s32[4]{0}), f32[4,8]{1,0}, u32[]) call-start(%a, %i), to_apply=%part
  ROOT %done = f32[4,8]{1,0} call-done(%start)
}
"""
    row = 8 * 4
    assert traffic.moved_bytes(hlo.parse(text)) == 2 * row + row + 2 * 4 * row
