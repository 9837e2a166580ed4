"""A run's directory: one trainer at a time, and one directory for all its processes."""

import contextlib
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax

from llm_jax import exit_codes
from llm_jax.processes import settle

LOCK = "lock"
WATCHERS_LOCK = "watch.lock"

# How long a network file system may take to show one process what another wrote.
PATIENCE_S = 30.0


class Refused(exit_codes.Failure):
    """The run cannot start as asked."""

    exit_code = exit_codes.NO


class DirectoryError(exit_codes.Failure):
    """The run's directory cannot be made or written."""

    exit_code = exit_codes.CHECKPOINT


def sole_trainer(run_dir: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
    """Makes the directory and holds its lock, which any end of the process frees; process 0 holds it for all.

    Raises Refused, naming the holder, if another trainer has it; DirectoryError if it cannot be made or locked. Other
    processes than the first get a Failure of the same text and exit code.
    """
    return _sole(run_dir, LOCK, "trainer")


def sole_watcher(run_dir: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
    """As sole_trainer, for the one who evaluates a run's checkpoints as they come; beside a trainer, not against it."""
    return _sole(run_dir, WATCHERS_LOCK, "watcher")


@contextlib.contextmanager
def _sole(run_dir: str | os.PathLike[str], lock: str, role: str) -> Iterator[None]:
    with contextlib.ExitStack() as held:

        def take(_: list[str]) -> str:
            try:
                os.makedirs(run_dir, exist_ok=True)
                file = held.enter_context(open(Path(run_dir, lock), "a+", encoding="utf-8"))
                if not _locks(file):
                    file.seek(0)
                    holder = file.read().strip() or "it has just started"
                    raise Refused(f"{run_dir} has a {role} at work already: {holder}")
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            except OSError as error:
                raise DirectoryError(f"{run_dir} cannot be made or locked: {error.strerror}") from error
            # A child that outlives this process would hold the lock on.
            os.register_at_fork(after_in_child=file.close)
            return ""

        settle(f"run directory {lock}", "", take)
        yield


def _locks(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def agree_on_directory(directory: str | os.PathLike[str], patience_s: float = PATIENCE_S) -> None:
    """Proves that every process sees the same directory there; it exists, and process 0 can write it.

    Raises Refused, naming the processes that do not see it; DirectoryError (a Failure elsewhere) if process 0 cannot
    write there.
    """
    if jax.process_count() == 1:
        return
    proof = Path(directory, f".seen-by-all-{settle('directory token', '', lambda _: secrets.token_hex(8))}")

    def leave(_: list[str]) -> str:
        try:
            proof.touch()
        except OSError as error:
            raise DirectoryError(f"{directory} cannot be written: {error.strerror}") from error
        return ""

    settle("directory proof", "", leave)
    deadline = time.monotonic() + patience_s
    while not (seen := proof.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = "" if seen else f"process {jax.process_index()} on {socket.gethostname()}"

    def judge(said: list[str]) -> str:
        proof.unlink()
        return ", ".join(filter(None, said))

    missing = settle("directory seen", blind, judge)
    if missing:
        raise Refused(f"{directory} is another directory for {missing} than for process 0: use one that all share")
