"""The data's failures, each told in one line."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_jax import exit_codes


class DataError(exit_codes.Failure):
    """The data cannot be used as asked: what, where, and what to do about it."""

    exit_code = exit_codes.DATA


class DiskError(exit_codes.Failure):
    """The disk cannot take the data: full, over quota, or not writable."""

    exit_code = exit_codes.CHECKPOINT


# What a full or broken disk answers.
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Tells what the operating system has against writing into folder as a DiskError."""
    try:
        yield
    except OSError as error:
        raise _disk_error(folder, error.strerror or str(error)) from error
    except RuntimeError as error:
        # The array_record writer passes on the operating system's words, and nothing else of it.
        reasons = [os.strerror(code) for code in DISK_ERRNOS if os.strerror(code) in str(error)]
        if not reasons:
            raise
        raise _disk_error(folder, reasons[0]) from error


def _disk_error(folder: Path, reason: str) -> DiskError:
    return DiskError(f"cannot write {folder}: {reason}; make room there or set data.dir to another disk")
