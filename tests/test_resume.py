"""Whatever stops a run, and wherever it goes on, the loss curve does not know: `llm-jax train` as real processes."""

import functools
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import Start
from tests.training import (
    STEPS,
    assert_close,
    assert_same_history,
    copy_at,
    half_written,
    has_lines,
    is_saving,
    newest,
    steps_written,
    train,
    wait_for,
)


@pytest.mark.parametrize("moment", ["any", pytest.param("saving", marks=pytest.mark.slow)])
def test_sigkill_does_not_change_a_bit(uninterrupted: Path, start: Start, tmp_path: Path, moment: str) -> None:
    """Killed twice, at random steps or while a checkpoint is half-written, and resumed each time."""
    seed = int.from_bytes(os.urandom(2))
    print(f"kill seed {seed}")
    draw = random.Random(seed)
    run_dir = tmp_path / "run"
    seen_half_written = 0
    for _ in range(2):
        running = start(*train(run_dir))
        if moment == "saving":
            wait_for(functools.partial(is_saving, run_dir, newest(run_dir) + 4), running)
        else:
            goal = min(newest(run_dir) + draw.randint(1, 8), STEPS - 4)
            wait_for(functools.partial(has_lines, run_dir, goal), running)
            time.sleep(draw.random() * 0.05)
        os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        seen_half_written += bool(half_written(run_dir))
    assert moment == "any" or seen_half_written
    done = start(*train(run_dir)).wait()
    assert done.returncode == 0, done.stderr
    assert not half_written(run_dir)
    assert_same_history(run_dir, uninterrupted)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signals_save_and_say_so(uninterrupted: Path, start: Start, tmp_path: Path, number: int, code: int) -> None:
    run_dir = tmp_path / "run"
    running = start(*train(run_dir))
    wait_for(functools.partial(has_lines, run_dir, 6), running)
    running.process.send_signal(number)
    done = running.wait()
    assert done.returncode == code, done.stderr
    made = len(steps_written(run_dir))
    assert made < STEPS and newest(run_dir) == made
    assert "the same command goes on from there" in done.stdout
    assert start(*train(run_dir)).wait().returncode == 0
    assert_same_history(run_dir, uninterrupted)


def test_another_mesh_goes_on_with_the_same_batches(uninterrupted: Path, start: Start, tmp_path: Path) -> None:
    run_dir = copy_at(uninterrupted, tmp_path, 20)
    done = start(*train(run_dir, "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=1"), devices=4).wait()
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_close(run_dir, uninterrupted, 1e-5)


@pytest.mark.slow
def test_another_accumulation_goes_on_with_the_same_batches(uninterrupted: Path, start: Start, tmp_path: Path) -> None:
    run_dir = copy_at(uninterrupted, tmp_path, 20)
    assert start(*train(run_dir, "train.accumulation=4")).wait().returncode == 0
    assert_close(run_dir, uninterrupted, 1e-5)


@pytest.mark.parametrize(
    "damage", ["flip", *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("truncate", "remove"))]
)
def test_a_damaged_checkpoint_is_passed_over(uninterrupted: Path, start: Start, tmp_path: Path, damage: str) -> None:
    """One file of the newest checkpoint is damaged: it is moved aside, the one before used, its number saved again."""
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    newest = run_dir / "checkpoints" / str(STEPS)
    victims = {"flip": "state/ocdbt.process_0/d/*", "truncate": "manifest.json", "remove": "record.json"}
    victim = sorted(newest.glob(victims[damage]))[0]
    match damage:
        case "flip":
            data = bytearray(victim.read_bytes())
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
        case "truncate":
            victim.write_bytes(victim.read_bytes()[:-1])
        case "remove":
            victim.unlink()
    done = start(*train(run_dir)).wait()
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stderr and "resumed from" in done.stdout
    assert (run_dir / "checkpoints" / f"damaged-{STEPS}").is_dir()
    assert_same_history(run_dir, uninterrupted)


def test_the_proof_can_fail(uninterrupted: Path, start: Start, tmp_path: Path) -> None:
    """A resume that repeats one batch is seen by the comparison."""
    run_dir = copy_at(uninterrupted, tmp_path, 20)
    done = start("-c", PLANTED, *train(run_dir)[2:]).wait()
    assert done.returncode == 0, done.stderr
    with pytest.raises(AssertionError):
        assert_same_history(run_dir, uninterrupted)


PLANTED = """
import sys
from llm_jax.train import loop
real = loop.stream
loop.stream = lambda rows, *, start, **rest: real(rows, start=start - 1, **rest)
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
