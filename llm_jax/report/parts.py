"""Pieces that several of the report's sections are made of."""

from xml.etree.ElementTree import Element

from llm_jax.report.html import Child, element
from llm_jax.report.plot import colour
from llm_jax.report.record import Record


def section(title: str, *children: Child) -> Element:
    """A part of the page under its heading."""
    return element("section", None, element("h2", None, title), *children)


def named(record: Record, run: int, text: str = "") -> Element:
    """A run's name behind its colour, and what more is to be said."""
    swatch = element("i", {"class": f"swatch line {colour(run)}"})
    return element("span", {"class": "run"}, swatch, record.name, f" {text}" * bool(text))
