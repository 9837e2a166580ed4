"""Batches by random access: batch t is a function of (seed, t), for any number of processes and any prefetch depth."""

import itertools
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, cast

import grain
import jax
import numpy as np

from llm_jax.data import stages, store
from llm_jax.data.config import PAD_ID
from llm_jax.data.errors import DataError
from llm_jax.data.prepare import Prepared
from llm_jax.data.store import Records


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a split, indexed by arrays: rows[index_N] is int32 [N, U], U = T + 1.

    Shuffled: an endless sequence of epochs, each of them all rows in another order. In stored order: each row once, and
    what lies past the end is all padding, so that whole batches may be asked for.
    """

    records: Records
    row_tokens: int
    """U = T + 1."""
    dtype: np.dtype
    """How tokens are stored."""
    order: grain.MapDataset[int] | None
    """Position in the endless sequence -> stored row; None: as stored."""

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.records)

    def __getitem__(self, index_N: np.ndarray) -> np.ndarray:
        n_rows = len(self)
        if self.order is None:
            stored = [int(i) for i in index_N if i < n_rows]
        else:
            stored = [cast(int, self.order[int(i)]) for i in index_N]
        read = self._decoded(self.records.__getitems__(stored)) if stored else np.empty((0, self.row_tokens), np.int32)
        if len(read) == len(index_N):
            return read
        rows_NU = np.full((len(index_N), self.row_tokens), PAD_ID, np.int32)
        rows_NU[index_N < n_rows] = read
        return rows_NU

    def _decoded(self, records: Sequence[bytes]) -> np.ndarray:
        """int32 [N, U]. The tokens are the end of the serialised example, its only feature being their bytes; reading
        them there instead of parsing each example is five times faster, and `open_rows` proves it right."""
        raw_NX = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)
        raw_NX = np.ascontiguousarray(raw_NX[:, -self.row_tokens * self.dtype.itemsize :])
        return raw_NX.view(self.dtype).astype(np.int32)


def open_rows(prepared: Prepared, split: str, seed: int | None = None) -> Rows:
    """The rows of a split: with a seed shuffled anew each epoch, without one in stored order.

    Raises DataError where the split has no rows.
    """
    n_rows = prepared.rows_info["splits"][split]["rows"]
    if not n_rows:
        raise DataError(f"the {split} split has no rows; raise data.{split}_share, or give more text")
    records = store.open_split(prepared.rows, stages.ROWS, split, store.RAW_BYTES)
    order = None if seed is None else _endless_order(n_rows, seed)
    rows = Rows(records, prepared.seq_len + 1, np.dtype(prepared.rows_info["dtype"]), order)
    parsed = store.open_split(prepared.rows, stages.ROWS, split).__getitems__([0])[0]["tokens"]
    if len(records) != n_rows or not np.array_equal(rows._decoded(records.__getitems__([0]))[0], parsed):
        raise DataError(f"{prepared.rows} is not what was written; delete it and prepare again")
    return rows


def _endless_order(n_rows: int, seed: int) -> grain.MapDataset[int]:
    """All rows, then all rows in another order, and so on.

    Grain adds the epoch's number to the seed, so neighbouring seeds are taken apart first; by numpy's SeedSequence,
    which is the same in every version, and not by Grain, which promises nothing.
    """
    far_apart = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(n_rows).shuffle(seed=far_apart).repeat(None)


def batch(rows: Rows, t: int, *, batch_rows: int, accumulation: int, sharding: jax.sharding.Sharding) -> jax.Array:
    """Batch t as int32 rows_ABU of global shape [accumulation, batch_rows / accumulation, T + 1].

    Microbatch a holds the a-th block: rows_ABU[a, b] is row t * batch_rows + a * (batch_rows / accumulation) + b of the
    sequence. A process reads the rows that its devices hold, each once, even where several devices hold the same.
    """
    shape = (accumulation, batch_rows // accumulation, rows.row_tokens)
    index_AB = t * batch_rows + np.arange(batch_rows).reshape(shape[:2])
    needed_AB = np.zeros(shape[:2], bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        needed_AB[(index or ())[:2]] = True
    place_AB = np.cumsum(needed_AB).reshape(shape[:2]) - 1
    rows_NU = rows[index_AB[needed_AB]]

    def held(index: tuple[slice, ...] | None) -> np.ndarray:
        a, b, u = index or (slice(None),) * 3
        return rows_NU[place_AB[a, b]][..., u]

    with jax.transfer_guard_host_to_device("allow"):  # here it is meant, whatever is forbidden around it
        return jax.make_array_from_callback(shape, sharding, held)


class Fetched(NamedTuple):
    """A batch, and how long it was waited for."""

    t: int
    rows_ABU: jax.Array
    wait_seconds: float


def stream(
    rows: Rows, *, start: int, batch_rows: int, accumulation: int, sharding: jax.sharding.Sharding, prefetch: int
) -> Generator[Fetched, None, None]:
    """Batches start, start + 1, ... without end; `prefetch` of them are read ahead by a thread (0: none, no thread).

    An error while reading is raised here, as itself. Closing the iterator waits for the read under way, at most.
    """

    def fetch(t: int) -> jax.Array:
        return batch(rows, t, batch_rows=batch_rows, accumulation=accumulation, sharding=sharding)

    if prefetch == 0:
        for t in itertools.count(start):
            begin = time.monotonic()
            rows_ABU = fetch(t)
            yield Fetched(t, rows_ABU, time.monotonic() - begin)
    with ThreadPoolExecutor(1, thread_name_prefix="rows") as thread:
        ahead: deque[Future[jax.Array]] = deque(thread.submit(fetch, start + i) for i in range(prefetch))
        try:
            for t in itertools.count(start):
                begin = time.monotonic()
                rows_ABU = ahead.popleft().result()
                waited = time.monotonic() - begin
                ahead.append(thread.submit(fetch, t + prefetch))
                yield Fetched(t, rows_ABU, waited)
        finally:
            for future in ahead:
                future.cancel()
