"""What every test starts from: a strict JAX on 8 emulated devices with a compile cache; and real processes."""

import dataclasses
import fcntl
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

JAX_VERSION = importlib.metadata.version("jax")
# A process of the program gets these and no more: it has to be right without the strictness below.
EMULATED = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    # Compiled code depends on the version. A folder of the repository's own: what it holds came from this machine.
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{JAX_VERSION}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# Half of the suite's time went into LLVM, which makes slower code of the same program here: the same collectives and
# orders of sums, rounded elsewhere at times, so what is compared is compiled alike. What is cut into parts for several
# threads is more work for all of them together. What the documents say to type, and the kill loop, run without this.
QUICKLY_COMPILED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if JAX_VERSION.startswith("0.10."):
    QUICKLY_COMPILED += " --xla_cpu_use_fusion_emitters=false"
STRICT = {
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_REMOVE_SIZE_ONE_MESH_AXIS_FROM_TYPE": "true",
    # Emulated devices may wait for each other for ever: llm_jax/distributed.py, which does it for the program.
    "XLA_FLAGS": f"--xla_cpu_enable_concurrency_optimized_scheduler=false {QUICKLY_COMPILED}",
}

# A job that a shell put into the background ignores Ctrl-C, and so would everything that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# JAX reads its environment once, when it is first imported; tests that need no JAX do not wait for it.
assert "jax" not in sys.modules, "JAX was imported before tests/conftest.py could set it up"
os.environ |= EMULATED | STRICT


# The files that take longest; begun last, they would keep one worker busy while the others wait.
LONGEST = (
    "test_docs",
    "test_kill_loop",
    "test_tiny_configs",
    "test_slurm",
    "test_invariance",
    "test_launch_local",
    "test_watchdog",
    "test_train_processes",
    "test_signals",
    "test_launch_docs",
    "test_disk_faults",
    "test_spikes",
    "test_elastic",
    "test_resume",
    "test_eval_watch",
    "test_launch_jobset",
    "test_attention",
    "test_eval_verbs",
    "test_eval_lm_harness",
    "test_distributed",
    "test_configs",
    "test_train",
    "test_eval_generate",
    "test_dev",
)


def pytest_configure() -> None:
    """Under nohup, children would ignore the SIGHUP that some tests send them."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all else in its order."""
    items.sort(key=lambda item: [*LONGEST, item.path.stem].index(item.path.stem))


@dataclasses.dataclass(frozen=True)
class Running:
    """A started process; its output goes to files, so that it never waits for a reader."""

    process: subprocess.Popen[str]
    stdout: Path
    stderr: Path

    def done(self) -> subprocess.CompletedProcess[str]:
        """What came of the process, so far if it has not ended."""
        texts = (self.stdout.read_text(errors="replace"), self.stderr.read_text(errors="replace"))
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, *texts)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """What came of the process; after timeout seconds it is killed and the test fails."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            shown = self.done()
            pytest.fail(f"not done after {timeout} s: {shown.args}\n{shown.stdout[-4000:]}\n{shown.stderr[-4000:]}")
        return self.done()

    def kill(self) -> None:
        """Ends the process and all that it has started, at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(*arguments, devices=1, env={}, cwd=tmp_path) starts `python *arguments` and returns at once.

    The process has its own emulated devices, shares the suite's compile cache, and is killed when the test ends.
    """
    outputs = tmp_path_factory.mktemp("outputs")
    started: list[Running] = []

    def start(*arguments: str, devices: int = 1, env: Mapping[str, str] | None = None, cwd: Path = tmp_path) -> Running:
        kept = {key: value for key, value in os.environ.items() if key not in (*STRICT, "PYTHONDONTWRITEBYTECODE")}
        kept |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICKLY_COMPILED, "JAX_NUM_CPU_DEVICES": str(devices)}
        kept |= env or {}
        stdout, stderr = (outputs / f"{len(started)}.{name}" for name in ("stdout", "stderr"))
        with stdout.open("w") as out, stderr.open("w") as err:
            command = [sys.executable, *arguments]
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=kept,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )
        started.append(Running(process, stdout, stderr))
        return started[-1]

    yield start
    for running in started:
        running.kill()


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(start: Start) -> Cli:
    """cli(*arguments, devices=1, env={}, cwd=tmp_path, timeout=300) runs `python -m llm_jax *arguments` to its end."""

    def cli(*arguments: str, timeout: float = 300, **process: Any) -> subprocess.CompletedProcess[str]:
        return start("-m", "llm_jax", *arguments, **process).wait(timeout)

    return cli


LaunchProcesses = Callable[..., list[subprocess.CompletedProcess[str]]]


@pytest.fixture
def launch_processes(start: Start) -> LaunchProcesses:
    """launch_processes(n, devices_each, arguments, env={}, timeout=300) runs `python *arguments` as one JAX job of n.

    The results are in the order of the processes; after timeout seconds all are killed and the test fails.
    """

    def launch_processes(
        n: int, devices_each: int, arguments: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> list[subprocess.CompletedProcess[str]]:
        job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(n), **(env or {})}
        processes = [start(*arguments, devices=devices_each, env=job | {"JAX_PROCESS_ID": str(i)}) for i in range(n)]
        deadline = time.monotonic() + timeout
        return [process.wait(max(deadline - time.monotonic(), 0)) for process in processes]

    return launch_processes


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    """Whether anybody on this machine listens on a TCP port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of tests/training.py's updates in one go, on one device; for reading only.

    The workers of a session share it: the first makes it, the others wait.
    """
    from tests.training import train

    mine = tmp_path_factory.getbasetemp()
    shared = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "uninterrupted"
    shared.mkdir(exist_ok=True)
    run_dir, made = shared / "run", shared / "made"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
            command = [sys.executable, *train(run_dir)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            made.touch()
    return run_dir
