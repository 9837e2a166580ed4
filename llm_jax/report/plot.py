"""A chart as HTML: curves in an SVG that stretches with the page, their labels beside it in ordinary text."""

import math
from xml.etree.ElementTree import Element

import numpy as np

from llm_jax.report.axes import tick_text, ticks, value_text
from llm_jax.report.curves import Chart, Scale, Series, scaled
from llm_jax.report.html import data, element

# The SVG's own coordinates; it is stretched to whatever place there is, and strokes keep their width.
SIDE = 1000
# Colours of runs in the style sheet; more runs begin again.
COLOURS = 8


def figure(chart: Chart) -> Element:
    """The chart with its legend, which shows each curve's last value, and the data for reading off others."""
    return element(
        "figure",
        {"class": f"chart {chart.key}{' alone' if len({one.run for one in chart.series}) == 1 else ''}"},
        element(
            "figcaption",
            None,
            element("h3", None, chart.title),
            element("p", {"class": "note"}, chart.note),
            _legend(chart),
        ),
        element("div", {"class": "plot"}, _svg(chart), *_labels(chart)),
        data(
            {
                "scale": chart.scale,
                "format": chart.format,
                "x": chart.x_range,
                "y": chart.y_range,
                "series": [{"x": _numbers(one.x), "y": _numbers(one.y)} for one in chart.series],
            }
        ),
    )


def colour(run: int) -> str:
    """The class that gives a run's colour."""
    return f"c{run % COLOURS}"


def path(x: np.ndarray, y: np.ndarray, dots: bool) -> str:
    """An SVG path through points in the SVG's coordinates, with gaps where they are not finite."""
    if dots:
        # With round ends, a line of no length is a dot, and it stays round when the picture is stretched.
        return "".join(f"M{a:.1f} {b:.1f}h.01" for a, b in zip(x, y, strict=True) if math.isfinite(b))
    parts, drawing = [], False
    for index, (a, b) in enumerate(zip(x, y, strict=True)):
        if not math.isfinite(b):
            drawing = False
            continue
        parts.append(f"{'L' if drawing else 'M'}{a:.1f} {b:.1f}")
        alone = not drawing and (index + 1 == len(y) or not math.isfinite(y[index + 1]))
        parts.append("h.01" if alone else "")
        drawing = True
    return "".join(parts)


def _svg(chart: Chart) -> Element:
    curves = element("g", {"class": "curves"})
    for reference in chart.references:
        y = _across(np.asarray([reference.y]), chart.y_range, chart.scale)[0]
        curves.append(element("path", {"class": "reference", "d": f"M0 {SIDE - y:.1f}H{SIDE}"}))
    for one in chart.series:
        x, y = _across(one.x, chart.x_range, "linear"), SIDE - _across(one.y, chart.y_range, chart.scale)
        shape = path(x, y, dots=one.style == "dots")
        curves.append(element("path", {"class": f"{one.style} {colour(one.run)}", "d": shape}))
    if chart.skipped:
        x = _across(np.asarray(chart.skipped), chart.x_range, "linear")
        curves.append(element("path", {"class": "skipped", "d": "".join(f"M{a:.1f} {SIDE}v-{SIDE // 20}" for a in x)}))
    if chart.went_back:
        x = _across(np.asarray(chart.went_back), chart.x_range, "linear")
        curves.append(element("path", {"class": "went-back", "d": "".join(f"M{a:.1f} 0V{SIDE}" for a in x)}))
    if chart.best is not None:
        x = _across(np.asarray(chart.best[:1]), chart.x_range, "linear")
        y = SIDE - _across(np.asarray(chart.best[1:]), chart.y_range, chart.scale)
        for name in ("best", "best inner"):  # a ring, drawn as a dot on a dot
            curves.append(element("path", {"class": name, "d": path(x, y, dots=True)}))
    grid = element("g", {"class": "grid"})
    for value in ticks(*chart.y_range, chart.scale):
        y = _across(np.asarray([value]), chart.y_range, chart.scale)[0]
        grid.append(element("path", {"d": f"M0 {SIDE - y:.1f}H{SIDE}"}))
    box = {"viewBox": f"0 0 {SIDE} {SIDE}", "preserveAspectRatio": "none", "role": "img", "aria-label": _told(chart)}
    return element("svg", box, grid, curves)


def _labels(chart: Chart) -> list[Element]:
    """Numbers on both axes and names of levels, placed in percent."""
    labels = []
    for value in ticks(*chart.y_range, chart.scale):
        y = _across(np.asarray([value]), chart.y_range, chart.scale)[0]
        labels.append(element("span", {"class": "y", "style": f"bottom:{100 * y / SIDE:.2f}%"}, tick_text(value)))
    for value in ticks(*chart.x_range, "linear"):
        x = _across(np.asarray([value]), chart.x_range, "linear")[0]
        labels.append(element("span", {"class": "x", "style": f"left:{100 * x / SIDE:.2f}%"}, tick_text(value)))
    lowest = min((reference.y for reference in chart.references), default=math.nan)
    for reference in chart.references:
        y = _across(np.asarray([reference.y]), chart.y_range, chart.scale)[0]
        # The lowest level is named below its line, the others above theirs: two that are close do not overlap.
        side = "level under" if reference.y == lowest and len(chart.references) > 1 else "level"
        place = {"class": side, "data-y": str(reference.y), "style": f"bottom:{100 * y / SIDE:.2f}%"}
        text = f"{reference.name} {value_text(reference.y, chart.format)}"
        labels.append(element("span", place, text))
    return labels


def _legend(chart: Chart) -> Element:
    items = [
        element(
            "li",
            {"data-series": str(index)},
            element("i", {"class": f"swatch {one.style} {colour(one.run)}"}),
            one.name,
            " ",
            element("b", None, _last_value(one, chart)),
        )
        for index, one in enumerate(chart.series)
    ]
    if chart.skipped:
        items.append(element("li", None, element("i", {"class": "swatch skipped"}), "skipped, not finite"))
    if chart.went_back:
        items.append(element("li", None, element("i", {"class": "swatch went-back"}), "went back to here"))
    if chart.best is not None:
        step, value = chart.best
        text = element("b", None, value_text(value, chart.format))
        items.append(element("li", None, element("i", {"class": "swatch best"}), f"best, step {step:,.0f} ", text))
    return element("ul", {"class": "legend"}, *items)


def _told(chart: Chart) -> str:
    """The chart for those who do not see it."""
    curves = "; ".join(f"{one.name}: {_last_value(one, chart)} at the end" for one in chart.series)
    return f"{chart.title} by step. {curves}"


def _last_value(one: Series, chart: Chart) -> str:
    return value_text(float(one.y[np.isfinite(one.y)][-1]), chart.format)


def _across(values: np.ndarray, ends: tuple[float, float], scale: Scale) -> np.ndarray:
    """Where values lie between two ends, 0 to SIDE."""
    low, high = scaled(np.asarray(ends), scale)
    # What lies far outside is cut off anyway, and some renderers fail on huge coordinates.
    return np.clip((scaled(values, scale) - low) / (high - low) * SIDE, -SIDE, 2 * SIDE)


def _numbers(values: np.ndarray) -> list[float | None]:
    """Values for the page's script, in six digits; null for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
