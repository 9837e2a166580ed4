"""Bad updates are skipped, and where they are too many the run goes back past them: `llm-jax train` as it is."""

import functools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.train.config import SpikesConfig
from llm_jax.train.spikes import judge, none_yet
from tests.conftest import ROOT, LaunchProcesses, Start
from tests.training import STEPS, arrays, assert_close, assert_same_history, has_lines, lines, newest, train, wait_for


def spoiled(when: str, what: str) -> str:
    """A program that trains, and whose loss and gradient's norm are what(x) where when(state) holds."""
    return f"""
import sys
import jax.numpy as jnp
from llm_jax.train import start, step
make_step, norm, divide = step.make_step, step.optax.tree.norm, step.divide
def spoiled(*args, **settings):
    update = make_step(*args, **settings)
    def bad(state, rows_ABU):
        def spoil(x):
            return jnp.where({when}, {what}, x)
        step.optax.tree.norm = lambda tree: spoil(norm(tree))
        return update(state, rows_ABU)
    return bad
start.make_step = spoiled
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


THREE_BATCHES = spoiled("(state.batch_index >= 9) & (state.batch_index < 12)", "jnp.nan")
EVERY_BATCH = spoiled("state.batch_index >= 9", "jnp.nan")
ONE_SPIKE = spoiled("state.batch_index == 14", "1e3 * x")
TOLERANT = ("spikes.window=8", "spikes.skips=3", "spikes.sigma=30")


def rollbacks(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rollbacks.jsonl").read_text().splitlines()]


def test_judgement_is_that_of_a_plain_loop() -> None:
    """300 losses and norms with outliers and NaNs, against lists and the statistics module."""
    spikes = SpikesConfig(sigma=4.0, window=16, skips=3)
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 0.1, (300, 2))
    values[rng.choice(300, 20, replace=False), rng.integers(0, 2, 20)] *= 3
    values[rng.choice(300, 12, replace=False), rng.integers(0, 2, 12)] = np.nan
    values[:16] = np.abs(values[:16])
    judged = jax.jit(lambda recent, step, loss, norm: judge(recent, step, loss, norm, spikes))
    recent, history, seen = none_yet(spikes), [], {"spike": 0, "not finite": 0}
    for step, (loss, norm) in enumerate(values.astype(np.float32).tolist()):
        told = jax.device_get(judged(recent, jnp.int32(step), jnp.float32(loss), jnp.float32(norm)))
        recent = told.recent
        window = history[-spikes.window :]
        known = [pair for pair in window if pair is not None]
        finite = math.isfinite(loss) and math.isfinite(norm)
        spike = False
        if finite and len(known) >= spikes.window // 2:
            for value, past in zip((loss, norm), zip(*known, strict=True), strict=True):
                spike |= value > statistics.fmean(past) + 4.0 * statistics.pstdev(past)
        history.append((loss, norm) if finite and not spike else None)
        bad = [i for i in range(max(0, step + 1 - spikes.window), step + 1) if history[i] is None]
        assert (told.finite, told.spike, told.healthy) == (finite, spike, finite and not spike), step
        assert (told.skips, told.first_skip) == (len(bad), bad[0] + 1 if bad else 0), step
        seen["spike"] += spike
        seen["not finite"] += not finite
    assert seen["spike"] > 10 and seen["not finite"] > 5


def test_equal_losses_are_no_spikes_and_sigma_null_has_none() -> None:
    def all_judged(losses: list[float], spikes: SpikesConfig) -> list[bool]:
        recent, told = none_yet(spikes), []
        for step, loss in enumerate(losses):
            judged = judge(recent, jnp.int32(step), jnp.float32(loss), jnp.float32(0.1), spikes)
            recent = judged.recent
            told.append(bool(judged.spike))
        return told

    assert not any(all_judged([1 / 3] * 12, SpikesConfig(window=4, skips=1)))
    assert all_judged([1, 1, 1, 1, 2], SpikesConfig(window=4, skips=1)) == [False] * 4 + [True]
    assert not any(all_judged([1, 1, 1, 1, 1e9], SpikesConfig(window=4, skips=1, sigma=None)))


def test_a_spike_is_skipped_counted_and_told(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = start("-c", ONE_SPIKE, *train(run_dir, *TOLERANT)[2:]).wait()
    assert done.returncode == 0, done.stderr
    assert [line["batch_index"] for line in lines(run_dir) if line["spike"]] == [14]
    assert all(line["finite"] and line["skipped"] == (line["step"] > 14) for line in lines(run_dir))
    assert "a spike, skipped" in done.stdout
    assert not (run_dir / "rollbacks.jsonl").exists()


@pytest.fixture(scope="module")
def went_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run in one go, with three batches that make nothing but NaN."""
    run_dir = tmp_path_factory.mktemp("went_back") / "run"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", THREE_BATCHES, *train(run_dir, *TOLERANT)[2:]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going back to step 8, and on with batch 12" in done.stdout
    return run_dir


def test_the_run_goes_back_and_past_the_bad_batches(went_back: Path) -> None:
    """Updates 10 to 12 were skipped: back to checkpoint 8, on with batch 12; one line a step, all of them healthy."""
    told = lines(went_back)
    assert [line["step"] for line in told] == list(range(1, STEPS + 1))
    assert [line["batch_index"] for line in told] == [*range(8), *range(12, STEPS + 4)]
    assert all(line["finite"] and line["skipped"] == 0 for line in told)
    assert [line["rollbacks"] for line in told] == [0] * 8 + [1] * (STEPS - 8)
    (back,) = rollbacks(went_back)
    told_back = {"rollback": 1, "from_step": 12, "first_skipped": 10, "to_step": 8, "next_batch": 12}
    assert told_back.items() <= back.items()
    assert all(np.isfinite(value).all() for name, value in arrays(went_back, STEPS).items() if "recent" not in name)
    last = arrays(went_back, STEPS)
    assert (int(last["/batch_index"]), int(last["/step"])) == (STEPS + 4, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_around_a_rollback_does_not_change_a_bit(
    went_back: Path, start: Start, tmp_path: Path, moment: str
) -> None:
    """Killed with -9 just before the run goes back, or somewhere after it."""
    seed = int.from_bytes(os.urandom(2))
    print(f"kill seed {seed}")
    draw = random.Random(seed)
    run_dir = tmp_path / "run"
    command = ("-c", THREE_BATCHES, *train(run_dir, *TOLERANT)[2:])
    running = start(*command)
    if moment == "before":
        wait_for(functools.partial(has_lines, run_dir, draw.randint(6, 11)), running)
    else:
        wait_for((run_dir / "rollbacks.jsonl").exists, running)
        time.sleep(draw.random() * 0.1)
    os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()
    done = start(*command).wait()
    assert done.returncode == 0, done.stderr
    assert_same_history(run_dir, went_back)
    without_time = [{k: v for k, v in line.items() if k != "time"} for line in rollbacks(run_dir)]
    assert without_time == [{k: v for k, v in line.items() if k != "time"} for line in rollbacks(went_back)]


@pytest.mark.slow
def test_two_processes_go_back_together_and_give_up_together(
    went_back: Path, launch_processes: LaunchProcesses, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for done in launch_processes(2, 2, ["-c", THREE_BATCHES, *train(run_dir, *TOLERANT, "mesh.fsdp=2")[2:]]):
        assert done.returncode == 0, done.stderr
    assert_close(run_dir, went_back, 1e-5)
    assert [line["batch_index"] for line in lines(run_dir)] == [*range(8), *range(12, STEPS + 4)]

    lost = tmp_path / "lost"
    for done in launch_processes(2, 2, ["-c", EVERY_BATCH, *train(lost, *TOLERANT, "mesh.fsdp=2")[2:]]):
        assert done.returncode == 70, done.stderr
    assert len(rollbacks(lost)) == 2 and newest(lost) == 8


@pytest.mark.slow
def test_a_flipped_bit_in_a_replay_is_told_and_training_does_not_know(
    uninterrupted: Path, start: Start, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    done = start("-c", FLIPPED, *train(run_dir, "train.replay_every=8")[2:]).wait()
    assert done.returncode == 0, done.stderr
    told = lines(run_dir)
    assert [line["step"] for line in told if "replay_differs" in line] == [8, 16, 24]
    assert [line["step"] for line in told if line.get("replay_differs")] == [24]
    assert "step 24: the same gradient, computed twice, differs" in done.stderr
    assert done.stderr.count("computed twice") == 1
    losses = [line["loss"] for line in told]
    assert losses == [line["loss"] for line in lines(uninterrupted)]


# In the second computation of the third replay one bit of one weight is another.
FLIPPED = """
import dataclasses, sys
import jax, numpy as np
from llm_jax.train import attempt
compile_programs = attempt.compile_programs
calls = 0
def flip(params):
    leaves, structure = jax.tree.flatten(params)
    at = next(i for i, x in enumerate(leaves) if x.ndim == 1)  # a norm's scale: every token meets it
    bits = np.asarray(leaves[at]).view(np.uint32).copy()
    bits[5] ^= 1 << 12
    leaves[at] = jax.device_put(bits.view(np.float32), leaves[at].sharding)
    return jax.tree.unflatten(structure, leaves)
def flipping(*args):
    programs = compile_programs(*args)
    def checksums(state, rows_ABU):
        global calls
        calls += 1
        if calls == 6:
            state = dataclasses.replace(state, params=flip(state.params))
        return programs.checksums(state, rows_ABU)
    return programs._replace(checksums=checksums)
attempt.compile_programs = flipping
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
