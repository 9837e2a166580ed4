"""Notices that a run stands still, names the process that does, and ends it for a restart.

Two threads a process, and neither asks JAX anything, which may be what hangs. One counts seconds by its own ticks: a
process that was stopped and continued, or a machine that slept, has no ticks of that time, where a clock would raise a
false alarm. The other does all that touches the disk, which may hang as well; then the first ends the process alone.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import jax

from llm_jax.exit_codes import STALLED
from llm_jax.processes import settle
from llm_jax.train import stalls
from llm_jax.train.config import WatchdogConfig
from llm_jax.train.stalls import Alarm, Beat, Ended, Look, Phase, Progress, Verdict

HEARTBEATS = "heartbeats"
STALLS = "stalls"
_ALARM = "alarm.json"

TICK_S = 1.0
# Ticks between the two looks: a heartbeat comes every second, and a shared disk may be slow to show it.
LOOKS_APART = 3
# Process i raises the alarm i ticks late, at most so many: with a thousand processes, one of the first few that live
# reads all heartbeats, and the others see its alarm before they would.
LAST_TURN = 4
# Seconds for everybody's stacks, and how much longer process 0 stays: with it goes JAX's coordination service, which
# takes along whoever is left.
GATHER_S, POLL_S, HOST_STAYS_S = 4.0, 0.2, 1.0
# Ticks past the deadline, or after the alarm, when a process ends without its disk.
LAST_RESORT = 8
# The steps whose median counts, and how many updates must have begun before steps are known to be compiled: the loop
# waits for an update after it has begun the next.
_WINDOW = 64
_WARM = 2


class Watchdog:
    """A context in which this process's progress is watched; all processes of the job enter it together.

    Every second it writes heartbeats/<process>.json below the run directory. Where a phase takes too long, every
    process that lives writes all its stacks to stalls/<attempt>/<process>.txt and exits 76, with a line on stderr that
    names the culprit. A disk that fails never fails the training; then the stacks go to stderr.
    """

    def __init__(self, run_dir: str | os.PathLike[str], config: WatchdogConfig) -> None:
        self._run_dir = Path(run_dir)
        self._beats = self._run_dir / HEARTBEATS
        self._config = config
        self._process, self._processes, self._attempt = 0, 1, ""
        self._host = socket.gethostname()
        self.progress = Progress(0, "prepare", 0, first=True)
        """Where this process is."""
        self._begun, self._evaluated = 0, False
        self._step_began: float | None = None
        self._step_s: deque[float] = deque(maxlen=_WINDOW)
        self._counter, self._waited, self._overdue = 0, 0, -LAST_RESORT
        self._before: Look = {}
        self._looked_at: int | None = None
        self._verdict: Verdict | None = None
        self._attempt_seen, self._told = False, False
        self._over = threading.Event()
        self._ended: Ended = ""
        self._counting = threading.Thread(target=self._count, name="watchdog", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="watchdog's disk", daemon=True)

    def __enter__(self) -> Self:
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._attempt = settle("watchdog", "", self._begin)
        # Where C code keeps Python's lock, no thread of this process can tell. Then its heartbeat stands still, its
        # peers name it and leave, JAX aborts it, and this shows where it was.
        if not faulthandler.is_enabled():
            faulthandler.enable(file=2)
        self._counting.start()
        self._watching.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._verdict = self._verdict or self._read_alarm()
            if self._verdict is not None:
                # What failed is the collective that a peer has left, on an alarm that ends this process too: with 76.
                self._watching.join()
        self._ended = "done" if error is None else "failed"
        self._over.set()
        for thread in (self._watching, self._counting):
            thread.join(LAST_RESORT)

    def at(self, phase: Phase, step: int) -> None:
        """Progress: this process begins a phase after `step` updates. All processes say the same in the same order."""
        if phase == "step":
            # A clock is good enough for a median: time asleep is one outlier.
            began, self._step_began = self._step_began, time.monotonic()
            if began is not None:
                self._step_s.append(self._step_began - began)
            self._begun += 1
        elif phase != "data":
            self._step_began = None
        if phase == "restore":
            # After a rollback too: the looks at held-out rows are compiled anew.
            self._begun, self._evaluated = 0, False
        elif self.progress.phase == "evaluation" != phase:
            self._evaluated = True
        first = not self._evaluated if phase == "evaluation" else self._begun <= _WARM
        self.progress = Progress(self.progress.number + 1, phase, step, first)

    def _begin(self, _: list[str]) -> str:
        """Process 0 clears what earlier attempts left, and names this one."""
        attempt = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
        try:
            self._beats.mkdir(exist_ok=True)
            for path in self._beats.iterdir():
                path.unlink()
            # It is there from the start, since a shared disk may be slow to show a file that was missing before.
            self._write(self._beats / _ALARM, stalls.alarm_to_json(Alarm(attempt, None)))
        except OSError as error:
            self._complain(error.strerror or repr(error))
        return attempt

    # The thread that counts.

    def _count(self) -> None:
        seen, since_alarm = -1, 0
        while not self._over.wait(TICK_S):
            # Whatever happens here, the next tick comes.
            with contextlib.suppress(Exception):
                progress = self.progress
                self._waited = self._waited + 1 if progress.number == seen else 0
                seen = progress.number
                since_alarm += self._verdict is not None
                median = statistics.median(self._step_s.copy()) if self._step_s else None
                self._overdue = stalls.overdue(self._waited, stalls.limit_s(self._config, progress, median))
            if max(self._overdue, since_alarm) >= LAST_RESORT:
                self._end_without_disk()

    def _end_without_disk(self) -> NoReturn:
        def tell() -> None:
            _say(f"{self._line(self._verdict or Verdict('nobody was named: the disk hangs'))}; stacks:")
            faulthandler.dump_traceback(file=2)

        try:
            telling = threading.Thread(target=tell, daemon=True)
            telling.start()
            # Nobody may be reading stderr.
            telling.join(TICK_S)
        finally:
            os._exit(STALLED)

    # The thread that writes and reads.

    def _watch(self) -> None:
        over = False
        while not over:
            over = self._over.is_set()
            try:
                self._beat()
                self._verdict = self._read_alarm()
                if not over:
                    self._verdict = self._verdict or self._raise_if_due()
            except Exception as error:  # noqa: BLE001  whatever happens here, the next second comes
                self._complain(repr(error))
            if self._verdict is not None:
                self._end(self._verdict)
            self._over.wait(TICK_S)

    def _raise_if_due(self) -> Verdict | None:
        """Looks at everybody when the deadline is near, and once more, with a verdict, when it has passed."""
        overdue = self._overdue - min(self._process, LAST_TURN)
        if overdue < -LOOKS_APART:
            self._looked_at = None
        elif self._looked_at is None:
            self._before, self._looked_at = self._look(), self._counter
        elif overdue >= 0 and self._counter - self._looked_at >= LOOKS_APART:
            return self._raise()
        return None

    def _beat(self) -> None:
        self._counter += 1
        at = self.progress
        beat = Beat(
            self._attempt, self._counter, at.number, at.phase, at.step, self._host, os.getpid(), ended=self._ended
        )
        try:
            self._write(self._beats / f"{self._process}.json", json.dumps(dataclasses.asdict(beat)))
        except OSError as error:
            self._complain(error.strerror or repr(error))

    def _read_alarm(self) -> Verdict | None:
        """The verdict, where one was given; and where a later attempt has begun, this one is over."""
        try:
            alarm = stalls.alarm_from_json((self._beats / _ALARM).read_text(encoding="utf-8"))
        except OSError:
            return None
        if alarm is None:
            return None
        if alarm.attempt == self._attempt:
            self._attempt_seen = True
            return alarm.verdict
        # A disk that shows old files for a while shows the attempt before first.
        if not self._attempt_seen:
            return None
        return Verdict("this process is left over from an earlier attempt", tuple(range(self._processes)))

    def _look(self) -> Look:
        """Every process's heartbeat of this attempt."""
        look: dict[int, Beat] = {}
        for process in range(self._processes if self._processes > 1 else 0):
            with contextlib.suppress(OSError):
                beat = stalls.beat_from_json((self._beats / f"{process}.json").read_text(encoding="utf-8"))
                if beat is not None and beat.attempt == self._attempt:
                    look[process] = beat
        return look

    def _raise(self) -> Verdict:
        """Judges, and leaves the verdict where the others look every second."""
        verdict = stalls.judge(self._before, self._look(), self._processes, self._process)
        try:
            self._write(self._beats / _ALARM, stalls.alarm_to_json(Alarm(self._attempt, verdict)))
        except OSError as error:
            self._complain(error.strerror or repr(error))
        return verdict

    def _end(self, verdict: Verdict) -> NoReturn:
        """Stacks, a line, and out, when everybody has got so far."""
        try:
            self._verdict = verdict
            try:
                where = f"stacks in {self._write_stacks(verdict)}"
            except OSError as error:
                faulthandler.dump_traceback(file=2)
                where = f"stacks above, since {self._run_dir} cannot be written ({error.strerror})"
            _say(f"{self._line(verdict)}; {where}")
            self._gather(verdict)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(STALLED)

    def _line(self, verdict: Verdict) -> str:
        at = self.progress
        here = f"process {self._process} waited {self._waited} s in phase {at.phase} after {at.step} updates"
        return f"stalled: {verdict.culprit}; {here}"

    def _write_stacks(self, verdict: Verdict) -> Path:
        """All threads' stacks in a file that is there when it is whole. Raises OSError if it cannot be."""
        folder = self._run_dir / STALLS / self._attempt
        for each in (folder.parent, folder):
            each.mkdir(exist_ok=True)
        threads = ", ".join(f"{thread.name} 0x{thread.ident or 0:016x}" for thread in threading.enumerate())
        path = folder / f"{self._process}.txt"
        unfinished = folder / f".{self._process}"
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(f"{self._line(verdict)}\nhost {self._host}, pid {os.getpid()}; threads: {threads}\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file)
            # The dump is silent about a full disk; these two are not.
            file.write("\nend\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        return path

    def _gather(self, verdict: Verdict) -> None:
        """Waits until everybody that lives has written its stacks: whoever leaves changes what the others show."""
        if self._process in verdict.absent:
            return
        awaited = {f"{process}.txt" for process in range(self._processes) if process not in verdict.absent}
        for _ in range(int(GATHER_S / POLL_S) if self._processes > 1 else 0):
            with contextlib.suppress(OSError):
                if awaited <= set(os.listdir(self._run_dir / STALLS / self._attempt)):
                    break
            time.sleep(POLL_S)
        if self._process == 0 and self._processes > 1:
            time.sleep(HOST_STAYS_S)

    def _write(self, path: Path, text: str) -> None:
        """A whole file, or the one before. Raises OSError."""
        unfinished = path.with_name(f".{self._process}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)

    def _complain(self, reason: str) -> None:
        """Once: nothing that the watchdog cannot do stops the training."""
        if not self._told:
            self._told = True
            _say(f"heartbeats cannot be written in {self._beats} ({reason}); training goes on")


def _say(line: str) -> None:
    """A line on stderr, past Python's own lock on it, which a stuck thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
