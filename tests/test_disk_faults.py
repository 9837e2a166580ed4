"""A disk that is full, read-only, gone or without power in mid-run: exit code 74, and nothing that counts is lost."""

import contextlib
import functools
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_jax import durable
from llm_jax.checkpoint import Checkpoints
from llm_jax.launch.local import Exit, verdict
from llm_jax.train.config import LoggingConfig
from llm_jax.train.metrics import open_log
from tests.conftest import Running, Start, free_port
from tests.disks import Disk, small_disk
from tests.training import assert_same_history, has_lines, lines, newest, train, wait_for


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with contextlib.ExitStack() as mounted:
        try:
            disk = mounted.enter_context(small_disk(tmp_path / "image", tmp_path / "disk", mib=64))
        except OSError as error:
            pytest.skip(f"only root on Linux has disks to spare: {error}")
        yield disk


def program(planted: str = "") -> list[str]:
    """`llm-jax`, a fifth of a second slower at each update, so that a disk fails long before the last; with defects."""
    return ["-c", SLOWLY.format(planted=planted)]


SLOWLY = """
import sys, time
from llm_jax import durable
from llm_jax.train.metrics import Log
write = Log.write
def slowly(self, line):
    time.sleep(0.2)
    write(self, line)
Log.write = slowly
{planted}
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""

# The disk's end, its return, and what the kernel calls it.
Faults = dict[str, tuple[Callable[[Disk], None], Callable[[Disk], None], tuple[str, ...]]]
FAULTS: Faults = {
    "full": (Disk.fill, Disk.empty, ("No space left on device",)),
    "read-only": (Disk.become_read_only, Disk.come_back, ("Read-only file system", "Input/output error")),
    "without power": (Disk.lose_power, Disk.come_back, ("Input/output error",)),
}


def is_under_way(run_dir: Path, checkpoint: int) -> bool:
    # A number that can be seen is on the disk for certain when the next checkpoint has one.
    return has_lines(run_dir, 6) and newest(run_dir) >= checkpoint


def failed(running: Running, reasons: tuple[str, ...]) -> None:
    """It ended with 74 and a line that says why; one more may say that the heartbeats went first."""
    done = running.wait(120)
    assert done.returncode == 74, done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith("heartbeats cannot be written")]
    assert len(told) == 1 and any(reason in told[0] for reason in reasons), done.stderr


def fail_in_mid_run(disk: Disk, start: Start, fault: str, *overrides: str, planted: str = "") -> Path:
    """A run whose disk fails after some updates, and is back afterwards; returns where everybody sees its directory."""
    end, comeback, reasons = FAULTS[fault]
    run_dir = disk.at / "run"
    running = start(*disk.enter(*program(planted), *train(run_dir, *overrides)[2:]))
    checkpoint = 0 if "checkpoint.every=100" in overrides else 8
    wait_for(functools.partial(is_under_way, disk.seen(run_dir), checkpoint), running)
    end(disk)
    failed(running, reasons)
    comeback(disk)
    return disk.seen(run_dir)


@pytest.mark.parametrize(
    ("fault", "overrides"),
    [
        pytest.param("full", (), marks=pytest.mark.slow),
        # No checkpoint is due: what fails is the log.
        ("full", ("checkpoint.every=100", "checkpoint.minutes=null")),
        pytest.param("read-only", (), marks=pytest.mark.slow),
        pytest.param("without power", (), marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fails_is_code_74_and_the_run_goes_on_when_it_is_back(
    disk: Disk, start: Start, uninterrupted: Path, fault: str, overrides: tuple[str, ...]
) -> None:
    seen = fail_in_mid_run(disk, start, fault, *overrides)
    last = Checkpoints(seen / "checkpoints", read_only=True).newest_intact()
    assert (last or 0) == newest(seen) >= (0 if overrides else 4)
    done = start(*disk.enter(*train(disk.at / "run"))).wait()
    assert done.returncode == 0, done.stderr
    assert_same_history(seen, uninterrupted)


@pytest.mark.slow
def test_without_flushing_a_power_cut_takes_the_newest_checkpoint(disk: Disk, start: Start) -> None:
    seen = fail_in_mid_run(disk, start, "without power", planted="durable.flush_files = lambda paths: None")
    assert Checkpoints(seen / "checkpoints", read_only=True).newest_intact() != newest(seen)


@pytest.mark.slow
def test_a_checkpoint_before_its_lines_is_seen_by_the_comparison(disk: Disk, start: Start, uninterrupted: Path) -> None:
    """Committed although its lines are not on the disk: the power cut takes the lines and leaves the checkpoint."""
    seen = fail_in_mid_run(disk, start, "without power", planted="Log.sync = lambda self: None")
    assert Checkpoints(seen / "checkpoints", read_only=True).newest_intact()
    assert start(*disk.enter(*train(disk.at / "run"))).wait().returncode == 0
    with pytest.raises(AssertionError):
        assert_same_history(seen, uninterrupted)


@pytest.mark.slow
def test_a_directory_that_is_gone_is_code_74_and_not_made_anew(
    uninterrupted: Path, start: Start, tmp_path: Path
) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    running = start(*program(), *train(run_dir)[2:])
    wait_for(functools.partial(is_under_way, run_dir, 8), running)
    run_dir.rename(elsewhere)
    done = running.wait(120)
    assert done.returncode == 74, done.stderr
    assert "No such file or directory" in done.stderr or "NOT_FOUND" in done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()
    assert Checkpoints(elsewhere / "checkpoints", read_only=True).newest_intact() == newest(elsewhere) >= 4
    assert start(*train(elsewhere)).wait().returncode == 0
    assert_same_history(elsewhere, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("checkpoint.every=100", "checkpoint.minutes=null")])
def test_of_two_processes_both_end_and_the_launcher_hears_74(
    disk: Disk, start: Start, overrides: tuple[str, ...]
) -> None:
    """A checkpoint that fails is told to all. The log is process 0's alone: its peer ends because process 0 is gone."""
    run_dir = disk.at / "run"
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    command = disk.enter(*program(), *train(run_dir, *overrides)[2:])
    both = [start(*command, env=job | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
    wait_for(functools.partial(is_under_way, disk.seen(run_dir), 0 if overrides else 8), both[0])
    disk.become_read_only()
    first, second = (running.wait(60) for running in both)
    assert first.returncode == 74 and "Traceback" not in first.stderr, first.stderr
    assert second.returncode not in (0, 75), second.stderr
    exits = [Exit(i, done.returncode, by_us=False) for i, done in enumerate((first, second))]
    assert verdict(exits) == verdict(exits[::-1]) == 74
    disk.come_back()
    seen = disk.seen(run_dir)
    assert (Checkpoints(seen / "checkpoints", read_only=True).newest_intact() or 0) == newest(seen)


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process grows past so many bytes: the kernel's own refusal."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_log_that_cannot_grow_says_so_and_keeps_its_lines(tmp_path: Path, tensorboard: bool) -> None:
    logging = LoggingConfig(every=1000, tensorboard=tensorboard)

    def write_a_thousand() -> None:
        with open_log(tmp_path, 0, 1000, logging, writes=True) as log, files_up_to(4000):
            for step in range(1, 1001):
                log.write({"step": step, "loss": 1.5})

    with pytest.raises(durable.DiskError, match="cannot be written: File too large"):
        write_a_thousand()
    # TensorBoard's file is the first to be full; its update has its line.
    whole = (tmp_path / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].count(b"\n") + 1
    assert whole > 10
    with open_log(tmp_path, whole - 1, 1000, LoggingConfig(tensorboard=False), writes=True) as log:
        log.write({"step": whole, "loss": 1.5})
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, whole + 1)]


@pytest.mark.parametrize("change", ["remove", "replace"])
def test_lines_that_go_nowhere_are_noticed_before_a_checkpoint(tmp_path: Path, change: str) -> None:
    with open_log(tmp_path, 0, 10, LoggingConfig(tensorboard=False), writes=True) as log:
        log.write({"step": 1, "loss": 1.5})
        log.sync()
        (tmp_path / "metrics.jsonl").unlink()
        if change == "replace":
            (tmp_path / "metrics.jsonl").touch()
        with pytest.raises(durable.DiskError, match=r"metrics\.jsonl cannot be written"):
            log.sync()


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    durable.replace(path, b"old")
    with files_up_to(2), pytest.raises(OSError, match="File too large"):
        durable.replace(path, b"new")
    assert path.read_bytes() == b"old"
    durable.replace(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["config.json"]
