"""What is saved comes back bit for bit, on any mesh; what is damaged, unfinished or of another shape never does."""

import contextlib
import random
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from jax import P
from jax.sharding import Mesh, NamedSharding

from llm_jax import alphabet, manifest
from llm_jax.checkpoint import RECORD, STATE, CheckpointError, Checkpoints
from llm_jax.mesh import make_mesh
from tests.checkpoint_roles import restore_newest
from tests.conftest import Start
from tests.small import slowly


def mesh_of(**sizes: int) -> Mesh:
    return make_mesh({axis: sizes.get(axis, 1) for axis in alphabet.MESH_AXES})


def values(step: int) -> dict[str, Any]:
    """A small training state of numpy arrays, another one for each step."""
    rng = np.random.default_rng(step)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    params = {"embed": weight(64, 8).astype(jnp.bfloat16), "layers": {str(i): {"q": weight(16, 8)} for i in range(2)}}
    moments = {name: {"embed": weight(64, 8), "layers": {"0": {"q": weight(16, 8)}}} for name in ("mu", "nu")}
    return {"params": params, "opt_state": moments, "step": np.int32(step)}


def sharded(tree: Any, mesh: Mesh) -> Any:
    """The tree as jax.Arrays, matrices divided over fsdp."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("fsdp") if x.ndim else P())), tree)


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_bitwise(tree: Any, expected: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == wanted.dtype
        assert np.asarray(leaf).tobytes() == wanted.tobytes()


@contextlib.contextmanager
def opened(directory: Path, keep: int = 3, read_only: bool = False) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(directory, keep=keep, read_only=read_only)
    yield checkpoints
    checkpoints.close()


def save_steps(directory: Path, steps: list[int], mesh: Mesh, keep: int = 3) -> None:
    with opened(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, sharded(values(step), mesh), {"loss": step / 3})


@pytest.fixture(scope="module")
def fsdp() -> Mesh:
    return mesh_of(fsdp=8)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory, fsdp: Mesh) -> Path:
    """A directory with checkpoints 1 and 2, never to be changed."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    save_steps(directory, [1, 2], fsdp)
    return directory


@pytest.fixture
def two(two_saved: Path, tmp_path: Path) -> Path:
    """A directory with checkpoints 1 and 2, to do with as one likes."""
    return Path(shutil.copytree(two_saved, tmp_path / "checkpoints"))


def test_round_trip_is_bitwise_and_keeps_types(two_saved: Path, fsdp: Mesh) -> None:
    wanted = sharded(values(2), fsdp)
    with opened(two_saved, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        newest = restore_newest(checkpoints, abstract(wanted))
        assert newest is not None
        step, tree, meta = newest
        assert (step, meta) == (2, {"loss": 2 / 3})
        assert_bitwise(tree, values(2))
        assert_bitwise(checkpoints.restore(1, abstract(wanted)), values(1))
        assert jax.tree.map(jax.typeof, tree) == jax.tree.map(jax.typeof, wanted)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 4}, {"data": 8}], ids=str)
def test_restores_onto_another_mesh(two_saved: Path, sizes: dict[str, int]) -> None:
    wanted = abstract(sharded(values(2), mesh_of(**sizes)))
    with opened(two_saved, read_only=True) as checkpoints:
        tree = checkpoints.restore(2, wanted)
    assert_bitwise(tree, values(2))
    assert jax.tree.map(lambda x: x.sharding, tree) == jax.tree.map(lambda x: x.sharding, wanted)


def test_eval_shape_is_enough_and_the_step_compiles_once(tmp_path: Path) -> None:
    with jax.set_mesh(mesh_of(data=2, fsdp=4)):

        def init() -> dict[str, Any]:
            return {"w": jnp.ones((16, 8), out_sharding=P("fsdp", None)), "moments": (jnp.zeros(3), jnp.int32(7))}

        step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree))
        state = step(jax.jit(init)())
        with opened(tmp_path) as checkpoints:
            checkpoints.save(1, state, {})
            restored = checkpoints.restore(1, jax.eval_shape(init))
        assert_bitwise(restored, jax.tree.map(np.asarray, state))
        step(restored)
        assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue] - jitted functions have it


def bytes_read() -> int:
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metrics[0]["values"][0]["value"]


def test_part_of_a_checkpoint_is_restored_without_reading_the_rest(tmp_path: Path, fsdp: Mesh) -> None:
    rng = np.random.default_rng(0)
    tree = {
        "params": {"w": rng.standard_normal((512, 64), np.float32)},
        "opt_state": {"mu": rng.standard_normal((4096, 64), np.float32)},
    }
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, sharded(tree, fsdp), {}, wait=True)
        before = bytes_read()
        restored = checkpoints.restore(1, {"params": abstract(sharded(tree["params"], fsdp))})
        assert bytes_read() - before < 2 * tree["params"]["w"].nbytes < tree["opt_state"]["mu"].nbytes
    assert_bitwise(restored, {"params": tree["params"]})


def test_plain_orbax_reads_the_arrays(two_saved: Path) -> None:
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), values(2))
    tree = ocp.PyTreeCheckpointer().restore(two_saved / "2" / STATE, restore_args=restore_args)
    assert_bitwise(tree["params"], values(2)["params"])


def test_what_does_not_fit_is_told_and_never_cast(two_saved: Path, fsdp: Mesh) -> None:
    tree = values(2)
    tree["params"]["embed"] = tree["params"]["embed"].astype(np.float32)
    tree["params"]["layers"]["0"]["q"] = np.zeros((16, 16), np.float32)
    tree["params"]["layers"]["2"] = tree["params"]["layers"].pop("1")
    with opened(two_saved, read_only=True) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(2, {"params": abstract(sharded(tree["params"], fsdp))})
    assert error.value.exit_code == 74
    assert str(error.value).splitlines() == [
        f"checkpoint {two_saved / '2'} does not fit:",
        "  params/embed: float32[64,8] is wanted, and the checkpoint has bfloat16[64,8]",
        "  params/layers/0/q: float32[16,16] is wanted, and the checkpoint has float32[16,8]",
        "  params/layers/1/q: float32[16,8] is in the checkpoint, and is not wanted",
        "  params/layers/2/q: float32[16,8] is wanted, and is not in the checkpoint",
    ]


def test_donating_right_after_save_is_safe(tmp_path: Path, fsdp: Mesh) -> None:
    """The step overwrites what is being saved while it is being written."""
    grow = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    for mesh in (fsdp, mesh_of(), mesh_of(data=2)):
        before = {str(i): np.random.default_rng(i).standard_normal((1024, 512), np.float32) for i in range(8)}
        tree = jax.block_until_ready(grow(sharded(before, mesh)))
        expected = jax.tree.map(lambda x: np.array(x, copy=True), tree)
        directory = tmp_path / str(mesh.size)
        with opened(directory) as checkpoints:
            checkpoints.save(1, tree, {})
            saving = checkpoints._pending
            donated = grow(tree)
            after = grow(donated)
            jax.block_until_ready(after)
            assert saving is not None and not saving.done(), "written before the step ran: this test needs more data"
            assert all(x.is_deleted() for x in jax.tree.leaves(donated))
            restored = checkpoints.restore(1, abstract(after))
        assert_bitwise(restored, expected)


def test_the_newest_are_kept_and_the_incomplete_do_not_count(tmp_path: Path, fsdp: Mesh) -> None:
    save_steps(tmp_path, [1, 2, 3], fsdp)
    (tmp_path / "2" / manifest.NAME).unlink()
    save_steps(tmp_path, [10], fsdp, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "2", "3"]


def test_a_number_is_saved_once(two: Path, fsdp: Mesh) -> None:
    with opened(two) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(2, sharded(values(3), fsdp), {})
        assert str(error.value) == f"checkpoint 2 cannot be saved in {two}: {two / '2'}: exists already"
        assert_bitwise(checkpoints.restore(2, abstract(sharded(values(2), fsdp))), values(2))


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, slowly(truncate), slowly(remove)], ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_noticed_and_the_one_before_used(
    damage: Callable[[Path, random.Random], None], two_saved: Path, tmp_path: Path, fsdp: Mesh, capsys: Any
) -> None:
    files = [path.relative_to(two_saved) for path in sorted(two_saved.glob("2/**/*")) if path.is_file()]
    assert {f"2/{manifest.NAME}", f"2/{RECORD}", "2/state/_METADATA", "2/state/manifest.ocdbt"} <= set(map(str, files))
    wanted = abstract(sharded(values(1), fsdp))
    for number, file in enumerate(files):
        directory = Path(shutil.copytree(two_saved, tmp_path / str(number)))
        damage(directory / file, random.Random(number))
        with opened(directory, read_only=True) as reader:
            with pytest.raises(CheckpointError, match=re.escape(f"checkpoint {directory / '2'} cannot be used: ")):
                reader.restore(2, wanted)
            assert reader.newest_intact() == 1
            assert "is damaged" in capsys.readouterr().err
            assert reader.steps() == [1, 2]
        with opened(directory) as checkpoints:
            newest = restore_newest(checkpoints, wanted)
            assert newest is not None and newest[0] == 1
            assert_bitwise(newest[1], values(1))
            told = capsys.readouterr().err.splitlines()
            assert len(told) == 1
            assert told[0].startswith(f"checkpoint {directory / '2'} is damaged (")
            assert told[0].endswith(f"); moved to {directory / 'damaged-2'}, the one before is used")
            assert checkpoints.steps() == [1]
            checkpoints.save(2, sharded(values(2), fsdp), {}, wait=True)
            assert checkpoints.newest_intact() == 2


def test_every_bit_of_a_manifest_counts() -> None:
    written = manifest.Manifest(2, {RECORD: 10, "state/d/é": 0}, {RECORD: "0a" * 32, "state/d/é": "f1" * 32})
    data = manifest.encode(written)
    assert manifest.decode(data) == written
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(manifest.Damaged):
            manifest.decode(bytes(flipped))


def test_files_are_shared_out_whole_and_evenly() -> None:
    sizes = {str(i): size for i, size in enumerate([70, 10, 30, 0, 40, 0, 20])}
    shares = [manifest.share(sizes, index, 3) for index in range(3)]
    assert sorted(path for share in shares for path in share) == sorted(sizes)
    assert [sum(sizes[path] for path in share) for share in shares] == [70, 50, 50]


def test_a_foreign_file_and_a_renamed_folder_are_damage(two: Path) -> None:
    with opened(two, read_only=True) as checkpoints:
        (two / "2" / "notes.txt").write_text("mine")
        assert checkpoints._damage(2) == "notes.txt does not belong to it"
        (two / "1").rename(two / "3")
        assert checkpoints._damage(3) == "it is checkpoint 1"


def test_without_the_manifest_a_flipped_bit_is_another_weight(
    tmp_path: Path, fsdp: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the manifest is for: with its check taken out, the damage of the tests above is restored without a word."""
    tree = {"w": np.random.default_rng(0).integers(0, 2**32, (1024, 512), np.uint32)}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, sharded(tree, fsdp), {}, wait=True)
        flip(max(tmp_path.glob("1/state/**/d/*"), key=lambda path: path.stat().st_size), random.Random(0))
        with monkeypatch.context() as planted:
            planted.setattr(manifest, "findings", lambda *_: [])
            restored = checkpoints.restore(1, abstract(sharded(tree, fsdp)))
        difference = np.asarray(restored["w"]) ^ tree["w"]
        assert np.bitwise_count(difference).sum() == 1
        assert checkpoints.newest_intact() is None


def test_all_damaged_is_none_and_nothing_is_deleted(two: Path, capsys: Any) -> None:
    for step in (1, 2):
        (two / str(step) / RECORD).write_text("{}")
    (two / "damaged-2").mkdir()
    with opened(two) as checkpoints:
        assert checkpoints.newest_intact() is None
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert sorted(path.name for path in two.iterdir()) == ["damaged-1", "damaged-2", "damaged-2-2"]


def test_a_reader_changes_nothing(two: Path, tmp_path: Path) -> None:
    unfinished = two / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with opened(two, read_only=True) as checkpoints:
        assert checkpoints.newest_intact() == 2
        assert unfinished.exists()
    with opened(two) as checkpoints:
        assert not unfinished.exists()
        assert checkpoints.steps() == [1, 2]
    with opened(tmp_path / "none", read_only=True) as checkpoints:
        assert (checkpoints.steps(), checkpoints.newest_intact()) == ([], None)
    assert not (tmp_path / "none").exists()


def test_missing_checkpoints_are_told(two: Path, fsdp: Mesh) -> None:
    with opened(two, read_only=True) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.meta(7)
        path = two / "7" / RECORD
        assert str(error.value) == f"checkpoint {two / '7'} cannot be read: {path}: No such file or directory"
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(7, abstract(sharded(values(2), fsdp)))
        assert str(error.value) == f"checkpoint {two / '7'} cannot be used: it is not there"


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond size bytes: a disk that is full for all but small files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_leaves_the_last_one_intact(two: Path, fsdp: Mesh, capfd: Any) -> None:
    rng = np.random.default_rng(0)
    big = sharded({name: rng.standard_normal((512, 512), np.float32) for name in "uvw"}, fsdp)
    with opened(two) as checkpoints:
        with largest_file(1 << 16):
            checkpoints.save(3, big, {})
            with pytest.raises(CheckpointError) as error:
                checkpoints.save(4, sharded(values(4), fsdp), {})
        assert str(error.value) == f"checkpoint 3 cannot be saved in {two}: File too large"
        assert capfd.readouterr().err == ""
        assert checkpoints.steps() == [1, 2] and checkpoints.newest_intact() == 2
        checkpoints.save(3, big, {}, wait=True)
        assert checkpoints.newest_intact() == 3


def test_a_late_report_to_a_closed_loop_is_not_told_and_other_trouble_is(start: Start) -> None:
    late = """
import asyncio, tensorstore, llm_jax.checkpoint
loop = asyncio.new_event_loop()
loop.close()
promise, future = tensorstore.Promise.new()
future.add_done_callback(lambda _: loop.call_soon_threadsafe(print))
future.add_done_callback(lambda _: {}["another trouble"])
promise.set_result(1)
"""
    done = start("-c", late).wait()
    assert done.returncode == 0 and "another trouble" in done.stderr and "loop" not in done.stderr


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path / "file" / "checkpoints")
    path = tmp_path / "file" / "checkpoints"
    assert str(error.value) == f"no checkpoints can be saved in {path}: {path}: Not a directory"
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path / "lr=[1,2]")
    reason = "Orbax cannot write below a path with *, ? or ["
    assert str(error.value) == f"no checkpoints can be saved in {tmp_path / 'lr=[1,2]'}: {reason}"


class Killed(BaseException):
    """Stands for the end of the process: nothing that handles errors sees it."""


class KillSwitch:
    """Ends whatever touches a file below a directory, after so many times; installed once, for good."""

    def __init__(self) -> None:
        self.directory: str | None = None
        self.left = 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.directory is None or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        # What is removed is named within a folder that is already open.
        if event in ("os.remove", "os.rmdir") or str(args[0]).startswith(self.directory):
            self.left -= 1
            if self.left < 0:
                raise Killed


@pytest.fixture(scope="module")
def kill_switch() -> KillSwitch:
    return KillSwitch()


def test_an_end_at_any_moment_leaves_whole_checkpoints_only(
    tmp_path: Path, kill_switch: KillSwitch, capsys: Any
) -> None:
    """The process ends before each file system call of a save in turn: what has a number is whole, 3 can be saved."""
    trees = {step: {"w": np.full(2048, step, np.float32)} for step in (1, 2, 3)}
    tree = sharded(trees[3], mesh_of())
    with opened(tmp_path / "base") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, sharded(trees[step], mesh_of()), {})
    newest, finished = set(), False
    for moment in range(1000):
        directory = Path(shutil.copytree(tmp_path / "base", tmp_path / str(moment)))
        checkpoints = Checkpoints(directory, keep=2)
        kill_switch.left, kill_switch.directory = moment, str(directory)
        try:
            checkpoints.save(3, tree, {}, wait=True)
            finished = True
        except Killed:
            pass
        finally:
            kill_switch.directory = None
        with opened(directory, keep=2) as checkpoints:
            assert checkpoints.steps() in ([1, 2], [1, 2, 3], [2, 3])
            assert not any(checkpoints._damage(number) for number in checkpoints.steps())
            step = checkpoints.newest_intact()
            assert step is not None
            newest.add((step, finished))
            assert_bitwise(checkpoints.restore(step, abstract(tree)), trees[step])
            if step == 2:
                checkpoints.save(3, tree, {}, wait=True)
                assert checkpoints.newest_intact() == 3
        assert not list(directory.glob("damaged-*")) and not capsys.readouterr().err
        if finished:
            break
    assert newest == {(2, False), (3, False), (3, True)}
