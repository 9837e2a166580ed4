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


DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full or unwritable disk below folder into a DiskError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # The array_record writer tells the operating system's words in a RuntimeError.
        reasons = [os.strerror(code) for code in DISK_ERRNOS]
        reason = next((reason for reason in reasons if reason in str(error)), None)
        if reason is None:
            raise
        raise DiskError(f"cannot write {folder}: {reason}; make room there or set data.dir to another disk") from error
