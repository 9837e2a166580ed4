"""A run goes on with another number of processes, and on another mesh: the same batches, the same losses."""

import functools
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from llm_jax.checkpoint import Checkpoints
from tests.conftest import Running, Start, free_port
from tests.training import assert_close, has_lines, lines, newest, train, wait_for

STEPS = 24
WISHES = (f"train.steps={STEPS}", "checkpoint.every=6", "checkpoint.keep=9")
MESH = ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2")


def begin(start: Start, n: int, devices: int, run_dir: Path, mesh: Sequence[str]) -> list[Running]:
    """So many processes of so many devices each."""
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(n)} if n > 1 else {}
    envs = [job | ({"JAX_PROCESS_ID": str(i)} if n > 1 else {}) for i in range(n)]
    return [start(*train(run_dir, *WISHES, *mesh), devices=devices, env=env) for env in envs]


def to_the_end(job: list[Running]) -> None:
    for running in job:
        done = running.wait()
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_saved_by_four_processes_and_continued_by_other_numbers(start: Start, tmp_path: Path) -> None:
    """4 x 1 devices, asked to stop in mid-run; 2 x 2 go on, 1 x 4 on another mesh, and one device alone."""
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    to_the_end(begin(start, 1, 4, uninterrupted, MESH))
    assert len({line["batch_hash"] for line in lines(uninterrupted)}) == STEPS

    job = begin(start, 4, 1, stopped, MESH)
    wait_for(functools.partial(has_lines, stopped, 2), job[0])
    job[-1].process.send_signal(signal.SIGTERM)
    for running in job:
        done = running.wait(120)
        assert done.returncode == 75, done.stdout + done.stderr
    assert newest(stopped) == len(lines(stopped)) < STEPS

    for name, n, devices, mesh in (
        ("two", 2, 2, MESH),
        ("one", 1, 4, ("mesh.data=1", "mesh.fsdp=4")),
        ("alone", 1, 1, ()),
    ):
        run_dir = tmp_path / name
        shutil.copytree(stopped, run_dir)
        to_the_end(begin(start, n, devices, run_dir, mesh))
        assert_close(run_dir, uninterrupted, 1e-5)
        assert Checkpoints(run_dir / "checkpoints", read_only=True).newest_intact() == STEPS
