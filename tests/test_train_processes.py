"""Two processes of `llm-jax train` against one: the same batches, the same losses, stopped at the same step."""

import functools
import signal
from pathlib import Path

import pytest

from tests.conftest import LaunchProcesses, Start, free_port
from tests.training import assert_close, has_lines, newest, steps_written, train, wait_for


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        ("tiny_causal", "mesh.fsdp=4"),
        ("tiny_causal", "mesh.tensor=4"),
        # Masks, choices of experts and their biases are the same too, or losses would not be.
        ("tiny_moe_mlm", "mesh.expert=4"),
    ],
)
def test_two_processes_are_one(
    launch_processes: LaunchProcesses, start: Start, tmp_path: Path, config: str, mesh: str
) -> None:
    """2 processes of 2 devices against 1 of 4, with tensor parallelism across the two as well; one goes on with it."""
    two, one = tmp_path / "two", tmp_path / "one"
    shape = (mesh, "mesh.data=1")
    short, long = (("optim.schedule=constant", "checkpoint.every=6", f"train.steps={n}") for n in (12, 16))
    for result in launch_processes(2, 2, train(two, *shape, *short, config=config)):
        assert result.returncode == 0, result.stdout + result.stderr
    done = start(*train(one, *shape, *long, config=config), devices=4).wait()
    assert done.returncode == 0, done.stderr
    assert_close(two, one, 1e-6, steps=12)
    # One process goes on with what two have saved; a longer run is a drift that shapes no constant schedule.
    done = start(*train(two, *long, "--allow-drift", config=config)).wait()
    assert done.returncode == 0, done.stderr
    assert "allowed drift: train.steps: 12 -> 16" in done.stdout
    assert_close(two, one, 1e-5)


def test_sigterm_to_one_of_two_stops_both_at_the_same_step(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    long = ("train.steps=400", "checkpoint.every=200")
    both = [start(*train(run_dir, *long), devices=2, env=job | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
    wait_for(functools.partial(has_lines, run_dir, 4), both[0])
    both[1].process.send_signal(signal.SIGTERM)
    for running in both:
        done = running.wait(120)
        assert done.returncode == 75, done.stdout + done.stderr
    assert newest(run_dir) == len(steps_written(run_dir)) < 400
