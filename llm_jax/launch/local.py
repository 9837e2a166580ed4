"""A job's processes on this machine, as a cluster would run them: one job, one output, one exit code."""

import contextlib
import ctypes
import dataclasses
import math
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, TextIO

from llm_jax.config import ConfigError
from llm_jax.exit_codes import AGAIN, CHECKPOINT, DATA, DONE, INTERRUPTED, NO, NON_FINITE, USAGE
from llm_jax.launch.config import LocalResources
from llm_jax.launch.job import Job, as_exit_code, is_retried, is_saved, tell

PROGRAM = (sys.executable, "-m", "llm_jax")

# Whoever ends with one of these has said what is wrong; 1 and a death by signal may also be the echo of a peer's end.
_TOLD = (USAGE, NO, DATA, NON_FINITE, CHECKPOINT)
# What asks the launcher to stop; nohup leaves SIGHUP ignored.
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# From the last process's end to the last line of what it wrote; a helper of its own that holds the pipe open is left.
_LAST_LINES_S = 5.0
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Exit:
    """How a process ended: as subprocess says it, and whether it was we who ended it."""

    process: int
    returncode: int
    by_us: bool = False


@dataclasses.dataclass(frozen=True)
class Ended:
    """Event: a process is gone."""

    process: int
    returncode: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """Event: the launcher got a signal that asks it to stop."""

    signal: int


@dataclasses.dataclass(frozen=True)
class Unread:
    """Event: nobody takes the output any more."""

    error: OSError


Event = Ended | Asked | Unread
Events = queue.SimpleQueue[Event]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What came of all processes: their exits in the order of time, and the first signal that asked us to stop."""

    exits: tuple[Exit, ...]
    asked: int | None


def render(job: Job, resources: LocalResources) -> str:
    """The shell commands that the processes would be started with, once. Raises ConfigError as run does."""
    command = shlex.join([*PROGRAM, *job.command(0)])
    starts = []
    for variables in environments(resources, free_port()):
        told = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        starts.append(f"{told} \\\n  {command} &\n")
    return "".join([*starts, "wait\n"])


def run(job: Job, resources: LocalResources, program: Sequence[str] = PROGRAM) -> int:
    """Runs the job to its end, restarts included; returns its exit code.

    program is the llm-jax that is started. Raises ConfigError where the resources set what only the launcher can know.
    """
    command = [*program, *job.command(0)]
    events: Events = queue.SimpleQueue()
    restarts, n_attempts = 0, 1
    with _asking(events):
        while True:
            attempt = run_once(command, environments(resources, free_port()), events, resources.grace_seconds)
            code = verdict(attempt.exits)
            if attempt.asked is not None:
                return exit_code_when_asked(code, attempt.asked)
            if not is_restarted(code, restarts, resources.restarts):
                if code != DONE:
                    limit = f"; all {restarts} restarts are used up" if is_retried(code) else ""
                    _say(f"attempt {n_attempts} ended with {tell(code)}{limit}")
                return code
            restarts += is_retried(code)
            counted = f", restart {restarts} of {resources.restarts}" if is_retried(code) else ""
            n_attempts += 1
            _say(f"attempt {n_attempts - 1} ended with {tell(code)}; attempt {n_attempts} begins{counted}")


def environments(resources: LocalResources, port: int) -> list[dict[str, str]]:
    """The variables that each process gets beside the launcher's own. Raises ConfigError for one that is set twice."""
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(resources.processes)}
    ours = {**job, "JAX_PROCESS_ID": "", "JAX_NUM_CPU_DEVICES": str(resources.devices)}
    twice = [name for name in resources.environment if name in ours]
    if twice:
        raise ConfigError(*(f"environment.{name}: the launcher sets it; leave it out" for name in twice))
    rest = {"JAX_PLATFORMS": "cpu", **resources.environment}
    return [{**ours, "JAX_PROCESS_ID": str(process), **rest} for process in range(resources.processes)]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def verdict(exits: Sequence[Exit]) -> int:
    """The exit code of all processes together, whose ends come in the order of time.

    The first that failed decides, since the others only follow it, unless one of them tells what is wrong. Whom we
    ended decides only where nobody failed: a job of which a part was saved is saved, and one of which a part was done
    is not.
    """
    failed = [exit for exit in exits if exit.returncode not in (DONE, AGAIN)]
    told = [exit.returncode for exit in failed if exit.returncode in _TOLD]
    if told:
        return told[0]
    saved = any(exit.returncode == AGAIN for exit in exits)
    if failed and not (saved and all(exit.by_us for exit in failed)):
        return as_exit_code(failed[0].returncode)
    return AGAIN if saved else DONE


def is_restarted(code: int, restarts: int, limit: int) -> bool:
    """Whether a job that ended with that exit code is begun again, after so many restarts that counted."""
    return is_saved(code) or (is_retried(code) and restarts < limit)


def exit_code_when_asked(code: int, asked: int) -> int:
    """The launcher's exit code after a signal had asked it to stop; code is the job's.

    Processes that were killed, by us in the end, left their last checkpoint: the job can be run again all the same.
    """
    if is_saved(code) or is_retried(code) or code == INTERRUPTED:
        return INTERRUPTED if asked == signal.SIGINT else AGAIN
    return code


def run_once(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], events: Events, grace_s: float
) -> Attempt:
    """Starts the command once in each environment, and returns when all are gone; none outlives the call.

    After the first failure the others get SIGTERM, and grace_s later SIGKILL; after a process that ended well they have
    grace_s before that. A signal that asks for a stop goes on as SIGTERM; a second Ctrl-C kills. Raises OSError where
    the output cannot be written.
    """
    processes: list[subprocess.Popen[bytes]] = []
    exits: list[Exit] = []
    signals: list[int] = []
    unread, stopping, deadline = None, False, math.inf
    try:
        for variables in environments:
            processes.append(_start(command, variables))
        readers = _watch(processes, events)
        while len(exits) < len(processes):
            fails = ""
            match _next(events, deadline):
                case Ended(process, returncode):
                    by_us = (stopping or bool(signals)) and returncode in (-signal.SIGTERM, -signal.SIGKILL)
                    exits.append(Exit(process, returncode, by_us))
                    if returncode in (DONE, AGAIN):
                        deadline = min(deadline, time.monotonic() + grace_s)
                    else:
                        fails = f"process {process} ended with {tell(as_exit_code(returncode))}"
                case Asked(number):
                    if number == signal.SIGINT and signal.SIGINT in signals:
                        _kill(processes)
                    elif not signals:
                        _say(f"{signal.Signals(number).name}: the processes save and end; a second Ctrl-C kills them")
                    signals.append(number)
                    _terminate(processes)
                case Unread(error):
                    unread, fails = error, "the output cannot be written"
                case None if stopping:
                    _say(f"{_left(processes, exits)} did not end within {grace_s:g} s of SIGTERM: SIGKILL")
                    _kill(processes)
                    deadline = math.inf
                case None:
                    fails = f"{_left(processes, exits)} did not end within {grace_s:g} s of the others"
            if fails and not stopping and len(exits) < len(processes):
                _say(f"{fails}; SIGTERM to {_left(processes, exits)}")
                _terminate(processes)
                stopping, deadline = True, time.monotonic() + grace_s
        _join(readers)
    finally:
        _kill(processes)
    if unread is not None:
        raise unread
    return Attempt(tuple(exits), signals[0] if signals else None)


def _start(command: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process with its own session and group, which sees no terminal and dies with this one."""
    # Without a terminal rich believes these; and what a process wrote last must not be lost with it.
    inherited = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    return subprocess.Popen(
        command,
        env={**inherited, "PYTHONUNBUFFERED": "1", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_tie_to_us() if sys.platform == "linux" else None,
    )


def _tie_to_us() -> Callable[[], None]:
    """What a child of this thread calls first, so that it gets SIGKILL when this thread ends, however it ends."""
    prctl, us = ctypes.CDLL(None).prctl, os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != us:  # too late: it has gone in between
            os.kill(os.getpid(), signal.SIGKILL)

    return tie


def _watch(processes: Sequence[subprocess.Popen[bytes]], events: Events) -> list[threading.Thread]:
    """Threads that report ends, and threads that hand on the output until there is no more: these are returned."""
    lock = threading.Lock()
    readers = []
    for number, process in enumerate(processes):
        assert process.stdout is not None and process.stderr is not None
        for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            readers.append(threading.Thread(target=_hand_on, args=(source, number, sink, lock, events), daemon=True))
        threading.Thread(target=_report_end, args=(process, number, events), daemon=True).start()
    for reader in readers:
        reader.start()
    return readers


def _report_end(process: subprocess.Popen[bytes], number: int, events: Events) -> None:
    returncode = process.wait()
    # What it has started and left behind holds the pipes open. Its group is free for another once it is empty: now.
    _kill_group(process.pid)
    events.put(Ended(number, returncode))


def _hand_on(source: IO[bytes], number: int, sink: TextIO, lock: threading.Lock, events: Events) -> None:
    """Writes each line with the process's number before it; what nobody reads is still taken off the pipe."""
    unread = False
    for line in source:
        if unread:
            continue
        try:
            with lock:
                sink.buffer.write(b"[%d] %s%s" % (number, line, b"" if line.endswith(b"\n") else b"\n"))
                sink.buffer.flush()
        except OSError as error:
            events.put(Unread(error))
            unread = True
    source.close()


def _join(readers: Sequence[threading.Thread]) -> None:
    deadline = time.monotonic() + _LAST_LINES_S
    for reader in readers:
        reader.join(max(deadline - time.monotonic(), 0))


def _next(events: Events, deadline: float) -> Event | None:
    """The next event, or None when the deadline passes first."""
    try:
        return events.get(timeout=None if deadline == math.inf else max(deadline - time.monotonic(), 0))
    except queue.Empty:
        return None


def _terminate(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to those that live, and not to their helpers: they may need them to save."""
    for process in processes:
        process.send_signal(signal.SIGTERM)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGKILL to those that live, with all that they have started; it ends what is stopped too."""
    for process in processes:
        if process.poll() is None:
            _kill_group(process.pid)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _left(processes: Sequence[subprocess.Popen[bytes]], exits: Sequence[Exit]) -> str:
    """Who has not ended, in words."""
    left = sorted(set(range(len(processes))) - {exit.process for exit in exits})
    return f"process{'es' if len(left) > 1 else ''} {', '.join(map(str, left))}"


@contextlib.contextmanager
def _asking(events: Events) -> Iterator[None]:
    """Signals that ask for a stop become events."""
    numbers = [number for number in _ASKING if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: events.put(Asked(number))) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)
