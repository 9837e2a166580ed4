"""The profiler's window, by config: a trace of a few updates, to be opened with xprof or Perfetto."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from llm_jax.train.config import LoggingConfig

Around = Callable[[int], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def profiled(cfg: LoggingConfig, run_dir: str) -> Iterator[Around]:
    """Gives a context for every update, by its number; those of the window are traced into <run_dir>/profile."""
    tracing = False

    @contextlib.contextmanager
    def around(step: int) -> Iterator[None]:
        nonlocal tracing
        in_window = cfg.profile_start is not None and 0 <= step - cfg.profile_start < cfg.profile_steps
        # Updates are settled one late: when the second after the window begins, the window's last one has ended.
        past_window = cfg.profile_start is not None and step - cfg.profile_start > cfg.profile_steps
        if tracing and past_window:
            jax.profiler.stop_trace()
            tracing = False
        if in_window and not tracing:
            jax.profiler.start_trace(str(Path(run_dir, "profile")))
            tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    try:
        yield around
    finally:
        if tracing:
            jax.profiler.stop_trace()
