"""Checkpoints and run directories with real processes: two that save as one, and some that are killed."""

import json
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest

from llm_jax.checkpoint import Checkpoints
from llm_jax.run_directory import DirectoryError, Refused, sole_trainer
from tests.checkpoint_roles import abstract, assert_bitwise, mesh_of, sharded, values
from tests.conftest import LaunchProcesses, Running, Start

SCRIPT = ("-m", "tests.checkpoint_roles")


def line(running: Running, number: int) -> int:
    """The number that a process prints on its line of that number, once it does."""
    deadline = time.monotonic() + 60
    while len(lines := running.stdout.read_text().split("\n")) <= number + 1:
        assert running.process.poll() is None and time.monotonic() < deadline, running.stderr.read_text()
        time.sleep(0.001)
    return int(lines[number])


def test_two_processes_save_and_restore_as_one(tmp_path: Path, launch_processes: LaunchProcesses) -> None:
    """Saved by one, restored by two; saved by two, restored by one; and whatever fails, fails on both."""
    for name in ("held", "0", "1"):
        (tmp_path / name).mkdir()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=4)
    checkpoints.save(1, sharded(values(1), mesh_of(fsdp=8)), {"by": 1}, wait=True)
    with sole_trainer(tmp_path / "held"):
        pair = launch_processes(2, 4, [*SCRIPT, "one_of_two", str(tmp_path)], timeout=120)
    assert [process.returncode for process in pair] == [0, 0], [process.stderr for process in pair]
    first, second = (json.loads(process.stdout) for process in pair)
    for both in (first, second):
        assert max(both.pop("full_s"), 0) < 20
    host = socket.gethostname()
    path = tmp_path / "checkpoints"
    for index, both in enumerate((first, second)):
        other = f"another directory for process 1 on {host} than for process 0: use one that all share"
        assert both.pop("elsewhere") == f"{tmp_path / str(index)} is {other}"
    assert first.pop("defect") == "list index out of range"
    assert second.pop("defect") == "on process 0: list index out of range"
    assert first["failure"] == ["no, since ['', '']", 3]
    assert first == second
    assert first["nowhere"] == f"{tmp_path / 'none'} cannot be written: No such file or directory"
    assert first["held"] == f"{tmp_path / 'held'} has a trainer at work already: process {os.getpid()} on {host}"
    assert first["full"] == f"checkpoint 4 cannot be saved in {path}: File too large"
    for step in (2, 3):
        assert first[f"damage {step}"].startswith(f"checkpoint {path / str(step)} cannot be used: state/")
    assert (first["steps"], first["newest"], first["saved"]) == ([1], 1, 2)
    assert first["taken"] == f"checkpoint 1 cannot be saved in {path}: {path / '1'}: exists already"
    stderr = pair[0].stderr.splitlines()
    assert len([line for line in stderr if "is damaged (state/" in line]) == 2, stderr
    assert sorted(entry.name for entry in path.iterdir()) == ["1", "2", "damaged-2", "damaged-3"]
    for mesh in (mesh_of(fsdp=8), mesh_of()):
        assert_bitwise(checkpoints.restore(2, abstract(values(2), mesh)), values(2))
    assert checkpoints.meta(2) == {"by": 2}
    checkpoints.close()


@pytest.mark.slow
def test_kill_in_mid_save_leaves_what_was_whole(tmp_path: Path, start: Start) -> None:
    """SIGKILL at random moments of a save, and on from there: nothing with a number is damaged, none is lost."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, mesh = random.Random(seed), mesh_of()
    directory, found, unfinished_at_death, wanted = tmp_path / "checkpoints", None, 0, abstract(values(1), mesh)
    for _ in range(4):
        saver = start(*SCRIPT, "save_on_and_on", str(directory))
        newest = line(saver, 1) - 1  # a number is printed when the one before was completed
        time.sleep(rng.uniform(0, 0.15))
        saver.process.kill()
        saver.process.wait()
        left = sorted(path.name for path in directory.iterdir())
        unfinished_at_death += any(not name.isdigit() for name in left)
        reader = Checkpoints(directory, read_only=True)
        found = reader.newest_intact()
        assert found is not None and found >= newest and reader.steps()[-1] == found, left
        for step in reader.steps():
            assert_bitwise(reader.restore(step, wanted), values(step))
        reader.close()
    assert unfinished_at_death > 0 and found is not None
    with_room = Checkpoints(directory, keep=2)
    with_room.save(found + 1, sharded(values(found + 1), mesh), {}, wait=True)
    assert with_room.newest_intact() == found + 1
    with_room.close()
    assert sorted(path.name for path in directory.iterdir()) == sorted([str(found), str(found + 1)])


@pytest.mark.parametrize("with_child", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_trainer_at_a_time_and_death_frees_the_lock(tmp_path: Path, start: Start, with_child: bool) -> None:
    run_dir = tmp_path / "run"
    holder = start(*SCRIPT, "hold_the_lock", str(run_dir), str(int(with_child)))
    child = line(holder, 0)
    with pytest.raises(Refused) as error, sole_trainer(run_dir):
        pass
    assert error.value.exit_code == 3
    name = f"process {holder.process.pid} on {socket.gethostname()}"
    assert str(error.value) == f"{run_dir} has a trainer at work already: {name}"
    holder.process.kill()
    holder.process.wait()
    try:
        with sole_trainer(run_dir):
            pass
    finally:
        if with_child:
            os.kill(child, signal.SIGKILL)  # it was alive all the time


def test_a_run_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DirectoryError) as error, sole_trainer(tmp_path / "file" / "run"):
        pass
    assert error.value.exit_code == 74
    assert str(error.value) == f"{tmp_path / 'file' / 'run'} cannot be made or locked: Not a directory"
