"""Meshes over slices that only a slow network joins: data crosses it, then fsdp, and the losses do not know."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from llm_jax.alphabet import MESH_AXES, over_slices
from llm_jax.config import ConfigError
from llm_jax.mesh import across, make_mesh, parts_over, slices_of, told_slices
from tests.conftest import LaunchProcesses, Start
from tests.training import assert_close, train

WITHIN = ("tensor", "context", "expert")


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as says where it is."""

    id: int
    process_index: int
    slice_index: int = 0


def sizes_of(**sizes: int) -> dict[str, int]:
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def job(slices: int, processes: int, devices: int) -> list[Device]:
    """The devices of `slices` slices of so many processes each, in an order that is nobody's."""
    found = [
        Device(id=(s * processes + p) * devices + d, process_index=s * processes + p, slice_index=s)
        for d in range(devices)
        for p in range(processes)
        for s in range(slices)
    ]
    return found[1:] + found[:1]


def arranged(devices: list[Device], sizes: dict[str, int], slices: int | None) -> np.ndarray:
    """What make_mesh does, with each slice's devices in the order in which they come: slice numbers by mesh axes."""
    groups = slices_of(devices, slices)
    parts = parts_over(groups, sizes)
    within = [sizes[axis] // parts[axis] for axis in MESH_AXES]
    number = {device: k for k, group in enumerate(groups) for device in group}
    blocks = np.empty((len(groups), *within), object)
    for k, group in enumerate(groups):
        blocks[k].flat[:] = group
    return np.vectorize(number.__getitem__)(across(blocks, parts))


def lines_along(slice_of: np.ndarray, axis: str) -> np.ndarray:
    """[line, devices of the line] along one mesh axis."""
    moved = np.moveaxis(slice_of, MESH_AXES.index(axis), -1)
    return moved.reshape(-1, moved.shape[-1])


@pytest.mark.parametrize(
    ("slices", "sizes", "parts"),
    [
        (2, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2}),
        (2, {"data": 1, "fsdp": 4, "context": 2}, {"fsdp": 2}),
        (4, {"data": 2, "fsdp": 4, "expert": 4}, {"data": 2, "fsdp": 2}),
        # The plain order of the same devices would split lines of fsdp unevenly, or one slice over two rows of data.
        (4, {"data": 6, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}),
        (2, {"data": 3, "fsdp": 2, "tensor": 2}, {"fsdp": 2}),
        (6, {"data": 4, "fsdp": 9}, {"data": 2, "fsdp": 3}),
    ],
)
def test_only_data_and_then_fsdp_cross(slices: int, sizes: dict[str, int], parts: dict[str, int]) -> None:
    sizes = sizes_of(**sizes)
    slice_of = arranged(job(slices, 1, math.prod(sizes.values()) // slices), sizes, None)
    assert slice_of.shape == tuple(sizes.values())
    assert over_slices(sizes, slices) == sizes_of(**parts)
    for axis in WITHIN:
        assert all(len(set(line)) == 1 for line in lines_along(slice_of, axis).tolist()), axis
    for axis in ("data", "fsdp"):
        for line in lines_along(slice_of, axis).tolist():
            # A line goes through so many slices, through each once and for as long: few messages cross, and large ones.
            runs = [k for k, (a, b) in enumerate(zip([None, *line], line, strict=False)) if a != b]
            assert len(set(line)) == len(runs) == parts.get(axis, 1), (axis, line)
    assert np.unique(slice_of, return_counts=True)[1].tolist() == [slice_of.size // slices] * slices


def test_a_plain_order_is_seen() -> None:
    """The comparison above can fail."""
    devices = sorted(job(2, 1, 6), key=lambda device: device.id)
    plain = np.array([device.slice_index for device in devices]).reshape(
        tuple(sizes_of(data=3, fsdp=2, tensor=2).values())
    )
    assert any(len(set(line)) > 1 for line in lines_along(plain, "data").tolist())
    assert all(len(set(line)) == 1 for line in lines_along(plain, "fsdp")[:1].tolist())


def test_processes_are_slices_where_devices_say_nothing() -> None:
    devices = [dataclasses.replace(device, slice_index=0) for device in job(1, 4, 2)]
    assert len(slices_of(devices, None)) == len(slices_of(devices, 1)) == 1
    groups = slices_of(devices, 2)
    assert [sorted({device.process_index for device in group}) for group in groups] == [[0, 1], [2, 3]]
    # Two real slices asked to be four: none of the four lies on both.
    for group in slices_of(job(2, 2, 2), 4):
        assert len({device.slice_index for device in group}) == 1


@pytest.mark.parametrize(
    ("devices", "sizes", "slices", "message"),
    [
        (job(1, 4, 2), {"fsdp": 8}, 3, "mesh.slices = 3: 4 processes do not divide into so many groups of equal size"),
        (
            job(1, 1, 8),
            {"fsdp": 8},
            2,
            "mesh.slices = 2: one process does not divide into so many groups of equal size",
        ),
        (
            job(1, 2, 4),
            {"data": 1, "tensor": 8},
            2,
            "mesh.slices = 2: mesh.data = 1 and mesh.fsdp = 1 cannot be divided over so many; the network between "
            "slices is too slow for the other axes",
        ),
        (
            job(1, 2, 2) + [Device(9, 1), Device(10, 1)],
            {"fsdp": 6},
            2,
            "mesh.slices = 2: they have 2, 4 devices, and must have equally many",
        ),
    ],
)
def test_a_number_that_does_not_fit_is_refused(
    devices: list[Device], sizes: dict[str, int], slices: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        make_mesh(sizes_of(**sizes), devices, slices=slices)
    assert str(error.value) == message


def test_one_process_has_no_slices() -> None:
    mesh = make_mesh(sizes_of(data=2, fsdp=4))
    assert told_slices(mesh, None) == told_slices(mesh, 1) == ""
    assert mesh == make_mesh(sizes_of(data=2, fsdp=4), slices=1)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_tpu_slices(monkeypatch: pytest.MonkeyPatch, topology: str) -> None:
    """Devices of two real TPU slices, as the TPU compiler describes them; a slice's torus is arranged by JAX."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=2).devices
    n = len(devices)

    def slice_of(mesh: Mesh) -> np.ndarray:
        return np.vectorize(lambda device: device.slice_index)(mesh.devices)

    crossed = make_mesh(sizes_of(data=2, fsdp=2, tensor=n // 4), devices)
    assert told_slices(crossed, None) == ", 2 slices joined by data 2"
    assert (slice_of(crossed) == np.arange(2).reshape(2, 1, 1, 1, 1)).all()
    crossed = make_mesh(sizes_of(fsdp=4, context=2, expert=n // 8), devices)
    assert told_slices(crossed, None) == ", 2 slices joined by fsdp 2"
    assert (slice_of(crossed) == np.arange(4).reshape(1, 4, 1, 1, 1) // 2).all()
    plain = make_mesh(sizes_of(tensor=n), devices)
    assert told_slices(plain, None) == ", in plain order: data and fsdp cannot be divided over the 2 slices"
    assert sorted(slice_of(plain).flat) == [0] * (n // 2) + [1] * (n // 2)
    with pytest.raises(ConfigError, match=r"mesh\.slices = 2: mesh\.data = 1 and mesh\.fsdp = 1 cannot be divided"):
        make_mesh(sizes_of(tensor=n), devices, slices=2)
    assert make_mesh(sizes_of(tensor=n), devices, slices=1) == plain


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("mesh.data=2", "mesh.fsdp=2"), ("mesh.data=1", "mesh.fsdp=4")])
def test_losses_do_not_know(
    launch_processes: LaunchProcesses, start: Start, tmp_path: Path, mesh: tuple[str, str]
) -> None:
    """2 processes of 2 devices, a process being a slice, against 1 of 4."""
    two, one = tmp_path / "two", tmp_path / "one"
    results = launch_processes(2, 2, train(two, *mesh, "mesh.slices=2", "train.steps=8"))
    for result in results:
        assert result.returncode == 0, result.stdout + result.stderr
    assert ", 2 slices joined by " + ("data 2" if mesh[0] == "mesh.data=2" else "fsdp 2") in results[0].stdout
    done = start(*train(one, *mesh, "train.steps=8"), devices=4).wait()
    assert done.returncode == 0, done.stderr
    assert_close(two, one, 1e-6)
