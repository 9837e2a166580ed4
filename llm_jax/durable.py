"""What a power cut must not undo: files and folders flushed to the disk."""

import os
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Writes a file whose bytes are on the disk when this returns; its name is after flush_folder of its folder."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
