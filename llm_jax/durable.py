"""What a power cut must not undo: files and folders flushed to the disk. And a disk's errors, told in one line."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from llm_jax import exit_codes


class DiskError(exit_codes.Failure):
    """What a run keeps cannot be written."""

    exit_code = exit_codes.CHECKPOINT


@contextlib.contextmanager
def told(what: object) -> Iterator[None]:
    """Makes an OSError a DiskError that says what cannot be written."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{what} cannot be written: {error.strerror or error}") from error


def write(path: Path, data: bytes) -> None:
    """Writes a file whose bytes are on the disk when this returns; its name is after flush_folder of its folder."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Makes a file of these bytes, or leaves the one before as it was, whenever the machine dies."""
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary, data)
    temporary.replace(path)
    flush_folder(path.parent)


def flush_files(paths: Iterable[Path]) -> None:
    """Returns when what anybody on this machine has written to these files is on the disk."""
    for path in paths:
        _flush(path)


def flush_tree(folder: Path) -> None:
    """Returns when the names in a folder and in all below it are on the disk; the files are not looked at."""
    for below, _, _ in os.walk(folder, topdown=False):
        _flush(Path(below))


def flush_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
