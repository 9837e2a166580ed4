"""What the training loop adds to its device's work: python benchmarks/host.py --workload W2 [path=value ...]

The real loop (llm_jax.train.loop: prepared rows read by its thread, metrics fetched, judged and written, guards and
watchdog; no saves and no looks at held-out rows) takes turns with the compiled step alone, called again and again on
one batch. One JSON line. The device is idle from the end of an update until the next is handed to it; a thread that
waits for each update's loss sees the end, and the hand-over is the moment before the call. idle_share is that time's
share of the loop's. On an accelerator it is nothing as long as a step takes longer than host_ms, the CPU time that the
loop's own thread takes for an update: then the next is there before one ends. On a CPU the loop and the device share
cores too, which loop_over_bare tells: the loop's wall time over the step's alone.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
from jax import Array  # noqa: E402
from turns import About, spread  # noqa: E402
from workloads import WORKLOADS, random_rows  # noqa: E402

from llm_jax.checkpoint import Checkpoints  # noqa: E402
from llm_jax.config import override  # noqa: E402
from llm_jax.data.prepare import Prepared, open_prepared, prepare  # noqa: E402
from llm_jax.guards import Guards  # noqa: E402
from llm_jax.manifest import Kind  # noqa: E402
from llm_jax.mesh import acts, make_mesh  # noqa: E402
from llm_jax.model.backends import resolve  # noqa: E402
from llm_jax.run import Run, mesh_sizes  # noqa: E402
from llm_jax.train.flops import flops_per_token  # noqa: E402
from llm_jax.train.ledger import Ledger  # noqa: E402
from llm_jax.train.loop import Acts, train  # noqa: E402
from llm_jax.train.metrics import open_log  # noqa: E402
from llm_jax.train.start import Session, Step, compile_programs  # noqa: E402
from llm_jax.train.state import TrainState, init_state  # noqa: E402
from llm_jax.train.step import Metrics  # noqa: E402
from llm_jax.train.watchdog import Watchdog  # noqa: E402


class Recorded:
    """A step that writes down when each update was handed over, and when it ended."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._under_way: SimpleQueue[Array | None] = SimpleQueue()
        self._waiting = threading.Thread(target=self._wait)
        self.handed: list[float] = []
        self.ended: list[float] = []
        self._waiting.start()

    def __call__(self, state: TrainState, rows_ABU: Array) -> tuple[TrainState, Metrics]:
        """The step."""
        self.handed.append(time.perf_counter())
        state, metrics = self._step(state, rows_ABU)
        self._under_way.put(metrics["loss"])
        return state, metrics

    def _wait(self) -> None:
        while (loss := self._under_way.get()) is not None:
            loss.block_until_ready()
            self.ended.append(time.perf_counter())

    def idle(self) -> list[float]:
        """Seconds without an update between two, once all have ended; the first two are not counted."""
        self._under_way.put(None)
        self._waiting.join()
        gaps = [max(0.0, handed - ended) for handed, ended in zip(self.handed[1:], self.ended, strict=False)]
        return gaps[1:]

    def each(self) -> float:
        """Seconds of an update, from end to end."""
        return (self.ended[-1] - self.ended[0]) / (len(self.ended) - 1)


def looped(run: Run, prepared: Prepared, state: TrainState, step: Recorded) -> float:
    """The real loop over run.train.steps updates; returns the CPU seconds of this thread for each."""

    def not_saved(done: int, state: TrainState, kind: Kind) -> None: ...

    def not_validated(done: int, state: TrainState) -> None: ...

    def not_replayed(number: int, state: TrainState, rows_ABU: Array) -> dict[str, int]:
        return {}

    with (
        tempfile.TemporaryDirectory() as folder,
        Guards() as guards,
        Watchdog(folder, run.watchdog) as watch,
        open_log(folder, 0, run.train.steps, run.logging, writes=True) as log,
    ):
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1)
        session = Session(run, jax.sharding.get_mesh(), prepared, checkpoints, state, done=0)
        flops = flops_per_token(run.model, run.data.seq_len, run.objective)
        ledger = Ledger(log, flops, run.tokens_per_step, None, session.mesh.size, run.spikes.skips)
        begun = time.thread_time()
        does = Acts(not_saved, not_validated, not_replayed)
        train(session, step, guards, watch, ledger, does, validated=0)
        seconds = time.thread_time() - begun
        checkpoints.close()
    return seconds / run.train.steps


def bare(updates: int, state: TrainState, rows_ABU: Array, step: Recorded) -> float:
    """The step alone, handed over again as soon as the update before the last has ended; this thread's CPU seconds."""
    begun = time.thread_time()
    before = None
    for _ in range(updates):
        state, metrics = step(state, rows_ABU)
        if before is not None:
            before.block_until_ready()
        before = metrics["loss"]
    jax.block_until_ready(state)
    return (time.thread_time() - begun) / updates


def measure(name: str, run: Run, rounds: int, report: Callable[[str], Any]) -> About:
    """The figures of one line."""
    wanted = (run.data, run.tokenizer, run.model.vocab_size, run.seed)
    prepare(*wanted, report=report, stop=lambda: False)
    prepared = open_prepared(*wanted)
    mesh = make_mesh(mesh_sizes(run.mesh, jax.device_count()))
    device = mesh.devices.flat[0]
    run = run.model_copy(update={"model": resolve(run.model, device.platform, mesh.shape["expert"])})
    figures: dict[str, list[float]] = {"loop": [], "bare": [], "idle": [], "idle_bare": [], "host": [], "host_bare": []}
    with jax.set_mesh(mesh):
        program = compile_programs(run, mesh, prepared.tokenizer.word_starts, report).step
        first = jax.jit(lambda: init_state(run.model, run.optim, run.seed, run.spikes))
        rows_ABU = jax.device_put(random_rows(run), jax.NamedSharding(mesh, acts("ABU")))
        for which in ("bare", "loop", *("bare", "loop") * rounds):
            step = Recorded(program)
            state = jax.block_until_ready(first())
            looping = which == "loop"
            with contextlib.redirect_stdout(sys.stderr):
                host = looped(run, prepared, state, step) if looping else bare(run.train.steps, state, rows_ABU, step)
            idle = statistics.mean(step.idle())
            ending = "" if looping else "_bare"
            for figure, value in ((which, step.each()), (f"idle{ending}", idle), (f"host{ending}", host)):
                figures[figure].append(value)
    # The first turn of each warms up.
    timed = {figure: values[1:] for figure, values in figures.items()}
    shares = [idle / each for idle, each in zip(timed["idle"], timed["loop"], strict=True)]
    over = [loop / alone for loop, alone in zip(timed["loop"], timed["bare"], strict=True)]
    return {
        "workload": name,
        "updates": run.train.steps,
        "idle_share": spread(shares, 5),
        "loop_over_bare": spread(over),
        **{f"{figure}_ms": spread([1e3 * value for value in values]) for figure, values in timed.items()},
        "device": device.device_kind,
        "n_devices": mesh.size,
        "jax": jax.__version__,
    }


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="change a field of the workload's run")
    parser.add_argument("--workload", choices=WORKLOADS, default="W2", help="which model and batch (default W2)")
    parser.add_argument("--updates", type=int, default=12, help="updates of a turn (default 12)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, after one to warm up (default 5)")
    arguments = parser.parse_intermixed_args()
    run = override(WORKLOADS[arguments.workload], [f"train.steps={arguments.updates}", "eval.every=0"])
    run = override(run, arguments.overrides)
    print(json.dumps(measure(arguments.workload, run, arguments.rounds, lambda line: print(line, file=sys.stderr))))


if __name__ == "__main__":
    main()
