"""What is on disk: TFDS datasets of array_record files, in stage folders that appear whole or not at all.

A stage is written into `<stage>.partial` and renamed when everything in it is on the disk, its `info.json` included.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from llm_jax.data.errors import DataError, disk_errors
from llm_jax.durable import flush_folder

INFO = "info.json"
PARTIAL = ".partial"

# A shard: small enough to hold in memory while it is written, which TFDS does.
SHARD_BYTES = 128 << 20

# Records fetched by one call.
READ_TOGETHER = 64

DeserializeMethod = tfds.decode.DeserializeMethod
PARSED, RAW_BYTES = DeserializeMethod.DESERIALIZE_AND_DECODE, DeserializeMethod.RAW_BYTES

Example = dict[str, Any]
# The example iterators of a split, one a shard; they are drawn from one after the other.
Shards = Sequence[Callable[[], Iterator[tuple[int, Example]]]]


class Records(Protocol):
    """What TFDS's data sources are; fetching many at a time is faster."""

    def __len__(self) -> int: ...

    def __getitems__(self, numbers: Sequence[int]) -> Sequence[Any]: ...


class Documents(tfds.core.ShardBasedBuilder):
    """Text documents: their names and their UTF-8 text."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # where TFDS would look for checksums of downloads, with a package it does not declare

    def __init__(self, splits: dict[str, Shards], data_dir: Path) -> None:
        """splits: split -> shards of {"key": str, "text": str}."""
        self.split_shards = splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"key": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description="Text documents.", features=features)

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Shards]:
        return self.split_shards


class TokenRows(tfds.core.ShardBasedBuilder):
    """Rows of U = T + 1 tokens."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # where TFDS would look for checksums of downloads, with a package it does not declare

    def __init__(self, splits: dict[str, Shards], data_dir: Path, row_tokens: int, dtype: np.dtype) -> None:
        """splits: split -> shards of {"tokens": dtype [U]}."""
        self.split_shards = splits
        self.row_tokens, self.dtype = row_tokens, dtype
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        # Stored as bytes: a list of varints is larger, and a Sequence nine times slower to read.
        tokens = tfds.features.Tensor(shape=(self.row_tokens,), dtype=self.dtype, encoding=tfds.features.Encoding.BYTES)
        features = tfds.features.FeaturesDict({"tokens": tokens})
        return tfds.core.DatasetInfo(builder=self, description="Rows of tokens.", features=features)

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Shards]:
        return self.split_shards


@dataclass
class Meter:
    """How much of a split has been drawn, in bytes of its text."""

    total: int
    advance: Callable[[int], None]
    done: int = 0

    def add(self, n: int) -> None:
        """Counts n more bytes."""
        self.done += n
        self.advance(n)


def shards(examples: Iterable[Example], meter: Meter) -> Shards:
    """Divides a stream into consecutive shards; drawing from it moves the meter."""
    stream = enumerate(examples)
    n_shards = max(-(-meter.total // SHARD_BYTES), 1)

    def shard(i: int) -> Iterator[tuple[int, Example]]:
        for numbered in stream:
            yield numbered
            if i + 1 < n_shards and meter.done * n_shards >= (i + 1) * meter.total:
                return

    return [partial(shard, i) for i in range(n_shards)]


def build(builder: tfds.core.ShardBasedBuilder) -> None:
    """Writes the dataset; what TFDS would print is left out."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")


def open_split(folder: Path, dataset: str, split: str, method: DeserializeMethod = PARSED) -> Records:
    """The records of a split, which must exist; with RAW_BYTES as they are stored, each a serialised tf.Example."""
    builder = tfds.builder_from_directory(builder_dir=folder / dataset / "1.0.0")
    return builder.as_data_source(split=split, deserialize_method=method)  # pyright: ignore[reportCallIssue]


def read_split(folder: Path, dataset: str, split: str, order: Iterable[int] | None = None) -> Iterator[Example]:
    """The examples of a split in stored or in the given order; none where the split does not exist."""
    if not list((folder / dataset / "1.0.0").glob(f"{dataset}-{split}.*")):
        return
    yield from read_records(open_split(folder, dataset, split), order)


def read_records(records: Records, order: Iterable[int] | None = None) -> Iterator[Example]:
    """All records in their or in the given order, many at a time."""
    numbers = iter(range(len(records)) if order is None else order)
    while block := list(islice(numbers, READ_TOGETHER)):
        yield from records.__getitems__(block)


@contextlib.contextmanager
def stage(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the block ends well; write_info must have been called in it.

    Raises DiskError where the disk is full; nothing is left then.
    """
    unfinished = folder.with_name(folder.name + PARTIAL)
    try:
        with disk_errors(folder):
            unfinished.mkdir(parents=True)
            yield unfinished
            _flush(unfinished)
            os.rename(unfinished, folder)
            flush_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def clean(root: Path) -> None:
    """Removes what killed processes have left; nobody may be writing."""
    for unfinished in root.glob(f"*{PARTIAL}"):
        shutil.rmtree(unfinished)


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Writes what a reader needs to know, and every file's size, so that damage is noticed."""
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / INFO).write_text(json.dumps(info | {"files": files}, indent=1))


def read_info(folder: Path) -> dict[str, Any]:
    """What write_info wrote. Raises DataError where a file is missing or has another size."""
    try:
        info = json.loads((folder / INFO).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / INFO} is unreadable ({error}); delete {folder} and prepare again") from error
    for name, size in info.pop("files").items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path} is damaged or missing; delete {folder} and prepare again")
    return info


def is_complete(folder: Path) -> bool:
    """Whether the stage was finished."""
    return (folder / INFO).is_file()


class Digest:
    """sha256 of a sequence of byte strings; unlike their concatenation's it depends on where each ends."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def add(self, part: bytes) -> None:
        """Appends a byte string."""
        self.sha256.update(len(part).to_bytes(8, "little"))
        self.sha256.update(part)

    def hex(self) -> str:
        """The digest so far."""
        return self.sha256.hexdigest()


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            flush_folder(path)
    flush_folder(folder)
