"""Workers that take turns on one machine, so that what disturbs one disturbs all. Standard library only.

A worker says what it is in a line of JSON, and then answers each line on stdin, a number n, by n units of its work: a
line with their wall seconds, and the CPU seconds of all together. Everything else that it prints is chatter. Between
its turns it is stopped: threads that spin while they wait would take the cores from whoever has the turn.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

MARK = "@@"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = {"OMP_NUM_THREADS": str(CORES), "MKL_NUM_THREADS": str(CORES)}
# Whether threads of OpenMP sleep or spin while they wait for each other. Spinning may be faster on a machine with
# nothing else to do, and is tens of times slower on any other.
OMP = {"passive": "PASSIVE", "active": "ACTIVE"}
# A turn is quiet where others had no more than so many cores beside it.
QUIET = 0.4

About = dict[str, Any]


class Turn(NamedTuple):
    """Wall seconds of each unit, CPU seconds of all, and how many cores others kept busy meanwhile (None: unknown)."""

    seconds: list[float]
    cpu_seconds: float
    others: float | None

    @property
    def cpu_each(self) -> float:
        """CPU seconds of a unit."""
        return self.cpu_seconds / len(self.seconds)


Take = Callable[[int], Turn]


def timed(work: Callable[[], object], n: int) -> Turn:
    """n units of this process's own work."""
    seconds: list[float] = []
    busy, cpu_begun, begun = _busy(), time.process_time(), time.perf_counter()
    for _ in range(n):
        unit = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - unit)
    wall, cpu_seconds, busy_after = time.perf_counter() - begun, time.process_time() - cpu_begun, _busy()
    others = None if busy is None or busy_after is None else max(0.0, (busy_after - busy - cpu_seconds) / wall)
    return Turn(seconds, cpu_seconds, others)


def _busy() -> float | None:
    """CPU seconds of the whole machine so far, without niced processes; None where it does not tell."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    user, _, system, _, _, *interrupts = fields
    return (user + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def serve(about: About, work: Callable[[], object]) -> None:
    """A worker's part: says what it is, then answers until stdin ends."""
    print(MARK + json.dumps(about), flush=True)
    for line in sys.stdin:
        print(MARK + json.dumps(timed(work, int(line))), flush=True)


@contextmanager
def worker(command: Sequence[str], log: int, omp: str = "passive") -> Iterator[tuple[About, Take]]:
    """A worker in a process of its own, whose chatter goes to the file `log`; SystemExit where it gives no answer.

    omp: what its threads of OpenMP do while they wait, a name of OMP.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= THREADS | {"OMP_WAIT_POLICY": OMP[omp]}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def answer() -> Any:
            for line in answers:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
            sys.exit(f"{' '.join(command)}: no answer, exit code {process.wait()}")

        def take(n: int) -> Turn:
            process.send_signal(signal.SIGCONT)
            print(n, file=asked)
            turn = Turn(*answer())
            process.send_signal(signal.SIGSTOP)
            return turn

        about = answer()
        process.send_signal(signal.SIGSTOP)
        try:
            yield about, take
        finally:
            process.send_signal(signal.SIGCONT)
            asked.close()


def in_turns(takes: Mapping[str, Take], rounds: int, n: int, skip: int) -> dict[str, list[Turn]]:
    """Each worker's turns of n units after `skip` untimed ones, round after round; the first one closes, too."""
    turns: dict[str, list[Turn]] = {name: [] for name in takes}
    first = next(iter(takes))
    for name in [*list(takes) * rounds, first]:
        if skip:
            takes[name](skip)
        turns[name].append(takes[name](n))
        print(f"{name}: {1e3 * median(turns[name][-1].seconds):.0f} ms", file=sys.stderr, flush=True)
    return turns


def ratios(reference: Sequence[Turn], turns: Sequence[Turn], *, quiet: bool = False) -> tuple[list[float], list[float]]:
    """How many times faster than the reference around it each turn was, in wall and in CPU seconds.

    With quiet, of those rounds alone in which the machine had nothing else to do.
    """
    walls, cpus = [], []
    for before, turn, after in zip(reference, turns, reference[1:], strict=False):
        if quiet and any(each.others is None or each.others > QUIET for each in (before, turn, after)):
            continue
        walls.append(mean([median(before.seconds), median(after.seconds)]) / median(turn.seconds))
        cpus.append(mean([before.cpu_each, after.cpu_each]) / turn.cpu_each)
    return walls, cpus


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, lowest and highest."""
    return {
        name: round(value, digits)
        for name, value in (("median", median(values)), ("lowest", min(values)), ("highest", max(values)))
    }
