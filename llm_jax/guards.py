"""What may stop a run from outside: Ctrl-C and SIGTERM, noticed by all processes at the same step."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax._src import distributed  # only its client can say that a notice has come and nothing is agreed yet
from jax.experimental import multihost_utils

from llm_jax import exit_codes

AFTER_STEP = "stopping after this step; Ctrl-C again stops at once, without saving"
AFTER_BATCH = "stopping after this batch; Ctrl-C again stops at once"

# Where JAX's preemption service leaves word that a process got SIGTERM.
NOTICE = "RECEIVED_PREEMPTION_NOTICE"

Stop = Callable[[], bool]


def never() -> bool:
    """Nobody asks for a stop."""
    return False


class Guards:
    """A context in which the first signal asks for a stop, and a second Ctrl-C interrupts at once.

    In one process the handlers are ours. With several, SIGTERM belongs to JAX's preemption service, which agrees on one
    moment for all, and Ctrl-C is passed on to it. `promise` is what the first Ctrl-C is answered with.
    """

    def __init__(self, promise: str = AFTER_STEP) -> None:
        self._promise = promise
        self._asked: int | None = None
        self._tick = 0
        self._stopped = False
        self._previous: dict[signal.Signals, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> Self:
        signals = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        # Whoever left at once until now (early_signals) hears no more of it.
        self._wakeup = signal.set_wakeup_fd(-1)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stop(self) -> bool:
        """Whether to stop now: the same answer on all processes, which call it equally often, in the same places."""
        if not self._stopped:
            self._stopped = self._asked is not None if jax.process_count() == 1 else self._agreed()
        return self._stopped

    def heard(self) -> bool:
        """Whether stop() is going to say so; some processes know it before others, so only one may decide by it."""
        if jax.process_count() == 1 or self._stopped:
            return self._stopped or self._asked is not None
        client = distributed.global_state.client
        assert client is not None, "several processes without jax.distributed.initialize()"
        try:
            return bool(client.key_value_try_get(NOTICE))
        except jax.errors.JaxRuntimeError:  # there is no such key yet
            return False

    @property
    def stopped(self) -> bool:
        """Whether stop() has said so."""
        return self._stopped

    @property
    def exit_code(self) -> int:
        """130 where Ctrl-C stopped a single process, else 75: saved, run me again."""
        interrupted = self._asked == signal.SIGINT and jax.process_count() == 1
        return exit_codes.INTERRUPTED if interrupted else exit_codes.AGAIN

    def _agreed(self) -> bool:
        # The service compares ticks, and demands that they rise by one at every call.
        self._tick += 1
        return multihost_utils.reached_preemption_sync_point(self._tick)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        # Not print: the signal may have come in the middle of one.
        os.write(sys.stderr.fileno(), f"\n{self._promise}\n".encode())
