"""What the loop compiles after its first update: nothing, and where it does, which program, from where, and why.

The update is compiled before the loop, for its shapes and no others. A look at held-out rows, a save and whatever else
the loop does compile the first time that they are done; a program that comes later costs seconds, and its next shape
again.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from llm_jax.train.stalls import Phase

# Of each program once, whether the compiler or the cache on disk made it, in the thread that waits for it.
_COMPILED = "/jax/core/compile/backend_compile_duration"
# These explain themselves as warnings while JAX is asked why its caches missed.
_EXPLAINING = "jax._src.interpreters.partial_eval"
_LOGGERS = (_EXPLAINING, "jax._src.compiler", "jax._src.compilation_cache")
_PACKAGE = Path(__file__).parents[1]

# program, at (where it was called), cause, and seconds that it took.
Recompiled = dict[str, str | float]


class Recompiles:
    """What was compiled since the last question; `watched` fills it."""

    def __init__(self, *, explained: bool) -> None:
        """explained: whether somebody else wants JAX's explanations too."""
        self._explained = explained
        self._phases: set[Phase] = set()
        self._cause = ""
        self._new: list[Recompiled] = []
        self._unforeseen: list[Recompiled] = []

    def over(self, phase: Phase) -> None:
        """A phase of the loop has ended; what it compiled its first time was to be expected."""
        new, self._new = self._new, []
        if phase in self._phases:
            self._unforeseen += new
        self._phases.add(phase)

    def noted(self) -> dict[str, list[Recompiled]]:
        """For an update's line: each unforeseen program, if there was one."""
        new, self._unforeseen = self._unforeseen, []
        return {"recompiled": new} if new else {}

    def compiled(self, event: str, duration_secs: float, **facts: str | int) -> None:
        """Takes JAX's events."""
        if event == _COMPILED:
            program = str(facts.get("fun_name", "?")).removeprefix("jit(").removesuffix(")")
            cause, self._cause = self._cause or "unknown", ""
            told = {"program": program, "at": _caller(), "cause": cause, "seconds": round(duration_secs, 3)}
            self._new.append(told)

    def filter(self, record: logging.LogRecord) -> bool:
        """Takes JAX's explanations."""
        if record.name == _EXPLAINING:
            lines = [line.strip() for line in record.getMessage().splitlines()]
            differences = [line.removeprefix("* ") for line in lines if line.startswith("* ")]
            self._cause = "; ".join(differences) or ("a new function" if "never seen" in lines[1] else lines[-1])
        return self._explained


@contextlib.contextmanager
def watched() -> Iterator[Recompiles]:
    """Hears of every program that is compiled meanwhile, in this process."""
    explained = jax.config.values["jax_explain_cache_misses"]
    recompiles = Recompiles(explained=explained)
    jax.monitoring.register_event_duration_secs_listener(recompiles.compiled)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(recompiles)
    jax.config.update("jax_explain_cache_misses", True)
    try:
        yield recompiles
    finally:
        jax.config.update("jax_explain_cache_misses", explained)
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(recompiles)
        jax.monitoring.unregister_event_duration_listener(recompiles.compiled)


def _caller() -> str:
    """The innermost line of this package that is being executed, in this thread."""
    frame = sys._getframe()
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE) and file != Path(__file__):
            return f"{file.relative_to(_PACKAGE.parent)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
