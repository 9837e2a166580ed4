"""What may stop a run from outside: Ctrl-C and SIGTERM, noticed by all processes at the same step."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from llm_jax import exit_codes


class Guards:
    """A context in which the first signal asks for a stop, and a second Ctrl-C interrupts at once.

    In one process the handlers are ours. With several, SIGTERM belongs to JAX's preemption service, which agrees on one
    moment for all, and Ctrl-C is passed on to it.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._tick = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        signals = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stop(self) -> bool:
        """Whether to stop now: the same answer on all processes, which call it equally often, in the same places."""
        if jax.process_count() == 1:
            return self._asked is not None
        # The service compares ticks, and demands that they rise by one at every call.
        self._tick += 1
        if multihost_utils.reached_preemption_sync_point(self._tick):
            self._asked = self._asked or signal.SIGTERM
            return True
        return False

    @property
    def exit_code(self) -> int:
        """130 where Ctrl-C stopped a single process, else 75: saved, run me again."""
        interrupted = self._asked == signal.SIGINT and jax.process_count() == 1
        return exit_codes.INTERRUPTED if interrupted else exit_codes.AGAIN

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        print("\nstopping after this step; Ctrl-C again stops at once, without saving", file=sys.stderr, flush=True)
