"""Every tiny config trains as it is shipped, is killed, and goes on bit for bit; with one microbatch or with four."""

import itertools
from pathlib import Path

import pytest

from tests.conftest import ROOT, Start
from tests.training import assert_same_history, curve, has_lines, newest, train, wait_for

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("tiny_*.py"))
STEPS = 16


# Each config once and the richest twice; all of them take minutes.
SAMPLE = {*zip(CONFIGS, itertools.cycle((4, 1)), strict=False), ("tiny_moe_mlm", 1)}


@pytest.mark.parametrize(
    ("config", "accumulation"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case in SAMPLE else [pytest.mark.slow, pytest.mark.whole])
        for case in itertools.product(CONFIGS, (1, 4))
    ],
)
def test_killed_it_goes_on_bit_for_bit(config: str, accumulation: int, start: Start, tmp_path: Path) -> None:
    wishes = (
        f"train.steps={STEPS}",
        "checkpoint.every=6",
        f"train.accumulation={accumulation}",
        "mesh.data=1",
        "mesh.expert=2",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = start(*train(whole, *wishes, config=config), devices=2).wait()
    assert done.returncode == 0, done.stderr
    running = start(*train(killed, *wishes, config=config), devices=2)
    wait_for(lambda: has_lines(killed, 8) and newest(killed) > 0, running)
    running.kill()
    assert len(curve(killed)) < STEPS, "it was finished before it was killed"
    done = start(*train(killed, *wishes, config=config), devices=2).wait()
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert_same_history(killed, whole, STEPS)


def test_there_is_one_for_every_kind_of_model() -> None:
    assert {"tiny_causal", "tiny_mlm", "tiny_moe", "tiny_moe_mlm", "tiny_local_global"} <= set(CONFIGS)
