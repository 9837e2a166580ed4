"""Notices that a run stands still, names the process that does, and ends it for a restart."""

import os
from types import TracebackType
from typing import Literal, Self

from llm_jax.train.config import WatchdogConfig

Phase = Literal["prepare", "restore", "compile", "data", "step", "checkpoint", "evaluation"]


class Watchdog:
    """A context in which this process's progress is watched."""

    def __init__(self, run_dir: str | os.PathLike[str], config: WatchdogConfig) -> None:
        self._run_dir = run_dir
        self._config = config

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def at(self, phase: Phase, step: int) -> None:
        """Progress: this process begins a phase after `step` updates. All processes say the same in the same order."""
