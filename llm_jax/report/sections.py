"""The report's parts, from top to bottom, as HTML elements."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree.ElementTree import Element

from llm_jax.report import words
from llm_jax.report.curves import charts
from llm_jax.report.html import Child, element, table
from llm_jax.report.parts import named, section
from llm_jax.report.plot import figure
from llm_jax.report.record import Record, number
from llm_jax.report.words import UNKNOWN, count, fixed, percent

FILES = {
    "config.json": "the run as a value; llm-jax reads it back",
    "metrics.jsonl": "one line an update",
    "validation.jsonl": "one line a look at held-out text",
    "eval.jsonl": "one line an evaluation, with its sample",
    "best.json": "the best of the checkpoints that were evaluated as they came",
    "rollbacks.jsonl": "one line each time that the run went back",
    "environment.json": "what each attempt ran on",
    "checkpoints": "the states to go on from, to evaluate and to generate with",
    "tokenizer.model": "how text becomes tokens, for sentencepiece",
    "tensorboard": "the same curves for TensorBoard",
    "profile": "the profiler's traces",
    "heartbeats": "where each process of the newest attempt was last seen",
    "stalls": "of attempts that stood still, every thread's stack",
}

# Evaluations that are shown at once.
MOST_ROWS = 12


def header(records: Sequence[Record]) -> Element:
    """The title, and what this is."""
    if len(records) > 1:
        title, lead = f"{len(records)} runs compared", ", ".join(record.name for record in records)
        lines = [element("p", {"class": "lead"}, lead)]
    else:
        title = records[0].name
        lines = [
            element("p", {"class": "lead"}, words.lead(records[0])),
            element("p", {"class": "state"}, words.state(records[0])),
        ]
    return element(
        "header", None, element("p", {"class": "kicker"}, "Training report"), element("h1", None, title), *lines
    )


def figures(record: Record) -> Element:
    """A run's headline: bits per byte beside the compressors, and the other figures."""
    tiles = [
        element("div", {"class": "tile"}, element("b", None, value), element("span", None, label))
        for value, label in words.headline(record)
    ]
    columns = next((columns for columns in (4, 5, 3) if len(tiles) % columns == 0), 4)  # no row is left half empty
    grid = element("div", {"class": "tiles", "style": f"--columns:{columns}"}, *tiles)
    return element("section", {"class": "headline"}, _verdict(record), grid)


def comparison(records: Sequence[Record]) -> Element:
    """A row a run; the best bits per byte stands out, of masked models the best accuracy."""
    masked = all(record.masked for record in records)
    name = "accuracy" if masked else "bits_per_byte"
    values = [number((record.newest("test") or {}).get(name)) for record in records]
    best = (max if masked else min)((value for value in values if math.isfinite(value)), default=math.nan)
    rows: list[list[Child]] = []
    for run, (record, own) in enumerate(zip(records, values, strict=True)):
        test = record.newest("test") or {}
        held_out = record.looks["loss"]
        rows.append(
            [
                named(record, run),
                element("strong" if own == best else "span", None, percent(own) if masked else fixed(own, 3)),
                fixed(test.get("loss"), 3),
                fixed(held_out[-1], 3) if len(held_out) else UNKNOWN,
                words.short(record.parameters) if record.parameters else UNKNOWN,
                words.short(record.tokens),
                words.speed(record),
                words.duration(record.seconds),
                words.steps(record),
            ]
        )
    head = (
        "Run",
        "Test accuracy" if masked else "Test bits per byte",
        "Test loss",
        "Held-out loss",
        "Parameters",
        "Tokens",
        "Tokens/s",
        "Time",
        "Updates",
    )
    return section("Side by side", table(head, rows, {"class": "numbers"}))


def curves(records: Sequence[Record]) -> Element:
    """Every chart there is something to show in."""
    drawn = [figure(chart) for chart in charts(records)]
    if not drawn:
        return section("Curves", element("p", {"class": "empty"}, "No update has been recorded yet."))
    hint = element("p", {"class": "hint"}, "Move over a chart to read it off; drag to look closer. ")
    hint.append(element("button", {"class": "all-steps", "type": "button"}, "Show all steps"))
    return section("Curves", hint, element("div", {"class": "charts"}, *drawn))


def rollbacks(records: Sequence[Record]) -> Element | None:
    """Every time that a run went back; None where none did."""
    rows: list[list[Child]] = []
    for run, record in enumerate(records):
        for back in record.rollbacks:
            came = f"step {count(back.get('from_step'))}"
            gone = [count(back.get(name)) for name in ("skipped", "to_step", "next_batch")]
            rows.append([named(record, run, came) if len(records) > 1 else came, *gone, words.moment(back.get("time"))])
    if not rows:
        return None
    about = (
        "Too many updates were skipped: the run went back to a checkpoint before them, and on with the batches after."
    )
    head = ("Went back from", "Updates skipped", "To step", "On with batch", "When (UTC)")
    return section("Rollbacks", element("p", {"class": "note"}, about), table(head, rows, {"class": "numbers"}))


def evaluation(records: Sequence[Record]) -> Element:
    """Every evaluation, the newest first, and what may flatter it."""
    several = len(records) > 1
    per_byte = not all(record.masked for record in records)
    rows: list[list[Child]] = []
    for run, record in enumerate(records):
        best = {(best.step, best.split) for best in record.best.values()}
        for row in sorted(record.evaluations, key=lambda row: (-number(row["step"]), str(row.get("split")))):
            text = f"step {count(row.get('step'))}, {row.get('split', UNKNOWN)}"
            text += ", the best" * ((row["step"], row.get("split")) in best)
            rows.append([named(record, run, text) if several else text, *_scores(row, per_byte)])
    if not rows:
        command = element("code", None, f"llm-jax eval {records[0].directory}")
        none = element("p", {"class": "empty"}, "Not evaluated yet: ", command, " scores the newest checkpoint.")
        return section("Evaluation", none)
    beside = ("Bits per byte", "zlib -9", "lzma") if per_byte else ()
    head = ("", *beside, "Loss", "Perplexity", "Accuracy", "Tokens", "Bytes")
    shown = len(rows) if several else MOST_ROWS
    parts: list[Child] = [table(head, rows[:shown], {"class": "numbers"})]
    if rows[shown:]:
        summary = element("summary", None, f"{len(rows) - shown} earlier ones")
        parts.append(element("details", None, summary, table(head, rows[shown:], {"class": "numbers"})))
    told: dict[str, list[str]] = {}
    for record in records:
        sentence = words.leak(record.newest("test") or {})
        if sentence:
            told.setdefault(sentence, []).append(record.name)
    for sentence, names in told.items():  # runs on the same text share a sentence
        shared = len(told) == 1
        parts.append(element("p", {"class": "note"}, sentence if shared else f"{', '.join(names)}: {sentence}"))
    return section("Evaluation", *parts)


def samples(records: Sequence[Record]) -> Element | None:
    """What each model wrote; None where none was asked to."""
    parts: list[Child] = []
    for run, record in enumerate(records):
        row = next((row for row in reversed(record.evaluations) if isinstance(row.get("sample"), dict)), None)
        if row is None:
            continue
        written = element("pre", {"class": "sample"}, *_written(row["sample"]))
        if len(records) > 1:
            folded = {} if parts else {"open": "open"}
            written = element("details", folded, element("summary", None, named(record, run)), written)
        parts.append(written)
    told = {
        "Marked is what was hidden: the model's guess, and struck out what was there if that is something else."
        if record.masked
        else "Grey is the beginning it was given; the rest is the model's own."
        for record in records
    }
    about = element("p", {"class": "note"}, " ".join(sorted(told, reverse=True)))
    return section("What it writes", about, *parts) if parts else None


def configuration(records: Sequence[Record]) -> Element:
    """One run's config by section; of several what differs, and each one whole behind a click."""
    if not any(record.config for record in records):
        return section("Configuration", element("p", {"class": "empty"}, "Not recorded."))
    if len(records) == 1:
        hint = element("p", {"class": "note"}, "Bold is what differs from the defaults.")
        return section("Configuration", hint, _config(records[0]))
    rows = [(path, *values) for path, values in words.differences(records)]
    names = [named(record, run) for run, record in enumerate(records)]
    differing = (
        table(["Field", *names], rows) if rows else element("p", {"class": "empty"}, "The configs are the same.")
    )
    whole = [
        element("details", None, element("summary", None, named(record, run)), _config(record))
        for run, record in enumerate(records)
        if record.config
    ]
    return section("Configuration: what differs", differing, *whole)


def environment(records: Sequence[Record]) -> Element:
    """On what the newest attempt of each run ran; of one run, every attempt."""
    facts = [dict(_facts(record.attempts)) for record in records]
    names = list(dict.fromkeys(name for own in facts for name in own))
    if not names:
        return section("Environment", element("p", {"class": "empty"}, "Not recorded."))
    rows = [(name, *(own.get(name, UNKNOWN) for own in facts)) for name in names]
    if len(records) > 1:
        head = ["", *(named(record, run) for run, record in enumerate(records))]
        return section("Environment", table(head, rows, {"class": "facts"}))
    parts = [table((), rows, {"class": "facts"})]
    attempts = records[0].attempts
    if len(attempts) > 1:
        about = f"The run was stopped and gone on with: it is the work of {len(attempts)} attempts."
        lines = [(_moment(a.get("started")), _text(a.get("restored_step")), _commit(a), _devices(a)) for a in attempts]
        parts.append(element("p", {"class": "note"}, about))
        parts.append(table(("Started", "After step", "Commit", "Devices"), lines))
    return section("Environment", *parts)


def files(records: Sequence[Record], out: Path) -> Element:
    """Where everything lies; links lead there from the report's own place."""
    if len(records) > 1:
        places = [(named(r, run), _link(r.directory, out, str(r.directory))) for run, r in enumerate(records)]
        return section("Files", table((), places, {"class": "facts"}))
    directory = records[0].directory
    rows = [
        (_link(directory / name, out, name), meaning) for name, meaning in FILES.items() if (directory / name).exists()
    ]
    return section("Files", table((), [("run directory", str(directory)), *rows], {"class": "facts"}))


def _verdict(record: Record) -> Element:
    row, split = words.best_scored(record)
    bits = number(row.get("bits_per_byte"))
    if record.masked and split != "training" and math.isfinite(number(row.get("accuracy"))):
        return element("div", {"class": "verdict"}, *_guessed(row, split))
    if split == "training" or not math.isfinite(bits):
        command = element("code", None, f"llm-jax eval {record.directory}")
        return element("p", {"class": "empty"}, "No figures on held-out text yet: ", command, " scores a checkpoint.")
    big = element(
        "div",
        {"class": "big"},
        element("b", None, f"{bits:.2f}"),
        element("span", None, f"bits per byte on {split} text"),
    )
    levels = [("this model", bits, "own"), ("zlib -9", number(row.get("zlib_bits_per_byte")), "other")]
    levels.append(("lzma", number(row.get("lzma_bits_per_byte")), "other"))
    levels = [level for level in levels if math.isfinite(level[1])]
    widest = max(level for _, level, _ in levels)
    bars = [
        element(
            "div",
            {"class": f"bar {kind}"},
            element("span", None, name),
            element("i", {"style": f"width:{100 * level / widest:.1f}%"}),
            element("b", None, f"{level:.3f}"),
        )
        for name, level, kind in levels
    ]
    shown = bars if len(bars) > 1 else []  # a bar alone compares nothing
    told = element("p", {"class": "note"}, words.verdict(row))
    return element("div", {"class": "verdict"}, big, element("div", {"class": "bars"}, *shown, told))


def _guessed(row: Mapping[str, Any], split: str) -> list[Element]:
    """A masked model's headline; compressors do another thing, so it is beside none."""
    share, of = element("b", None, percent(row.get("accuracy"))), f"of hidden tokens in {split} text guessed right"
    big = element("div", {"class": "big"}, share, element("span", None, of))
    about = "It sees both sides of a hidden token, so there are no bits per byte and no compressors to compare it with."
    return [big, element("div", {"class": "bars"}, element("p", {"class": "note"}, about))]


def _written(sample: Mapping[str, Any]) -> list[Child]:
    """A prompt and what follows it; or a row with the guesses in it."""
    filled = sample.get("filled")
    if not isinstance(filled, list):
        prompt = element("span", {"class": "prompt"}, str(sample.get("prompt") or ""))
        return [prompt, str(sample.get("text") or "")]
    written: list[Child] = []
    for text, original in (part for part in filled if isinstance(part, list) and len(part) == 2):
        written.append(str(text) if original is None else element("mark", None, str(text)))
        if original not in (None, text):
            written.append(element("del", None, str(original)))
    return written


def _scores(row: Mapping[str, Any], per_byte: bool) -> list[str]:
    bits = [fixed(row.get(f"{who}bits_per_byte"), 3) for who in ("", "zlib_", "lzma_")] if per_byte else []
    loss, perplexity = fixed(row.get("loss"), 4), fixed(row.get("perplexity"), 2)
    return [*bits, loss, perplexity, percent(row.get("accuracy")), count(row.get("tokens")), count(row.get("bytes"))]


def _config(record: Record) -> Element:
    sections: dict[str, list[Child]] = {}
    for field in words.fields(record.config):
        value = element("dd", {"class": "changed"} if field.changed else None, field.value)
        for depth, letter in enumerate(field.section):
            if letter == ".":
                sections.setdefault(field.section[:depth], [])  # a section comes before those inside it
        sections.setdefault(field.section, []).append(element("div", None, element("dt", None, field.name), value))
    blocks = [
        element("div", {"class": "block"}, element("h3", None, name or "run"), element("dl", None, *rows))
        for name, rows in sections.items()
    ]
    return element("div", {"class": "config"}, *blocks)


def _link(path: Path, out: Path, text: str) -> Element:
    target = quote(Path(os.path.relpath(path, out.parent)).as_posix())
    return element("a", {"href": target}, text)


def _facts(attempts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The newest attempt's record as rows, with what belongs together on one line."""
    if not attempts:
        return []
    newest = attempts[-1]
    told = ("started", "commit", "changed_since_commit", "devices", "restored_step", "versions")
    rest = [(name.replace("_", " "), _text(value)) for name, value in newest.items() if name not in told]
    together = [("started", _moment(newest.get("started"))), ("attempts", str(len(attempts)))]
    together += [("commit", _commit(newest)), ("devices", _devices(newest))]
    return [*together, *rest, ("versions", _text(newest.get("versions")))]


def _moment(started: Any) -> str:
    """2026-11-22T03:20:00+00:00 as 2026-11-22 03:20 UTC."""
    text = _text(started)
    return f"{text[:10]} {text[11:16]} UTC" if text.endswith("+00:00") else text


def _commit(attempt: Mapping[str, Any]) -> str:
    commit = attempt.get("commit")
    if not commit:
        return "not from a git checkout"
    return f"{str(commit)[:12]}{', with changes' if attempt.get('changed_since_commit') else ''}"


def _devices(attempt: Mapping[str, Any]) -> str:
    devices = attempt.get("devices")
    return f"{devices.get('count')} x {devices.get('kind')}" if isinstance(devices, dict) else UNKNOWN


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items() if item is not None) or "none"
    return UNKNOWN if value is None else str(value)
