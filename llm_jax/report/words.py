"""What the report says of runs in words and figures: pure functions from records to text."""

import datetime
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.config import ABSENT, ConfigError, describe, diff, from_json
from llm_jax.field_types import SECTION
from llm_jax.report.record import Record, at, number
from llm_jax.run import Run
from llm_jax.train.metrics import short

UNKNOWN = "\N{EN DASH}"


class Figure(NamedTuple):
    """A headline figure: a number as text, and what it is."""

    value: str
    label: str


class Field(NamedTuple):
    """One value of a config; `changed` where it is known not to be the default."""

    section: str
    name: str
    value: str
    changed: bool


def lead(record: Record) -> str:
    """What was trained, on what, and by how many updates: as much of it as is known."""
    parts = [f"A {'masked' if record.masked else 'causal'} language model"]
    if record.parameters:
        parts.append(f" of {short(record.parameters)} parameters")
    text = source(record.config)
    if text:
        parts.append(f", trained on {text}")
    if record.done:
        parts.append(f", {record.done:,} updates")
        sizes = [number(at(record.config, path)) for path in ("train.batch_rows", "data.seq_len")]
        parts.append(f" of {math.prod(sizes):,.0f} tokens" if all(map(math.isfinite, sizes)) else "")
    return f"{''.join(parts)}."


def state(record: Record) -> str:
    """How far the run is, and when that was."""
    day = date(record)
    when = f" on {day}" if day else ""
    if record.done == 0:
        return "No update has been made yet."
    if record.steps is None:
        return f"Step {record.done:,}{when}."
    if record.done >= record.steps:
        return f"Finished{when}."
    return f"Not finished: step {record.done:,} of {record.steps:,}{when}."


def source(config: Mapping[str, Any]) -> str | None:
    """Which text, in a few words; None where the config does not say."""
    match at(config, "data.source.kind"):
        case "stdlib":
            return "the source of Python's standard library"
        case "tfds":
            return str(at(config, "data.source.dataset"))
        case "files":
            return "text files"
        case _:
            return None


def date(record: Record) -> str | None:
    """The day of the last update, in UTC."""
    times = record.updates["time"][np.isfinite(record.updates["time"])]
    if not len(times) or not 0 <= times[-1] < 1e11:
        return None
    day = datetime.datetime.fromtimestamp(float(times[-1]), datetime.UTC)
    return f"{day.day} {day:%B %Y}"


def moment(seconds: Any) -> str:
    """Seconds since 1970 as 2026-11-22 03:20."""
    known = number(seconds)
    if not 0 <= known < 1e11:
        return UNKNOWN
    return f"{datetime.datetime.fromtimestamp(known, datetime.UTC):%Y-%m-%d %H:%M}"


def headline(record: Record) -> list[Figure]:
    """The figures that are known; losses on test text if it was scored, else on held-out text, else in training."""
    scored, split = best_scored(record)
    figures = [
        Figure(fixed(scored.get("loss"), 3), f"{split} loss, nats a {'hidden ' * record.masked}token"),
        Figure(fixed(scored.get("perplexity"), 2), "perplexity"),
        Figure(percent(scored.get("accuracy")), f"{'hidden' if record.masked else 'next'} tokens guessed right"),
        Figure(short(record.parameters) if record.parameters else UNKNOWN, "parameters"),
        Figure(short(record.tokens), "tokens trained on"),
        Figure(speed(record), "tokens a second, median"),
        Figure(duration(record.seconds), "training time"),
        Figure(steps(record), "updates"),
    ]
    used = median(record.updates["mfu"])
    if math.isfinite(used):
        figures.append(Figure(percent(used), "of the devices' peak (MFU), median"))
    if len(record.skipped):
        figures.append(Figure(f"{len(record.skipped):,}", "updates skipped, not finite"))
    if record.rollbacks:
        figures.append(Figure(f"{len(record.rollbacks):,}", "times the run went back"))
    return [figure for figure in figures if figure.value != UNKNOWN]


def best_scored(record: Record) -> tuple[Mapping[str, Any], str]:
    """The figures that say most of the model, and on which text they are."""
    for split in ("test", "validation"):
        scored = record.newest(split)
        if scored is not None:
            return scored, split
    if len(record.looks["step"]):
        return {name: column[-1] for name, column in record.looks.items()}, "held-out"
    known = np.flatnonzero(np.isfinite(record.updates["loss"]))
    return ({"loss": record.updates["loss"][known[-1]]} if len(known) else {}), "training"


def leak(row: Mapping[str, Any]) -> str | None:
    """What it means that lines of the test text occur in training; None where that is not known."""
    share = number(row.get("seen_long_lines"))
    if not math.isfinite(share):
        return None
    return (
        f"{percent(share)} of the test text's long lines also occur, word for word, in the training text. A model can "
        "have learned those by heart, so the smaller this share, the more the figures say of text that is really new."
    )


def verdict(row: Mapping[str, Any]) -> str:
    """The model beside the compressors, in a sentence."""
    model, zlib, lzma = (number(row.get(f"{who}bits_per_byte")) for who in ("", "zlib_", "lzma_"))
    text = "bits for a byte of text it has never seen; fewer is better."
    if not (math.isfinite(zlib) and math.isfinite(lzma)):
        return f"The model needs {model:.3f} {text}"
    beaten = [name for name, level in (("zlib -9", zlib), ("lzma", lzma)) if model < level]
    than = {
        2: "fewer than both compressors",
        1: f"fewer than {beaten[0]}" if beaten else "",
        0: "more than both compressors",
    }
    return f"The model needs {model:.3f} {text} That is {than[len(beaten)]} on the same bytes."


def fields(config: Mapping[str, Any]) -> list[Field]:
    """Every value of a config; those of this version with what was changed."""
    try:
        rows = describe(from_json(Run, json.dumps(config)))
    except ConfigError:  # another version's config still shows, without its defaults
        return [Field(*_split(path), _json(value), False) for path, value in _leaves("", config)]
    return [Field(*_split(row.path), _json(row.value), row.changed) for row in rows if row.words != SECTION]


def differences(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Every path at which the runs' configs differ, with each run's value; names and places left out."""
    first = records[0].config
    paths = dict.fromkeys(d.path for record in records[1:] for d in diff(first, record.config))
    leaves = [path for path in paths if path not in ("name", "run_dir")]
    return [(path, [_json(at(record.config, path, ABSENT)) for record in records]) for path in leaves]


def fixed(value: Any, digits: int) -> str:
    """A number with so many decimals."""
    known = number(value)
    return f"{known:,.{digits}f}" if math.isfinite(known) else UNKNOWN


def percent(value: Any) -> str:
    """A share as a percentage."""
    known = number(value)
    return f"{100 * known:.1f}%" if math.isfinite(known) else UNKNOWN


def count(value: Any) -> str:
    """A whole number with separators."""
    known = number(value)
    return f"{known:,.0f}" if math.isfinite(known) else UNKNOWN


def speed(record: Record) -> str:
    """The median of tokens a second."""
    middle = median(record.updates["tokens_per_s"])
    return short(middle) if math.isfinite(middle) else UNKNOWN


def steps(record: Record) -> str:
    """Updates made, of how many if there are more to come."""
    whole = f" of {record.steps:,}" if record.steps is not None and record.done < record.steps else ""
    return f"{record.done:,}{whole}"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (large, size), (small, part) in itertools.pairwise(units):
        if round(seconds) >= size:
            whole, rest = divmod(round(seconds / part), size // part)
            return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"
    return f"{seconds:.0f} s"


def median(values: np.ndarray) -> float:
    """The median of what is known; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def _split(path: str) -> tuple[str, str]:
    section, _, name = path.rpartition(".")
    return section, name


def _leaves(path: str, node: Any) -> list[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        return [(path, node)]
    return [leaf for name, value in node.items() for leaf in _leaves(f"{path}.{name}" if path else str(name), value)]


def _json(value: Any) -> str:
    if value is ABSENT:
        return UNKNOWN
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
