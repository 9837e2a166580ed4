"""Signals before there is anything to save: this process leaves at once, even while C++ keeps Python waiting."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from llm_jax import exit_codes

CODES = {signal.SIGTERM: exit_codes.AGAIN, signal.SIGINT: exit_codes.INTERRUPTED}


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Until Guards take over, SIGTERM ends this process with 75 and Ctrl-C with 130. For the main thread.

    A handler in Python has to wait for the C++ call that the main thread is in, and joining other processes is one of
    minutes. The wakeup descriptor is written to at once, and a thread reads it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_leave_when_told, args=(reader,), name="early signals", daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(writer)
    # A shell gives Ctrl-C to a background job as ignored; then it stays so.
    handled = [number for number in CODES if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _leave_it_to_the_thread) for number in handled}
    try:
        yield
    finally:
        jax = sys.modules.get("jax")
        for number, handler in previous.items():
            # Of several processes SIGTERM is JAX's by now, and they are about to wait for each other.
            if number != signal.SIGTERM or jax is None or not jax.distributed.is_initialized():
                signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        thread.join()
        os.close(reader)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Python writes to the descriptor only for signals that have a handler in Python."""


def _leave_when_told(reader: int) -> None:
    while told := os.read(reader, 1):
        if told[0] in CODES:
            print("stopped at once: nothing had begun that would have to be saved", file=sys.stderr, flush=True)
            os._exit(CODES[signal.Signals(told[0])])
