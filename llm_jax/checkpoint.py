"""Checkpoints: any tree of arrays and a JSON record, written in the background, whole or not there at all.

    <directory>/<step>/state/          the arrays, as Orbax writes a PyTree
                       record.json     what the caller said about them, and every array's dtype and shape
                       manifest.json   size and digest of every file, written last

A folder gets its number when its manifest is complete. So whatever bears a number was whole once, and damage to any of
its files is noticed before it is used. Every method is called by all processes, and answers or fails on all alike.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.future import Future

from llm_jax import durable, exit_codes, manifest, named_arrays
from llm_jax.manifest import Damaged, Kind, Manifest
from llm_jax.processes import settle

RECORD = "record.json"
STATE = "state"
# Orbax's own suffix for what is unfinished, so that its tools too leave such folders alone.
UNFINISHED = ".orbax-checkpoint-tmp"

_opened = itertools.count()


class CheckpointError(exit_codes.Failure):
    """A checkpoint cannot be written, read or used as asked."""

    exit_code = exit_codes.CHECKPOINT


class Checkpoints:
    """The checkpoints of one directory. Only one trainer at a time opens it for writing; readers come and go."""

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 1, read_only: bool = False) -> None:
        """A writer makes the directory, clears what was left unfinished, and keeps the newest `keep` checkpoints.

        Raises CheckpointError if a writer cannot write there.
        """
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._read_only = read_only
        self._handler = named_arrays.handler()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._loop = asyncio.new_event_loop()
        weakref.finalize(self, self._loop.close)
        self._pending: concurrent.futures.Future[None] | None = None
        self._just_verified: int | None = None
        self._topic = f"checkpoints {next(_opened)}"
        if not read_only:
            self._on_first("opened", f"no checkpoints can be saved in {directory}", self._clear)

    def save(
        self, step: int, tree: Any, meta: Mapping[str, Any], *, kind: Kind = "regular", wait: bool = False
    ) -> None:
        """Writes a tree of jax.Arrays and a JSON record as checkpoint `step`; returns when the arrays may be donated.

        kind says how long it stays: `keep` counts the regular ones. First waits for the save before this one. Raises
        CheckpointError for that one's failure, or if `step` exists.
        """
        assert not self._read_only
        self.wait()
        arrays = named_arrays.flatten(tree)
        record = json.dumps({"meta": dict(meta), "arrays": named_arrays.types(arrays)}, indent=1).encode()
        what = f"checkpoint {step} cannot be saved in {self.directory}"
        self._on_first("begin", what, lambda: self._begin(step))
        # The worker's thread has no event loop and no mesh, whatever the caller's thread has.
        copied = self._worker.submit(self._start_writing, self._unfinished(step), arrays)
        concurrent.futures.wait([copied])
        self._pending = self._worker.submit(self._commit, step, copied, record, kind, what)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises CheckpointError if the last save failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and ends the writing thread. Raises CheckpointError if the last save failed."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def steps(self) -> list[int]:
        """The numbers of the checkpoints that were completed, oldest first; their files are not looked at."""
        return json.loads(settle(f"{self._topic} steps", "", lambda _: json.dumps(self._numbers())))

    def newest_intact(self, before: int | None = None) -> int | None:
        """The newest checkpoint (with a number below `before`) of which every bit is as it was written, or None.

        Damaged ones are told on stderr and, unless read_only, moved aside, so that their numbers can be saved again.
        """
        self.wait()
        damaged: set[int] = set()
        # Listed anew each time: beside a running trainer, a reader's list is soon out of date.
        while steps := [s for s in self.steps() if s not in damaged and (before is None or s < before)]:
            step = steps[-1]
            damage = self._damage(step)
            if not damage:
                self._just_verified = step
                return step
            damaged.add(step)
            what = f"damaged checkpoint {self._folder(step)} cannot be moved aside"
            self._on_first("aside", what, functools.partial(self._set_aside, step, damage))
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """What the caller of `save` said about checkpoint `step`. Raises CheckpointError if that cannot be read."""
        return self._record(step)["meta"]

    def restore(self, step: int, abstract: Any, *, verified: bool = False) -> Any:
        """The arrays of checkpoint `step` for a tree of ShapeDtypeStructs with shardings; nothing is cast or cut.

        Whole top-level entries of the saved tree may be left out, and are not read. Raises CheckpointError, with a line
        for each difference, or if the checkpoint is not there or damaged. verified: another reader of the directory has
        just called it intact.
        """
        self.wait()
        # Verifying reads every file: once is enough for a caller who has just asked for the newest intact one.
        damage = "" if verified or self._just_verified == step else self._damage(step)
        self._just_verified = None
        if damage:
            raise CheckpointError(f"checkpoint {self._folder(step)} cannot be used: {damage}")
        wanted = named_arrays.flatten(abstract)
        differences = named_arrays.differences(self._record(step)["arrays"], named_arrays.types(wanted))
        if differences:
            raise CheckpointError("\n  ".join([f"checkpoint {self._folder(step)} does not fit:", *differences]))
        problem, arrays = None, {}
        try:
            arrays = named_arrays.read(self._handler, self._folder(step) / STATE, wanted)
        except Exception as error:  # noqa: BLE001 - whatever it was, all processes must hear of it
            problem = error
        self._together("restored", f"checkpoint {self._folder(step)} cannot be read", problem)
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of an abandoned history. Raises CheckpointError if that cannot be done."""
        self.wait()

        def remove() -> None:
            for number in self._numbers():
                if number > step:
                    self._remove(number)

        self._on_first("remove", f"checkpoints after {step} cannot be removed from {self.directory}", remove)

    # Agreeing: process 0 acts, and all hear how it went.

    def _together(
        self,
        topic: str,
        what: str,
        problem: Exception | None,
        said: Any = None,
        act: Callable[[list[Any]], None] = lambda said: None,
    ) -> None:
        """Process 0 acts on what all said, unless one has a problem. Any trouble is a CheckpointError on all."""
        cause = problem

        def judge(messages: list[str]) -> str:
            nonlocal cause
            heard = [json.loads(message) for message in messages]
            problems = [message["problem"] for message in heard if message["problem"]]
            if problems:
                return problems[0]
            try:
                act([message["said"] for message in heard])
            except Exception as error:  # noqa: BLE001 - it is raised below, on all processes
                cause = error
                return _one_line(error)
            return ""

        message = json.dumps({"problem": _one_line(problem) if problem else "", "said": said})
        trouble = settle(f"{self._topic} {topic}", message, judge)
        if trouble:
            raise CheckpointError(f"{what}: {trouble}") from cause

    def _on_first(self, topic: str, what: str, act: Callable[[], None]) -> None:
        """Process 0 acts. Raises CheckpointError on all if it fails."""
        self._together(topic, what, None, act=lambda _: act())

    # Writing.

    def _clear(self) -> None:
        if re.search(r"[*?[]", str(self.directory)):
            # Orbax looks for what each process wrote with a pattern, and without a word saves nothing if it finds none.
            raise OSError(None, "Orbax cannot write below a path with *, ? or [")
        self.directory.mkdir(parents=True, exist_ok=True)
        for folder in self.directory.glob(f"*{UNFINISHED}"):
            shutil.rmtree(folder)
        # A directory that cannot be written is told now, not after the first thousand steps.
        probe = self.directory / f"probe{UNFINISHED}"
        probe.mkdir()
        probe.rmdir()

    def _begin(self, step: int) -> None:
        if self._folder(step).exists():
            raise FileExistsError(None, "exists already", str(self._folder(step)))
        shutil.rmtree(self._unfinished(step), ignore_errors=True)  # what a failed save of this number left
        # No parents: a directory that is gone in mid-run is not made anew, beside what went with it.
        self._unfinished(step).mkdir()
        (self._unfinished(step) / STATE).mkdir()

    def _start_writing(self, folder: Path, arrays: Mapping[str, jax.Array]) -> list[Future]:
        """Copies the arrays to the host and begins to write them."""
        tree = named_arrays.nest(arrays)
        with jax.transfer_guard("allow"):
            writes = self._handler.async_save(epath.Path(folder / STATE), args=ocp.args.PyTreeSave(tree))
            return self._loop.run_until_complete(writes) or []

    def _ended(self, copied: concurrent.futures.Future) -> Exception | None:
        """Waits for all writes of this process, whatever becomes of them; returns the first one's trouble."""
        problem = None
        try:
            for write in copied.result():
                try:
                    write.result()
                except Exception as error:  # noqa: BLE001 - whatever it was, all processes must hear of it
                    problem = problem or error
        except Exception as error:  # noqa: BLE001 - as above
            problem = error
        if problem is not None:
            # Beside the write that failed others may fail later, and report to this loop: the next save has its own.
            self._loop = asyncio.new_event_loop()
            weakref.finalize(self, self._loop.close)
        return problem

    def _commit(self, step: int, copied: concurrent.futures.Future, record: bytes, kind: Kind, what: str) -> None:
        """Waits for every process's writes; then manifest, number, retention. Raises CheckpointError on all."""
        folder = self._unfinished(step)
        index, count = jax.process_index(), jax.process_count()

        def finish(_: list[None]) -> None:
            self._handler.finalize(epath.Path(folder / STATE))
            durable.write(folder / RECORD, record)

        try:
            problem, digests = self._ended(copied), {}
            self._together("written", what, problem, act=finish)
            try:
                mine = manifest.share(manifest.file_sizes(folder), index, count)
                digests = manifest.file_digests(folder, mine)
                # Orbax does not flush files of its own: after a power cut a checkpoint with a number would miss them.
                durable.flush_files(folder / path for path in mine)
            except OSError as error:
                problem = error
            self._together("hashed", what, problem, digests, lambda shares: self._complete(step, kind, shares))
        except CheckpointError:
            if index == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _complete(self, step: int, kind: Kind, shares: list[dict[str, str]]) -> None:
        """Gives a written folder its manifest and its number, and retires the oldest; shares: digests by file."""
        folder = self._unfinished(step)
        sizes = manifest.file_sizes(folder)
        digests = {path: digest for share in shares for path, digest in share.items()}
        if sizes.keys() != digests.keys():
            raise OSError(None, "the processes see different files", str(folder))
        durable.write(folder / manifest.NAME, manifest.encode(Manifest(step, sizes, digests, kind)))
        durable.flush_tree(folder)
        folder.rename(self._folder(step))
        durable.flush_folder(self.directory)
        for old in manifest.retired(self._kinds(), self._keep):
            try:
                self._remove(old)
            except OSError as error:
                print(f"checkpoint {self._folder(old)} cannot be removed: {_one_line(error)}", file=sys.stderr)

    def _remove(self, step: int) -> None:
        # Without its number first, so that a kill in mid-removal leaves nothing that looks damaged.
        shutil.rmtree(self._folder(step).rename(self._unfinished(step)))

    # Reading.

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _unfinished(self, step: int) -> Path:
        return self.directory / f"{step}{UNFINISHED}"

    def _numbers(self) -> list[int]:
        return manifest.numbers(self.directory)

    def _kinds(self) -> dict[int, Kind]:
        """How long each checkpoint is to stay; one whose manifest cannot be read is left alone."""
        kinds = {}
        for number in self._numbers():
            with contextlib.suppress(Damaged):
                kinds[number] = manifest.read(self._folder(number)).kind
        return kinds

    def _damage(self, step: int) -> str:
        """What is wrong with a checkpoint, each process having read its share of it; empty if nothing."""
        folder = self._folder(step)
        try:
            if not folder.is_dir():
                raise Damaged("it is not there")
            listed = manifest.read(folder)
            found = manifest.findings(folder, listed, jax.process_index(), jax.process_count())
            if listed.step != step:
                found.append(f"it is checkpoint {listed.step}")
        except Damaged as error:
            found = [str(error)]

        def judge(said: list[str]) -> str:
            phrases = dict.fromkeys(phrase for process in said for phrase in json.loads(process))
            return "; ".join(phrases)

        return settle(f"{self._topic} damage", json.dumps(found), judge)

    def _set_aside(self, step: int, damage: str) -> None:
        folder = self._folder(step)
        if self._read_only:
            # A trainer at work beside this reader may have retired it: gone is not damaged.
            if folder.exists():
                print(f"checkpoint {folder} is damaged ({damage}); the one before is used", file=sys.stderr)
            return
        names = itertools.chain([f"damaged-{step}"], (f"damaged-{step}-{n}" for n in itertools.count(2)))
        aside = next(self.directory / name for name in names if not (self.directory / name).exists())
        folder.rename(aside)
        print(f"checkpoint {folder} is damaged ({damage}); moved to {aside}, the one before is used", file=sys.stderr)

    def _record(self, step: int) -> dict[str, Any]:
        text = ""

        def load(_: list[None]) -> None:
            nonlocal text
            data = (self._folder(step) / RECORD).read_bytes()
            if manifest.read(self._folder(step)).digests.get(RECORD) != hashlib.sha256(data).hexdigest():
                raise Damaged(f"{RECORD} has changed")
            text = data.decode()

        self._together("record", f"checkpoint {self._folder(step)} cannot be read", None, act=load)
        return json.loads(settle(f"{self._topic} record text", "", lambda _: text))


def _one_line(error: Exception) -> str:
    # Array storage wraps what the system said in where it was said.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first = str(error).strip().split("\n")[0].split(" [source locations")[0].split(" [tensorstore_spec")[0]
    return first if isinstance(error, Damaged) else f"{type(error).__name__}: {first}"


def _is_news(record: logging.LogRecord) -> bool:
    """A failed write is told in one line by whoever waits for it; the writing threads' own tracebacks are not."""
    message = record.getMessage()
    return "_SignalingThread" not in message and not ("never retrieved" in message and "orbax" in message)


def _tell_unraisable(before: Callable[[Any], Any], unraisable: Any) -> None:
    """After a failed write the others of its thread report to an event loop that Orbax has closed: nobody's loss."""
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        before(unraisable)


for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(_is_news)
sys.unraisablehook = functools.partial(_tell_unraisable, sys.unraisablehook)
