"""`llm-jax train` as a process: what it leaves, what it refuses, and what it does when the numbers or the disk fail."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Cli, Start
from tests.training import STEPS, arrays, assert_same_history, copy_at, has_lines, lines, newest, train, wait_for


@pytest.fixture(scope="module", name="uninterrupted")
def own_uninterrupted(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: here trainers are started on it."""
    return Path(shutil.copytree(uninterrupted, tmp_path_factory.mktemp("uninterrupted") / "run"))


def test_a_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    assert [line["step"] for line in lines(uninterrupted)] == list(range(1, STEPS + 1))
    names = {"loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "data_wait", "checkpoint_stall", "batch_hash"}
    assert all(names <= line.keys() for line in lines(uninterrupted))
    assert len({line["batch_hash"] for line in lines(uninterrupted)}) == STEPS
    assert lines(uninterrupted)[-1]["loss"] < lines(uninterrupted)[0]["loss"] - 1
    assert sorted(int(p.name) for p in (uninterrupted / "checkpoints").iterdir()) == [16, 20, 24]
    assert json.loads((uninterrupted / "config.json").read_text())["train"]["steps"] == STEPS
    attempts = json.loads((uninterrupted / "environment.json").read_text())["attempts"]
    assert len(attempts) == 1 and "jax" in attempts[0]["versions"]


def test_a_finished_run_says_so(uninterrupted: Path, start: Start) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = start(*train(uninterrupted)).wait()
    assert done.returncode == 0
    assert f"is finished after {STEPS} steps; next: llm-jax eval" in done.stdout
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_with_the_difference(uninterrupted: Path, start: Start) -> None:
    done = start(*train(uninterrupted, "optim.lr=0.5", "train.steps=25")).wait()
    assert done.returncode == 3
    assert "  optim.lr: 0.003 -> 0.5\n  train.steps: 24 -> 25" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_shapes_are_refused_even_so(uninterrupted: Path, start: Start) -> None:
    done = start(*train(uninterrupted, "model.d_ff=96", "--allow-drift")).wait()
    assert done.returncode == 3
    assert "weights of other shapes" in done.stderr and "model.d_ff: 64 -> 96" in done.stderr


def test_a_second_trainer_is_refused(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = start(*train(run_dir, "train.steps=400"))
    wait_for(functools.partial(has_lines, run_dir, 0), first)
    done = start(*train(run_dir, "train.steps=400")).wait()
    assert done.returncode == 3
    assert f"has a trainer at work already: process {first.process.pid} on" in done.stderr


def test_a_mesh_that_does_not_fit_is_told_in_one_line(cli: Cli, tmp_path: Path) -> None:
    done = cli(*train(tmp_path / "run", "mesh.tensor=3")[2:], devices=8)
    assert done.returncode == 2
    assert done.stderr.strip() == "model.d_ff = 64 is not divisible by mesh.tensor = 3"
    done = cli(*train(tmp_path / "run", "mesh.fsdp=16", "eval.batch_rows=16")[2:], devices=8)
    assert done.returncode == 2 and "devices" in done.stderr and done.stderr.count("\n") == 1


def test_init_from_takes_the_weights_and_nothing_else(uninterrupted: Path, start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = start(
        *train(run_dir, f"train.init_from={uninterrupted}", "train.steps=1", "optim.warmup_steps=0", "optim.lr=1e-12")
    ).wait()
    assert done.returncode == 0, done.stderr
    ours, theirs = arrays(run_dir, 1), arrays(uninterrupted, STEPS)
    assert int(ours["/step"]) == 1 and int(ours["/batch_index"]) == 1
    for name in (name for name in ours if name.startswith("/params/")):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-10)
    assert not np.array_equal(ours["/opt_state/0/mu/embed"], theirs["/opt_state/0/mu/embed"])


def test_updates_that_are_not_finite_are_skipped_counted_and_given_up(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = start(*train(run_dir, "optim.lr=1e30", "optim.warmup_steps=0", "optim.schedule=constant")).wait()
    assert done.returncode == 70
    assert "10 of the last 128 updates were skipped" in done.stderr and "after going back 2 times" in done.stderr
    assert "Traceback" not in done.stderr
    bad = [line for line in lines(run_dir) if not line["finite"]]
    assert [line["skipped"] for line in bad] == list(range(1, 11))
    assert {line["rollbacks"] for line in bad} == {2}
    # No checkpoint of an update that was skipped, though one was due.
    assert newest(run_dir) < bad[0]["step"]


@pytest.mark.slow
def test_one_bad_batch_is_skipped_and_its_checkpoint_waits(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = start("-c", POISONED, *train(run_dir, "train.steps=12")[2:]).wait()
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(run_dir) if not line["finite"]] == [4]
    assert all(line["skipped"] == (line["step"] >= 4) for line in lines(run_dir))
    # Checkpoint 4 was due on the skipped update, so 5 was saved instead.
    assert sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir()) == [5, 8, 12]


# The gradient's norm of the fourth update is not a number.
POISONED = """
import sys
import jax.numpy as jnp
from llm_jax.train import start, step
make_step, norm = step.make_step, step.optax.tree.norm
def poisoned(*args, **settings):
    update = make_step(*args, **settings)
    def bad(state, rows_ABU):
        step.optax.tree.norm = lambda tree: jnp.where(state.step == 3, jnp.nan, norm(tree))
        return update(state, rows_ABU)
    return bad
start.make_step = poisoned
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_is_code_74_and_the_last_good_checkpoint_stays(
    uninterrupted: Path, start: Start, tmp_path: Path
) -> None:
    run_dir = copy_at(uninterrupted, tmp_path, 20)
    done = start("-c", FULL_DISK, *train(run_dir)[2:]).wait()
    assert done.returncode == 74, done.stderr
    assert "checkpoint 24 cannot be saved" in done.stderr and "Traceback" not in done.stderr
    assert newest(run_dir) == 20
    assert start(*train(run_dir)).wait().returncode == 0
    assert_same_history(run_dir, uninterrupted)


# From the first save on, no file of this process may grow past 100 kB: the kernel's own refusal, as from a full disk.
FULL_DISK = """
import resource, signal, sys
from llm_jax.checkpoint import Checkpoints
real = Checkpoints.save
def save(self, *args, **kwargs):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return real(self, *args, **kwargs)
Checkpoints.save = save
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
