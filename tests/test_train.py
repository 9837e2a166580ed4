"""`llm-jax train` as real processes: whatever stops a run, and wherever it goes on, the loss curve does not know."""

import functools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.conftest import ROOT, Cli, LaunchProcesses, Running, Start

CONFIG = str(ROOT / "configs" / "tiny_causal.py")
DATA = f"data.dir={ROOT / '.cache' / 'data'}"
# Small enough for a second of compiling; every 4 updates a checkpoint.
SMALL = (
    DATA, "model.d_model=32", "model.d_ff=64", "model.n_heads=8", "model.n_kv_heads=8", "model.d_head=8",
    "data.seq_len=64", "train.steps=40", "optim.warmup_steps=5", "checkpoint.every=4", "eval.every=0",
    "eval.batch_rows=8", "logging.every=40",
)  # fmt: skip
EXACT = ("loss", "accuracy", "z_loss", "grad_norm", "lr", "tokens", "batch_hash", "finite", "skipped")


def train(run_dir: Path, *overrides: str) -> list[str]:
    """The command line; an override replaces SMALL's of the same path."""
    wishes = {wish.partition("=")[0]: wish for wish in (*SMALL, f"run_dir={run_dir}", *overrides)}
    return ["-m", "llm_jax", "train", CONFIG, *wishes.values()]


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> list[tuple]:
    """What must be bit for bit the same: one tuple an update, in the order of the file."""
    return [(line["step"], *(line[name] for name in EXACT)) for line in lines(run_dir)]


def arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, read by Orbax alone."""
    folder = (run_dir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        return dict(_flat("", checkpointer.restore(folder, ocp.args.PyTreeRestore(restore_args=as_numpy))))


def _flat(path: str, tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(f"{path}/{key}", value)
    else:
        yield path, tree


def assert_same_history(run_dir: Path, other: Path, step: int = 40) -> None:
    assert curve(run_dir) == curve(other)
    ours, theirs = arrays(run_dir, step), arrays(other, step)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.tobytes() == theirs[name].tobytes(), name


def assert_close(run_dir: Path, other: Path, tolerance: float) -> None:
    """The same batches, and losses within a relative tolerance."""
    ours, theirs = lines(run_dir), lines(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["batch_hash"] for line in ours] == [line["batch_hash"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a["loss"] - b["loss"]) <= tolerance * abs(b["loss"]), (a["step"], a["loss"], b["loss"])


def wait_for(condition, running: Running, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert running.process.poll() is None, running.done()
        assert time.monotonic() < deadline, "it never came to that"


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of 40 updates in one go, on one device."""
    import subprocess
    import sys

    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, *train(run_dir)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_a_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    assert [line["step"] for line in lines(uninterrupted)] == list(range(1, 41))
    names = {"loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "data_wait", "checkpoint_stall", "batch_hash"}
    assert all(names <= line.keys() for line in lines(uninterrupted))
    assert len({line["batch_hash"] for line in lines(uninterrupted)}) == 40
    assert lines(uninterrupted)[-1]["loss"] < lines(uninterrupted)[0]["loss"] - 1
    assert sorted(int(p.name) for p in (uninterrupted / "checkpoints").iterdir()) == [32, 36, 40]
    assert json.loads((uninterrupted / "config.json").read_text())["train"]["steps"] == 40
    attempts = json.loads((uninterrupted / "environment.json").read_text())["attempts"]
    assert len(attempts) == 1 and "jax" in attempts[0]["versions"]


@pytest.mark.parametrize("moment", ["any", "saving"])
def test_sigkill_does_not_change_a_bit(uninterrupted: Path, start: Start, tmp_path: Path, moment: str) -> None:
    """Killed three times, at random steps or while a checkpoint is half-written, and resumed each time."""
    seed = int.from_bytes(os.urandom(2))
    print(f"kill seed {seed}")
    draw = random.Random(seed)
    run_dir = tmp_path / "run"
    seen_half_written = 0
    for _ in range(3):
        running = start(*train(run_dir))
        if moment == "saving":
            wait_for(functools.partial(_is_saving, run_dir, _newest(run_dir) + 4), running)
        else:
            goal = min(_newest(run_dir) + draw.randint(1, 12), 36)
            wait_for(functools.partial(_has_lines, run_dir, goal), running)
            time.sleep(draw.random() * 0.05)
        os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        seen_half_written += bool(_half_written(run_dir))
    assert moment == "any" or seen_half_written
    done = start(*train(run_dir)).wait()
    assert done.returncode == 0, done.stderr
    assert not _half_written(run_dir)
    assert_same_history(run_dir, uninterrupted)


def _is_saving(run_dir: Path, step: int) -> bool:
    """Whether the checkpoint of that step or a later one is half-written."""
    return any(int(p.name.split(".")[0]) >= step for p in _half_written(run_dir))


def _has_lines(run_dir: Path, n: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(_steps(run_dir)) >= n


def _half_written(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob("[0-9]*.orbax-checkpoint-tmp"))


def _newest(run_dir: Path) -> int:
    folder = run_dir / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), default=0)


def _steps(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_save_and_say_so(uninterrupted: Path, start: Start, tmp_path: Path, number: int, code: int) -> None:
    run_dir = tmp_path / "run"
    running = start(*train(run_dir))
    wait_for(functools.partial(_has_lines, run_dir, 6), running)
    running.process.send_signal(number)
    done = running.wait()
    assert done.returncode == code, done.stderr
    made = len(_steps(run_dir))
    assert made < 40 and _newest(run_dir) == made
    assert "the same command goes on from there" in done.stdout
    assert start(*train(run_dir)).wait().returncode == 0
    assert_same_history(run_dir, uninterrupted)


def test_another_mesh_goes_on_with_the_same_batches(uninterrupted: Path, start: Start, tmp_path: Path) -> None:
    run_dir = _copy_at(uninterrupted, tmp_path, 32)
    done = start(*train(run_dir, "mesh.fsdp=2", "mesh.tensor=4", "mesh.data=1"), devices=8).wait()
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_close(run_dir, uninterrupted, 1e-5)


def test_another_accumulation_goes_on_with_the_same_batches(uninterrupted: Path, start: Start, tmp_path: Path) -> None:
    run_dir = _copy_at(uninterrupted, tmp_path, 36)
    assert start(*train(run_dir, "train.accumulation=4")).wait().returncode == 0
    assert_close(run_dir, uninterrupted, 1e-5)


def _copy_at(run_dir: Path, tmp_path: Path, step: int) -> Path:
    """A copy as it was after the checkpoint of that step, with lines of a later life that never got a checkpoint."""
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return copy


@pytest.mark.parametrize("mesh", ["mesh.fsdp=8", "mesh.tensor=8"])
def test_two_processes_are_one(launch_processes: LaunchProcesses, start: Start, tmp_path: Path, mesh: str) -> None:
    """2 processes of 4 devices against 1 of 8, with tensor parallelism across the two as well; one goes on with it."""
    two, one = tmp_path / "two", tmp_path / "one"
    shape = (mesh, "mesh.data=1")
    for result in launch_processes(2, 4, train(two, *shape, "train.steps=12", "optim.schedule=constant")):
        assert result.returncode == 0, result.stdout + result.stderr
    done = start(*train(one, *shape, "train.steps=12", "optim.schedule=constant"), devices=8).wait()
    assert done.returncode == 0, done.stderr
    assert_close(two, one, 1e-6)
    # One process goes on with what two have saved; a longer run is a drift that shapes no constant schedule.
    more = ("train.steps=16", "optim.schedule=constant", "--allow-drift")
    for run_dir in (two, one):
        done = start(*train(run_dir, *more)).wait()
        assert done.returncode == 0, done.stderr
        assert "allowed drift: train.steps: 12 -> 16" in done.stdout
    assert_close(two, one, 1e-5)


def test_sigterm_to_one_of_two_stops_both_at_the_same_step(start: Start, tmp_path: Path) -> None:
    from tests.conftest import free_port

    run_dir = tmp_path / "run"
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    both = [start(*train(run_dir), devices=2, env=job | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
    wait_for(functools.partial(_has_lines, run_dir, 4), both[0])
    both[1].process.send_signal(signal.SIGTERM)
    for running in both:
        done = running.wait(120)
        assert done.returncode == 75, done.stdout + done.stderr
    assert _newest(run_dir) == len(_steps(run_dir)) < 40


def test_a_finished_run_says_so(uninterrupted: Path, start: Start) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = start(*train(uninterrupted)).wait()
    assert done.returncode == 0
    assert "is finished after 40 steps; next: llm-jax eval" in done.stdout
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_with_the_difference(uninterrupted: Path, start: Start) -> None:
    done = start(*train(uninterrupted, "optim.lr=0.5", "train.steps=41")).wait()
    assert done.returncode == 3
    assert "  optim.lr: 0.003 -> 0.5\n  train.steps: 40 -> 41" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_shapes_are_refused_even_so(uninterrupted: Path, start: Start) -> None:
    done = start(*train(uninterrupted, "model.d_ff=96", "--allow-drift")).wait()
    assert done.returncode == 3
    assert "weights of other shapes" in done.stderr and "model.d_ff: 64 -> 96" in done.stderr


def test_a_second_trainer_is_refused(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = start(*train(run_dir, "train.steps=400"))
    wait_for(functools.partial(_has_lines, run_dir, 0), first)
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
    ours, theirs = arrays(run_dir, 1), arrays(uninterrupted, 40)
    assert int(ours["/step"]) == 1 and int(ours["/batch_index"]) == 1
    for name in (name for name in ours if name.startswith("/params/")):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-10)
    assert not np.array_equal(ours["/opt_state/0/mu/embed"], theirs["/opt_state/0/mu/embed"])


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over(uninterrupted: Path, start: Start, tmp_path: Path, damage: str) -> None:
    """One file of the newest checkpoint is damaged: it is moved aside, the one before used, its number saved again."""
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    newest = run_dir / "checkpoints" / "40"
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
    assert (run_dir / "checkpoints" / "damaged-40").is_dir()
    assert_same_history(run_dir, uninterrupted)


def test_the_proof_can_fail(uninterrupted: Path, start: Start, tmp_path: Path) -> None:
    """A resume that repeats one batch is seen by the comparison."""
    run_dir = _copy_at(uninterrupted, tmp_path, 36)
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


def test_updates_that_are_not_finite_are_skipped_counted_and_given_up(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = start(*train(run_dir, "optim.lr=1e30", "optim.warmup_steps=0", "optim.schedule=constant")).wait()
    assert done.returncode == 70
    assert "10 updates in a row were not finite" in done.stderr and "Traceback" not in done.stderr
    bad = [line for line in lines(run_dir) if not line["finite"]]
    assert [line["skipped"] for line in bad] == list(range(1, 11))
    # No checkpoint of an update that was skipped, though one was due.
    assert _newest(run_dir) < bad[0]["step"]


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


def test_a_disk_that_cannot_be_written_is_code_74_and_the_last_good_checkpoint_stays(
    uninterrupted: Path, start: Start, tmp_path: Path
) -> None:
    run_dir = _copy_at(uninterrupted, tmp_path, 32)
    done = start("-c", FULL_DISK, *train(run_dir)[2:]).wait()
    assert done.returncode == 74, done.stderr
    assert "checkpoint 36 cannot be saved" in done.stderr and "Traceback" not in done.stderr
    assert _newest(run_dir) == 32
    assert start(*train(run_dir)).wait().returncode == 0
    assert_same_history(run_dir, uninterrupted)


# From the first save on, no file of this process may grow past 400 kB: the kernel's own refusal, as from a full disk.
FULL_DISK = """
import resource, signal, sys
from llm_jax.checkpoint import Checkpoints
real = Checkpoints.save
def save(self, *args, **kwargs):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    return real(self, *args, **kwargs)
Checkpoints.save = save
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
