"""What training writes down: JSON lines, TensorBoard events, and what a person watches. No jax."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from llm_jax import durable
from llm_jax.train.config import LoggingConfig

if TYPE_CHECKING:
    from rich.progress import Progress
    from tensorboardX.event_file_writer import EventsWriter

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
TENSORBOARD = "tensorboard"
# TensorBoard's files are synced so seldom, since that holds up the loop for milliseconds; it looks at them less often.
TENSORBOARD_S = 10.0

# An update's figures by name, as JSON's types; None is what is not known.
Line = Mapping[str, Any]


class Log:
    """Where one process's lines go; `open_log` makes it, and closing it ends the bar and the files.

    Every method raises DiskError where something cannot be written.
    """

    def __init__(
        self,
        files: Mapping[str, TextIO],
        screen: "Screen | None",
        events: "EventsWriter | None",
        validated: int,
    ) -> None:
        self._files = files
        self._screen = screen
        self._events = events
        self._events_synced = time.monotonic()
        self.validated = validated
        """The last update after which validation was recorded, -1 for none; known to the process that writes only."""

    def write(self, line: Line) -> None:
        """One update: appended and flushed, with the time; printed if it is due."""
        self._record(METRICS, "train", line)
        if self._screen is not None:
            self._screen.show(line)

    def write_validation(self, line: Line) -> None:
        """One look at held-out rows: appended and flushed, with the time, and printed."""
        self._record(VALIDATION, "validation", line)
        self.say(format_validation(line))

    def say(self, text: str) -> None:
        """Prints a line of text, above the bar where there is one."""
        if self._screen is not None:
            self._screen.say(text)

    def sync(self) -> None:
        """Returns once all lines are on the disk; a checkpoint that commits after it has its line whatever happens."""
        if self._events is not None:
            self._sync_events(self._events)
        for file in self._files.values():
            with durable.told(file.name):
                os.fsync(file.fileno())
                # An open file outlives its name: what is written to it after that, nobody will ever find.
                if not os.path.samestat(os.stat(file.name), os.fstat(file.fileno())):
                    raise OSError(None, "another file is in its place")

    def close(self) -> None:
        """Ends the bar and closes the files, each of them whatever becomes of the others."""
        with durable.told("the log"), contextlib.ExitStack() as closing:
            for file in self._files.values():
                closing.callback(file.close)
            if self._events is not None:
                closing.callback(self._events.close)
            if self._screen is not None:
                closing.callback(self._screen.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Of two failures the first is told; what could not be written fails again when its file is closed.
        with contextlib.suppress(*() if error is None else (durable.DiskError,)):
            self.close()

    def _record(self, name: str, group: str, line: Line) -> None:
        now = time.time()
        if name in self._files:
            file = self._files[name]
            with durable.told(file.name):
                file.write(to_json({**line, "time": round(now, 3)}) + "\n")
                file.flush()
        if self._events is not None:
            with durable.told("a TensorBoard file"):
                _write_event(self._events, group, line, now)
            if time.monotonic() - self._events_synced >= TENSORBOARD_S:
                self._sync_events(self._events)

    def _sync_events(self, events: "EventsWriter") -> None:
        with durable.told("a TensorBoard file"):
            events.flush()
        self._events_synced = time.monotonic()


def open_log(
    run_dir: str | os.PathLike[str], restored_step: int, steps: int, logging: LoggingConfig, *, writes: bool
) -> Log:
    """The log of a run that goes on after restored_step updates; later lines of an earlier attempt are dropped first.

    Only one process `writes`; the log of every other one takes the same calls and does nothing. Raises DiskError.
    """
    if not writes:
        return Log({}, None, None, validated=-1)
    directory = Path(run_dir)
    with durable.told(directory):
        drop_after(directory / METRICS, restored_step)
        validated = drop_after(directory / VALIDATION, restored_step)
        events = _open_events(directory / TENSORBOARD, restored_step) if logging.tensorboard else None
        files = {name: open(directory / name, "a", encoding="utf-8") for name in (METRICS, VALIDATION)}
        durable.flush_folder(directory)
    return Log(files, Screen(restored_step, steps, logging.every), events, validated)


def drop_after(path: Path, step: int) -> int:
    """Drops a file's JSON lines past a step, and what is no line of JSON; returns the last step kept, -1 for none.

    Atomic: the file is the old or the new one, whenever the machine dies. A file that is not there stays away.
    """
    if not path.exists():
        return -1
    temporary = path.with_name(f"{path.name}.tmp")
    last, changed = -1, False
    with open(path, "rb") as old, open(temporary, "wb") as new:
        for raw in old:
            at = _step_of(raw)
            if at is None or at > step:
                changed = True
            else:
                new.write(raw)
                last = at
        new.flush()
        os.fsync(new.fileno())
    if changed:
        os.replace(temporary, path)
    else:
        temporary.unlink()
    return last


def last_step(path: Path) -> int:
    """The step of a file's last whole line, -1 for none."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return max((step for step in map(_step_of, lines) if step is not None), default=-1)


def to_json(line: Line) -> str:
    """The line as standard JSON, which knows no NaN: what is not finite becomes null, and `finite` false."""
    plain = {name: None if _is_broken(value) else value for name, value in line.items()}
    if any(_is_broken(value) for value in line.values()):
        plain["finite"] = False
    return json.dumps(plain, allow_nan=False)


def format_line(line: Line, steps: int) -> str:
    """An update as people read it; what is not known is left out."""
    step, loss, skipped = line["step"], line.get("loss"), line.get("skipped") or 0
    shown = [f"step {step:>{len(str(steps))}}/{steps}", f"loss {math.nan if loss is None else loss:.4f}"]
    formats = {"lr": "lr {:.1e}", "grad_norm": "grad {:.2f}"}
    shown += [text.format(line[name]) for name, text in formats.items() if line.get(name) is not None]
    if line.get("tokens_per_s") is not None:
        shown.append(f"{short(line['tokens_per_s'])} tok/s")
    shares = {"mfu": "mfu {:.0%}", "data_wait": "wait {:.0%}"}
    shown += [text.format(line[name]) for name, text in shares.items() if line.get(name) is not None]
    if line.get("load_max_over_mean") is not None:
        shown.append(f"load {line['load_max_over_mean']:.2f}")
    if line.get("dropped"):
        shown.append(f"dropped {line['dropped']:.1%}")
    if (line.get("checkpoint_stall") or 0) >= 0.005:
        shown.append(f"save {line['checkpoint_stall']:.0%}")
    if line.get("finite") is False:
        shown.append("not finite, skipped")
    if line.get("spike"):
        shown.append("a spike, skipped")
    if skipped:
        shown.append(f"{skipped} skipped so far")
    return "  ".join(shown)


def format_recompiled(step: int, recompiled: Mapping[str, str | float]) -> str:
    """The warning of a program that was compiled again, or late."""
    program, at, cause = (recompiled[name] for name in ("program", "at", "cause"))
    return f"warning: step {step}: {program} was compiled after the first update, at {at}: {cause}"


def format_validation(line: Line) -> str:
    """A look at held-out rows as people read it."""
    formats = {
        "loss": "loss {:.4f}",
        "perplexity": "perplexity {:.2f}",
        "bits_per_byte": "{:.3f} bits per byte",
        "accuracy": "accuracy {:.1%}",
    }
    shown = [text.format(line[name]) for name, text in formats.items() if line.get(name) is not None]
    return "  ".join([f"held-out text after step {line['step']}:", *shown])


def short(number: float) -> str:
    """A number in three digits and a letter: 987, 12.3k, 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{letter}"
    return f"{number:.3g}"


class Screen:
    """On a terminal a bar with lines above it; in a pipe the lines alone."""

    def __init__(self, restored_step: int, steps: int, every: int) -> None:
        self._steps = steps
        self._every = every
        self._first = restored_step + 1
        self._tokens = self._seconds = self._waited = 0.0
        self._recompiled: set[str] = set()
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            self._bar = _start_bar(restored_step, steps)

    def show(self, line: Line) -> None:
        """Moves the bar; prints the line every so many updates, the first, the last, and whatever is not finite.

        Warns of each program that was compiled during training, once.
        """
        line = self._over_window(line)
        step = line["step"]
        for recompiled in line.get("recompiled", ()):
            if recompiled["program"] not in self._recompiled:
                self._recompiled.add(recompiled["program"])
                self.say(format_recompiled(step, recompiled))
        if self._bar is not None:
            loss, speed = line.get("loss"), line.get("tokens_per_s")
            figures = f"loss {'nan' if loss is None else f'{loss:.4f}'}"
            if speed is not None:
                figures += f"  {short(speed)} tok/s"
            self._bar.update(self._bar.task_ids[0], completed=step, figures=figures)
        ends = step in (self._first, self._steps)
        if step % self._every == 0 or ends or line.get("finite") is False or line.get("spike"):
            self.say(format_line(line, self._steps))
            self._tokens = self._seconds = self._waited = 0.0

    def say(self, text: str) -> None:
        """Prints a line of text."""
        with durable.told("stdout"):
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def _over_window(self, line: Line) -> Line:
        """The line with speed and waiting since the last one printed: single updates jump about."""
        speed, tokens, wait = line.get("tokens_per_s"), line.get("tokens"), line.get("data_wait")
        if speed and tokens:
            seconds = tokens / speed
            self._tokens += tokens
            self._seconds += seconds
            self._waited += seconds * (wait or 0.0)
        if not self._seconds:
            return line
        return {**line, "tokens_per_s": self._tokens / self._seconds, "data_wait": self._waited / self._seconds}


def _start_bar(restored_step: int, steps: int) -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn()
    bar = Progress(*columns, refresh_per_second=4)
    bar.add_task("train", total=steps, completed=restored_step, figures="")
    bar.start()
    return bar


def _step_of(raw: bytes) -> int | None:
    """The step of a whole line; None for what a death left half-written."""
    try:
        step = json.loads(raw)["step"] if raw.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _open_events(directory: Path, restored_step: int) -> "EventsWriter":
    """A new event file; it tells TensorBoard to forget what an earlier attempt wrote past the restored step."""
    # tensorboardX's SummaryWriter takes 1 ms for an update's eight scalars and a thread; its inner writer a quarter.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  generated at import

    directory.mkdir(exist_ok=True)
    # A file is named by the second, and a second file of that name would replace the first.
    events = EventsWriter(str(directory / "events"), filename_suffix=f".{os.getpid()}.{time.monotonic_ns()}")
    start = SessionLog(status=SessionLog.START)
    events.write_event(Event(wall_time=time.time(), step=restored_step + 1, session_log=start))
    events.flush()
    return events


def _write_event(events: "EventsWriter", group: str, line: Line, now: float) -> None:
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  generated at import
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]  generated at import

    numbers = {name: value for name, value in line.items() if isinstance(value, float)}
    values = [Summary.Value(tag=f"{group}/{name}", simple_value=value) for name, value in numbers.items()]
    events.write_event(Event(wall_time=now, step=line["step"], summary=Summary(value=values)))
