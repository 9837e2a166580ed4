"""The report: one HTML document that opens from disk, without a network; in light and dark, on screen and paper."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from llm_jax.report import html, scores, sections
from llm_jax.report.experts import experts
from llm_jax.report.record import Record


def render(records: Sequence[Record], out: Path) -> str:
    """The document on one run or several, to be written to `out`, from where its links lead."""
    assets = files("llm_jax.report")
    style, script = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    top = sections.figures(records[0]) if len(records) == 1 else sections.comparison(records)
    parts = [
        sections.header(records),
        top,
        sections.curves(records),
        sections.rollbacks(records),
        experts(records),
        sections.samples(records),
        scores.suite(records),
        scores.tasks(records),
        sections.evaluation(records),
        sections.configuration(records),
        sections.environment(records),
        sections.files(records, out),
    ]
    main = html.element("main", None, *(part for part in parts if part is not None))
    title = records[0].name if len(records) == 1 else f"{len(records)} runs: {', '.join(r.name for r in records)}"
    return html.page(title, style, script, [main])
