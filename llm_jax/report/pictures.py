"""The report's charts as SVG or PNG files, drawn by matplotlib without a browser."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from llm_jax.config import ConfigError
from llm_jax.report.axes import tick_text, ticks, value_text
from llm_jax.report.curves import Chart, charts
from llm_jax.report.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colours of runs, as in page.css.
COLOURS = ("#2f6db3", "#c8602b", "#3a8a5c", "#9a56a0", "#b08a1e", "#3f97a3", "#b84a62", "#6b6f76")
INK, QUIET, GRID, ALARM = "#1d2126", "#6b7178", "#e7e7e3", "#c0392b"
SIZE_INCHES = (6.4, 3.4)


def draw(records: Sequence[Record], folder: Path, kind: Literal["svg", "png"]) -> list[Path]:
    """Writes one picture a chart into a folder, and returns their paths. Raises ConfigError without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ConfigError(f"--{kind} needs matplotlib, which is not installed: pip install 'llm-jax[plot]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # The same run gives the same bytes: no date, and no random names inside an SVG.
    with mpl.rc_context(
        {"svg.hashsalt": "llm_jax", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    ):
        for chart in charts(records):
            figure = Figure(figsize=SIZE_INCHES, layout="constrained")
            _fill(figure.subplots(), chart)
            path = folder / f"{chart.key}.{kind}"
            figure.savefig(path, dpi=200, metadata={"Date": None} if kind == "svg" else {"Software": None})
            written.append(path)
    return written


def _fill(axes: "Axes", chart: Chart) -> None:
    lowest = min((reference.y for reference in chart.references), default=0.0)
    for reference in chart.references:
        axes.axhline(reference.y, color=QUIET, linewidth=1, linestyle=(0, (1, 2)))
        text = f"{reference.name} {value_text(reference.y, chart.format)}"
        under = reference.y == lowest and len(chart.references) > 1
        beside, align = ((4, -3), "top") if under else ((4, 2), "bottom")
        axes.annotate(text, (0, reference.y), beside, ("axes fraction", "data"), "offset points", va=align, color=QUIET)
    for one in chart.series:
        line = axes.plot(one.x, one.y, color=COLOURS[one.run % len(COLOURS)], label=one.name, linewidth=1.6)[0]
        match one.style:
            case "faint":
                line.set(linewidth=0.7, alpha=0.3)
            case "dashed":
                line.set_linestyle((0, (4, 2)))
            case "dots":
                line.set(linestyle="none", marker="o", markersize=4, color=_dots_colour(chart, one.run))
    if chart.skipped:
        bottom = np.zeros(len(chart.skipped))
        marks = axes.plot(chart.skipped, bottom, "|", color=ALARM, clip_on=False, label="skipped, not finite")[0]
        marks.set_transform(axes.get_xaxis_transform())
    for n, step in enumerate(chart.went_back):
        axes.axvline(
            step, color=ALARM, linewidth=1, linestyle=(0, (4, 4)), label="went back to here" if n == 0 else None
        )
    if chart.best is not None:
        ring = axes.plot(*chart.best, "o", label=f"best, step {chart.best[0]:,.0f}")[0]
        ring.set(markersize=9, markerfacecolor="none", markeredgecolor=COLOURS[1], markeredgewidth=2)
    axes.set(yscale=chart.scale, xlim=chart.x_range, ylim=chart.y_range, xlabel="step")
    axes.set_xticks(ticks(*chart.x_range, "linear"))
    axes.set_yticks(ticks(*chart.y_range, chart.scale))
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: tick_text(value))
    axes.set_title(chart.title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, colors=QUIET)
    axes.xaxis.label.set_color(QUIET)
    if len(chart.series) > 1 or chart.skipped or chart.went_back or chart.best is not None:
        axes.legend(frameon=False, labelcolor=INK)


def _dots_colour(chart: Chart, run: int) -> str:
    """Of one run, dots have a colour of their own, since its curve has the run's; of several, each its run's."""
    alone = len({one.run for one in chart.series}) == 1
    return COLOURS[1] if alone else COLOURS[run % len(COLOURS)]
