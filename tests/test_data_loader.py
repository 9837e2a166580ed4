"""Batch t is a function of (seed, t): not of epochs before it, microbatches, meshes, processes or read-ahead."""

import dataclasses
import hashlib
import itertools
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import NamedSharding, P

from llm_jax.config import to_json
from llm_jax.data import stages, store
from llm_jax.data.config import PAD_ID
from llm_jax.data.loader import Rows, _endless_order, batch, open_rows, stream
from llm_jax.data.prepare import Prepared, prepare
from llm_jax.mesh import acts
from tests import data_texts
from tests.conftest import LaunchProcesses, Start
from tests.data_texts import BPE, VOCAB
from tests.small import mesh_of, slowly


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = data_texts.write_files(tmp_path_factory.mktemp("texts"))
    data = data_texts.config(folder, into=tmp_path_factory.mktemp("data"))
    return prepare(data, BPE, VOCAB, 0, report=lambda line: None)


@pytest.fixture
def rows(prepared: Prepared) -> Rows:
    return open_rows(prepared, "train", seed=3)


@dataclasses.dataclass
class Watched:
    """Records that remember what was read, and may be slow or broken."""

    records: store.Records
    read: list[int] = dataclasses.field(default_factory=list)
    seconds: float = 0
    broken_after: int = 10**9

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, numbers: Sequence[int]) -> Sequence[bytes]:
        time.sleep(self.seconds)
        if len(self.read) >= self.broken_after:
            raise ZeroDivisionError("planted")
        self.read += numbers
        return self.records.__getitems__(numbers)


def watched(rows: Rows, **how: float) -> tuple[Rows, Watched]:
    records = Watched(rows.records, **how)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(rows, records=records), records


def sharding(**sizes: int) -> NamedSharding:
    return NamedSharding(mesh_of(**sizes), acts("ABU"))


ALONE = {"batch_rows": 8, "accumulation": 1}


def position_of(rows_NU: np.ndarray, stored_NU: np.ndarray) -> list[int]:
    """Which stored row each is; stored rows are all different."""
    numbers = {row.tobytes(): i for i, row in enumerate(stored_NU)}
    assert len(numbers) == len(stored_NU)
    return [numbers[row.tobytes()] for row in rows_NU]


def test_every_epoch_is_all_rows_in_another_order(prepared: Prepared, rows: Rows) -> None:
    n = len(rows)
    stored_NU = open_rows(prepared, "train")[np.arange(n)]
    epochs = [position_of(rows[np.arange(n) + e * n], stored_NU) for e in (0, 1, 2, 1000)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for one, other in itertools.pairwise(epochs):
        assert np.mean(np.array(one) == np.array(other)) < 0.05
    neighbour = open_rows(prepared, "train", seed=4)
    assert position_of(neighbour[np.arange(n)], stored_NU) not in epochs, "seeds must not share their epochs"


def test_batches_divide_the_sequence(rows: Rows) -> None:
    n = len(rows)
    whole = sharding()
    together = np.concatenate([np.asarray(batch(rows, t, **ALONE, sharding=whole))[0] for t in range(2 * n // 8)])
    np.testing.assert_array_equal(together, rows[np.arange(2 * n // 8 * 8)])


def test_the_order_is_pinned() -> None:
    """A run goes on in the order it began, whatever version of what is installed: change this only with FORMAT."""
    order = _endless_order(1000, 0)
    assert [order[i] for i in (0, 1, 2, 999, 1000, 10**9)] == [233, 815, 962, 157, 83, 810]


def test_microbatch_a_is_the_ath_block(rows: Rows) -> None:
    whole = sharding()
    one = np.asarray(batch(rows, 5, batch_rows=8, accumulation=1, sharding=whole))
    np.testing.assert_array_equal(one[0], rows[np.arange(40, 48)])
    for accumulation in (2, 4, 8):
        some = batch(rows, 5, batch_rows=8, accumulation=accumulation, sharding=whole)
        assert some.shape == (accumulation, 8 // accumulation, 33) and some.dtype == np.int32
        np.testing.assert_array_equal(np.asarray(some).reshape(one.shape), one)


MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "data": {"data": 8},
    "fsdp and tensor": {"fsdp": 2, "tensor": 4},
    "context": {"context": 2, "fsdp": 2, "tensor": 2},
    "expert": {"data": 2, "expert": 4},
}


@pytest.mark.parametrize("mesh", MESHES)
def test_meshes_hold_the_same_batch_and_read_each_row_once(mesh: str, rows: Rows) -> None:
    seen, records = watched(rows)
    rows_ABU = batch(seen, 7, batch_rows=16, accumulation=2, sharding=sharding(**MESHES[mesh]))
    np.testing.assert_array_equal(np.asarray(rows_ABU).reshape(16, 33), rows[np.arange(7 * 16, 8 * 16)])
    assert len(records.read) == 16
    assert rows_ABU.sharding.is_equivalent_to(sharding(**MESHES[mesh]), 3)


@pytest.mark.parametrize("spec", [P("data", "fsdp", None), P(None, None, None), P(("data", "fsdp"), None, None)])
def test_other_shardings_hold_the_same_batch(spec: P, rows: Rows) -> None:
    anywhere = NamedSharding(mesh_of(data=4, fsdp=2), spec)
    rows_ABU = batch(rows, 7, batch_rows=16, accumulation=8, sharding=anywhere)
    np.testing.assert_array_equal(np.asarray(rows_ABU).reshape(16, 33), rows[np.arange(7 * 16, 8 * 16)])


def test_a_loop_that_forbids_transfers_can_still_have_batches(rows: Rows) -> None:
    with jax.transfer_guard("disallow"):
        batch(rows, 0, **ALONE, sharding=sharding(data=8))


def test_a_late_batch_comes_at_once(prepared: Prepared) -> None:
    begin = time.monotonic()
    rows = open_rows(prepared, "train", seed=0)
    batch(rows, 10**6, batch_rows=1024, accumulation=1, sharding=sharding())
    assert time.monotonic() - begin < 2
    assert len(rows[np.array([10**15])]) == 1


def test_in_stored_order_what_is_past_the_end_is_padding(prepared: Prepared) -> None:
    rows = open_rows(prepared, "validation")
    n = len(rows)
    assert 8 < n and n % 8
    last = np.asarray(batch(rows, n // 8, **ALONE, sharding=sharding(data=8)))[0]
    np.testing.assert_array_equal(last[: n % 8], rows[np.arange(n - n % 8, n)])
    assert (last[n % 8 :] == PAD_ID).all()
    beyond = batch(rows, n // 8 + 1, **ALONE, sharding=sharding())
    assert (np.asarray(beyond) == PAD_ID).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_rows_are_read_as_tfds_reads_them(dtype: type, prepared: Prepared, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored_NU = rng.integers(0, np.iinfo(np.uint16).max if dtype == np.uint16 else 2**31 - 1, (50, 33)).astype(dtype)
    meter = store.Meter(1, lambda n: None)
    shards = store.shards(({"tokens": row} for row in stored_NU), meter)
    store.build(store.TokenRows({"train": shards}, tmp_path, 33, np.dtype(dtype)))
    parsed = [example["tokens"] for example in store.read_split(tmp_path, stages.ROWS, "train")]
    info = {"splits": {"train": {"rows": 50, "tokens": 0}}, "dtype": np.dtype(dtype).name}
    made = dataclasses.replace(prepared, rows=tmp_path, seq_len=32, rows_info=info)
    np.testing.assert_array_equal(open_rows(made, "train")[np.arange(50)], parsed)
    np.testing.assert_array_equal(parsed, stored_NU)


def fetched(rows: Rows, n: int, *, start: int = 0, prefetch: int) -> list[np.ndarray]:
    batches = stream(rows, start=start, **ALONE, sharding=sharding(data=8), prefetch=prefetch)
    found = []
    for _ in range(n):
        t, rows_ABU, waited = next(batches)
        assert t == start + len(found) and waited >= 0
        found.append(np.asarray(rows_ABU))
    batches.close()
    return found


def test_reading_ahead_changes_nothing(rows: Rows) -> None:
    plain = fetched(rows, 6, prefetch=0)
    for prefetch in (1, 2, 5):
        np.testing.assert_array_equal(fetched(rows, 6, prefetch=prefetch), plain)
    np.testing.assert_array_equal(fetched(rows, 3, start=3, prefetch=2), plain[3:])
    np.testing.assert_array_equal(plain[4], batch(rows, 4, **ALONE, sharding=sharding()))


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_an_error_while_reading_is_raised_as_itself_where_it_belongs(prefetch: int, rows: Rows) -> None:
    broken, _ = watched(rows, broken_after=16)
    batches = stream(broken, start=0, **ALONE, sharding=sharding(), prefetch=prefetch)
    assert [next(batches).t for _ in range(2)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match="planted"):
        next(batches)


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_closing_stops_the_thread_and_what_it_would_have_read(rows: Rows) -> None:
    slow, records = watched(rows, seconds=0.05)
    batches = stream(slow, start=0, **ALONE, sharding=sharding(), prefetch=50)
    next(batches)
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 1
    assert not reader_threads()
    assert len(records.read) < 8 * 25


def test_as_much_is_read_ahead_as_asked(rows: Rows) -> None:
    seen, records = watched(rows)
    batches = stream(seen, start=0, **ALONE, sharding=sharding(), prefetch=3)
    next(batches)
    deadline = time.monotonic() + 10
    while len(records.read) < 8 * 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(records.read) == 8 * 4, "the one in use and three more"
    batches.close()


def test_waiting_is_measured(rows: Rows) -> None:
    slow, _ = watched(rows, seconds=0.2)
    for prefetch in (0, 1):
        batches = stream(slow, start=0, **ALONE, sharding=sharding(), prefetch=prefetch)
        assert next(batches).wait_seconds > 0.15
        batches.close()
    batches = stream(slow, start=0, **ALONE, sharding=sharding(), prefetch=2)
    next(batches)
    time.sleep(1)
    assert next(batches).wait_seconds < 0.05, "it was read meanwhile"
    batches.close()


SETUP = """
import hashlib, json, sys
import jax, numpy as np
from llm_jax.config import from_json
from llm_jax.data.config import DataConfig, TokenizerConfig
from llm_jax.data.loader import batch, open_rows, stream
from llm_jax.data.prepare import open_prepared
from llm_jax.distributed import join_processes
from llm_jax.mesh import acts, make_mesh
join_processes(heartbeat_s=100, patience_s=60)
rows = open_rows(open_prepared(from_json(DataConfig, sys.argv[1]), TokenizerConfig(), 400, 0), "train", 3)
sizes = dict(data=1, fsdp=1, tensor=1, context=1, expert=1) | json.loads(sys.argv[2])
sharding = jax.NamedSharding(make_mesh(sizes), acts("ABU"))
"""
LEFT_OPEN = (
    SETUP
    + """
batches = stream(rows, start=0, batch_rows=8, accumulation=1, sharding=sharding, prefetch=4)
next(batches)
print("left")
"""
)
HELD = (
    SETUP
    + """
class Count:
    read = 0
    def __len__(self): return len(rows.records)
    def __getitems__(self, numbers):
        Count.read += len(numbers)
        return rows.records.__getitems__(numbers)
import dataclasses
rows_ABU = batch(dataclasses.replace(rows, records=Count()), 7, batch_rows=16, accumulation=2, sharding=sharding)
held = {
    str([(s.start, s.stop) for s in shard.index[:2]]): hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
    for shard in rows_ABU.addressable_shards
}
print(json.dumps({"held": held, "read": Count.read}))
"""
)


def config_of(prepared: Prepared) -> str:
    return to_json(data_texts.config(*prepared.text_info["source"]["paths"], into=prepared.text.parents[1]))


def test_a_stream_left_open_does_not_keep_a_process_alive(prepared: Prepared, start: Start) -> None:
    done = start("-c", LEFT_OPEN, config_of(prepared), "{}").wait(60)
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


@pytest.mark.parametrize(
    ("sizes", "read"), [slowly({"data": 8}, 8), slowly({"tensor": 8}, 16), ({"data": 2, "tensor": 4}, 8)]
)
def test_two_processes_hold_the_batch_of_one_and_read_what_they_hold(
    sizes: dict[str, int], read: int, prepared: Prepared, rows: Rows, launch_processes: LaunchProcesses
) -> None:
    arguments = ["-c", HELD, config_of(prepared), json.dumps(sizes)]
    said = [json.loads(done.stdout) for done in launch_processes(2, 4, arguments)]
    assert [process["read"] for process in said] == [read, read]
    whole = batch(rows, 7, batch_rows=16, accumulation=2, sharding=sharding(**sizes))
    expected = {
        str([(s.start, s.stop) for s in shard.index[:2]]): hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
        for shard in whole.addressable_shards
    }
    assert said[0]["held"] | said[1]["held"] == expected
