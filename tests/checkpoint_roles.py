"""The processes that tests of checkpoints and run directories start: `python -m tests.checkpoint_roles ROLE ...`."""

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import Mesh, NamedSharding

from llm_jax import alphabet, manifest, processes
from llm_jax.checkpoint import CheckpointError, Checkpoints
from llm_jax.exit_codes import Failure
from llm_jax.mesh import make_mesh
from llm_jax.run_directory import Refused, agree_on_directory, sole_trainer

BIG = 1 << 20  # elements of the one array that takes a while to write


def restore_newest(checkpoints: Checkpoints, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """Number, arrays and record of the newest intact checkpoint."""
    step = checkpoints.newest_intact()
    return None if step is None else (step, checkpoints.restore(step, abstract), checkpoints.meta(step))


def values(step: int) -> dict[str, Any]:
    """A training state of numpy arrays, another one for each step."""
    rng = np.random.default_rng(step)
    w, b = rng.standard_normal((64, 32), np.float32), rng.standard_normal(8, np.float32).astype(jnp.bfloat16)
    moments = rng.standard_normal((BIG // 64, 64), np.float32)
    return {"params": {"w": w, "b": b}, "opt_state": moments, "step": np.int32(step)}


def shardings(mesh: Mesh) -> dict[str, Any]:
    """w is copied over data and divided over fsdp, the optimizer's state is divided over all devices."""
    whole = NamedSharding(mesh, P())
    params = {"w": NamedSharding(mesh, P("fsdp")), "b": whole}
    return {"params": params, "opt_state": NamedSharding(mesh, P(("data", "fsdp"))), "step": whole}


def sharded(tree: Any, mesh: Mesh) -> Any:
    def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index], dtype=x.dtype)

    return jax.tree.map(place, tree, shardings(mesh))


def abstract(tree: Any, mesh: Mesh) -> Any:
    def describe(x: np.ndarray, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(describe, tree, shardings(mesh))


def assert_bitwise(tree: Any, expected: Any) -> None:
    """Every shard that this process holds has the expected bits."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == wanted.dtype
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == wanted[shard.index].tobytes()


def mesh_of(**sizes: int) -> Mesh:
    return make_mesh({axis: sizes.get(axis, 1) for axis in alphabet.MESH_AXES})


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow beyond 64 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def told(raises: type[Exception], act: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(raises) as error:
        act(*args, **kwargs)
    return str(error.value)


def refuse(said: list[str]) -> str:
    raise Refused(f"no, since {said}")


def one_of_two(run_dir: Path) -> dict[str, Any]:
    """One of two processes that restore what one process saved, save, fail and go on together; what it saw."""
    index, mesh, seen = jax.process_index(), mesh_of(data=2, fsdp=4), {}
    agree_on_directory(run_dir)
    seen["elsewhere"] = told(Refused, agree_on_directory, run_dir / str(index), patience_s=0.5)
    seen["nowhere"] = told(Failure, agree_on_directory, run_dir / "none")
    with pytest.raises(Failure) as held, sole_trainer(run_dir / "held"):
        pass
    seen["held"] = str(held.value)
    mistaken = IndexError if index == 0 else RuntimeError
    seen["defect"] = told(mistaken, processes.settle, "defect", "", lambda said: [][1])
    with pytest.raises(Failure) as failure:
        processes.settle("failure", "", refuse)
    seen["failure"] = (str(failure.value), failure.value.exit_code)
    with sole_trainer(run_dir):
        checkpoints = Checkpoints(run_dir / "checkpoints", keep=4)
        seen["steps"] = checkpoints.steps()
        newest = restore_newest(checkpoints, abstract(values(1), mesh))
        assert newest is not None and newest[0] == 1
        assert_bitwise(newest[1], values(1))
        checkpoints.save(2, sharded(values(2), mesh), {"by": 2})
        checkpoints.save(3, sharded(values(3), mesh), {"by": 2}, wait=True)
        # Process 1 alone has no room: both fail, and soon.
        with full_disk() if index == 1 else contextlib.nullcontext():
            begin = time.monotonic()
            checkpoints.save(4, sharded(values(4), mesh), {})
            seen["full"] = told(CheckpointError, checkpoints.wait)
            seen["full_s"] = time.monotonic() - begin
        # Both look at different files: what either finds damaged is damaged for both.
        sizes = manifest.file_sizes(run_dir / "checkpoints" / "3")
        shares = [manifest.share(sizes, process, 2) for process in range(2)]
        assert all(shares)
        for owner, step in ((0, 3), (1, 2)):
            if index == 0:
                flip_first_bit(run_dir / "checkpoints" / str(step), owner)
            processes.settle("flipped", "", lambda _: "")
            seen[f"damage {step}"] = told(CheckpointError, checkpoints.restore, step, abstract(values(step), mesh))
        seen["newest"] = checkpoints.newest_intact()
        seen["taken"] = told(CheckpointError, checkpoints.save, 1, sharded(values(1), mesh), {})
        checkpoints.save(2, sharded(values(2), mesh), {"by": 2}, wait=True)
        seen["saved"] = checkpoints.newest_intact()
        checkpoints.close()
    return seen


def flip_first_bit(folder: Path, owner: int) -> None:
    """Damages a file that is for process owner of two to verify."""
    path = folder / manifest.share(manifest.file_sizes(folder), owner, 2)[0]
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def save_on_and_on(directory: Path) -> None:
    """Goes on from the newest checkpoint, with one save after the other, until it is killed."""
    checkpoints, mesh = Checkpoints(directory, keep=2), mesh_of()
    step = (checkpoints.newest_intact() or 0) + 1
    while True:
        checkpoints.save(step, sharded(values(step), mesh), {})
        print(step, flush=True)
        step += 1


def hold_the_lock(run_dir: Path, with_child: bool) -> None:
    """Holds the lock until it is killed; a child of it may live on."""
    with sole_trainer(run_dir):
        child = os.fork() if with_child else os.getpid()
        if child:
            print(child, flush=True)
        time.sleep(600)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["one_of_two", run_dir]:
            where = os.environ["JAX_COORDINATOR_ADDRESS"]
            jax.distributed.initialize(where, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"]))
            try:
                print(json.dumps(one_of_two(Path(run_dir))), flush=True)
            except BaseException:  # noqa: BLE001 - it is printed, and ends the process
                traceback.print_exc()
                os._exit(1)  # else the other one waits for it
        case ["save_on_and_on", directory]:
            save_on_and_on(Path(directory))
        case ["hold_the_lock", run_dir, with_child]:
            hold_the_lock(Path(run_dir), with_child == "1")
