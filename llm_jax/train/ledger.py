"""Each update's metrics, fetched one step late so that the device never waits, judged, and written down."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from llm_jax.train.flops import FlopsPerToken, mfu
from llm_jax.train.metrics import Log


@dataclasses.dataclass(frozen=True)
class Wish:
    """Where a run that skipped too much wants to go on: before update first_skip, with the batch after `batch_index`.

    step: the last update judged; skips: of how many updates too many were skipped; rollbacks: how often it went before.
    """

    step: int
    batch_index: int
    skips: int
    first_skip: int
    rollbacks: int


class GoBack(Exception):
    """Too many updates were skipped; every process raises it after the same update."""

    def __init__(self, wish: Wish) -> None:
        super().__init__(wish)
        self.wish = wish


class Ledger:
    """Holds the update under way; its line is written when the device has finished it."""

    def __init__(
        self, log: Log, flops: FlopsPerToken, tokens_per_step: int, peak: float | None, n_devices: int, skips: int
    ) -> None:
        """flops: of a token; tokens_per_step: positions of an update; peak: FLOP/s of one device, None if not known;
        skips: so many skipped updates among the recent ones are too many."""
        self._log = log
        self._too_many = skips
        self._tokens_per_step = tokens_per_step
        self._mfu = functools.partial(mfu, flops=flops, peak=peak, n_devices=n_devices)
        self._under_way: tuple[int, Mapping[str, Any], float] | None = None
        self._window_start: float | None = None
        self._paused = 0.0
        self._saving = 0.0
        self.healthy = True
        """Whether the last settled update was made, and not skipped."""

    def post(self, step: int, metrics: Mapping[str, Any], wait_seconds: float) -> None:
        """Takes the update that was just dispatched, and settles the one before it."""
        self.settle()
        self._under_way = (step, metrics, wait_seconds)

    def settle(self) -> None:
        """Fetches and writes the update under way, if any. Raises GoBack where too many were skipped."""
        if self._under_way is None:
            return
        step, on_device, wait_seconds = self._under_way
        self._under_way = None
        metrics = {name: np.asarray(value).tolist() for name, value in jax.device_get(on_device).items()}
        skips, first_skip = metrics.pop("skips"), metrics.pop("first_skip")
        now = time.monotonic()
        # A window runs from one finished update to the next; the first one after a start has no beginning.
        seconds = None if self._window_start is None else now - self._window_start
        self._log.write({"step": step, **metrics, **self._speed(seconds, wait_seconds)})
        self._window_start, self._paused, self._saving = now, 0.0, 0.0
        self.healthy = metrics["finite"] and not metrics["spike"]
        if not self.healthy and skips >= self._too_many:
            raise GoBack(Wish(step, metrics["batch_index"], skips, first_skip, metrics["rollbacks"]))

    @contextlib.contextmanager
    def pause(self, *, saving: bool) -> Iterator[None]:
        """Around work during which no update is under way: a checkpoint's blocking part, or an evaluation."""
        self.settle()
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self._paused += seconds
            self._saving += seconds if saving else 0.0

    def _speed(self, seconds: float | None, wait_seconds: float) -> dict[str, float | None]:
        """Positions a second while training, MFU, and which share of the window data and checkpoints took."""
        if seconds is None:
            return {"tokens_per_s": None, "mfu": None, "data_wait": None, "checkpoint_stall": None}
        tokens_per_s = self._tokens_per_step / max(seconds - self._paused, 1e-9)
        return {
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
            "data_wait": min(wait_seconds / seconds, 1.0),
            "checkpoint_stall": min(self._saving / seconds, 1.0),
        }
