"""After its first update the loop compiles nothing, and tells where it does."""

import functools
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llm_jax.train.recompiles import watched
from tests.conftest import Start
from tests.training import lines, train


def test_what_comes_later_is_told_with_its_cause_and_first_times_are_not(caplog: pytest.LogCaptureFixture) -> None:
    @jax.jit
    def scale(x: jax.Array) -> jax.Array:
        return 2 * x

    arrays = [jnp.ones(n) for n in (3, 4, 5)]
    with watched() as recompiles:
        scale(arrays[0])
        recompiles.over("step")
        assert recompiles.noted() == {}
        scale(arrays[0])
        recompiles.over("step")
        assert recompiles.noted() == {}
        scale(arrays[1])
        recompiles.over("evaluation")
        assert recompiles.noted() == {}
        scale(arrays[2])
        recompiles.over("step")
        (told,) = recompiles.noted()["recompiled"]
        assert told["program"] == "scale" and told["cause"].startswith("at x, now f32[5] and before f32[")
        assert recompiles.noted() == {}
    scale(jnp.ones(6))
    assert recompiles.noted() == {} and not jax.config.values["jax_explain_cache_misses"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_that_compiles_during_training_says_so_once_and_names_the_place(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # What is compiled is looked at, and not what it computes.
    quickly = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
    planted = functools.partial(start, "-c", GROWS, env=quickly)
    # Looks and saves compile their own programs in the middle of training, which nobody has to hear of.
    wishes = ("train.steps=8", "eval.every=3", "eval.rows=8", "checkpoint.every=4")
    done = planted(*train(run_dir, *wishes)[2:]).wait()
    assert done.returncode == 0, done.stderr
    told = {line["step"]: line["recompiled"] for line in lines(run_dir) if "recompiled" in line}
    assert {step: [each["program"] for each in made] for step, made in told.items()} == {6: ["grows"], 7: ["grows"]}
    assert told[7][0]["cause"] == "at x, now f32[7] and before f32[6]"
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: step 6: grows was compiled after the first update, at llm_jax/train/loop.py:")
    assert "CACHE MISS" not in done.stderr


# Before updates 6 and 7 something is called with a shape of its own, by way of the loop.
GROWS = """
import sys
import jax, numpy as np
from llm_jax.train import loop
real = loop.is_due
@jax.jit
def grows(x):
    return x + 1
def is_due(every, done, run):
    if done in (5, 6):
        grows(np.ones(done + 1, np.float32))
    return real(every, done, run)
loop.is_due = is_due
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
