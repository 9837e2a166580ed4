"""The curves of one run or several, as data: smoothed, thinned, and with the range that shows them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llm_jax.report.record import Columns, Record, number

# A curve is drawn by at most so many points: more than a screen has columns.
MOST_POINTS = 1200
# Smoothing takes the mean over this share of the updates made.
SMOOTHED_SHARE = 0.02
# A beginning of so small a share of the updates may leave the picture, if it would take most of its height.
BEGINNING_SHARE = 0.02
STEEP = 1.8

Scale = Literal["linear", "log"]
Style = Literal["line", "faint", "dashed", "dots"]
Format = Literal["loss", "bits", "rate", "short"]


@dataclass(frozen=True)
class Series:
    """One curve: points in the order of x, NaN where it has a gap; `run` is the number of its run, for the colour."""

    name: str
    x: np.ndarray
    y: np.ndarray
    run: int = 0
    style: Style = "line"


@dataclass(frozen=True)
class Reference:
    """A level to compare with."""

    name: str
    y: float


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps."""

    key: str
    title: str
    note: str
    series: Sequence[Series]
    y_range: tuple[float, float]
    x_range: tuple[float, float]
    scale: Scale = "linear"
    format: Format = "short"
    references: Sequence[Reference] = ()
    skipped: Sequence[float] = ()
    """Steps of skipped updates."""
    went_back: Sequence[float] = ()
    """Steps to which a run went back."""
    best: tuple[float, float] | None = None
    """Step and value of the best evaluation of one run."""


def charts(records: Sequence[Record]) -> list[Chart]:
    """Every chart that has something to show, in the order in which they are read."""
    last = max(last_step(record) for record in records)
    made = [chart(records, last) for chart in (_loss, _bits, _accuracy, _rate, _gradient, _speed, *_ROUTING)]
    return [chart for chart in made if chart is not None]


def last_step(record: Record) -> float:
    """The last step of which anything is known; at least 1."""
    steps = [record.done, *record.looks["step"][-1:], *(number(row["step"]) for row in record.evaluations), 1.0]
    return float(max(steps))


def smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """The mean over the window around each point, without what is not finite; narrower towards both ends."""
    n = len(y)
    known = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(n)
    # At the steep beginning no wider to the right than to the left, so that a curve keeps its place.
    half = np.minimum(index, window // 2)
    left, right = index - half, np.minimum(index + half, n - 1) + 1
    counted = count[right] - count[left]
    return np.where(counted > 0, (total[right] - total[left]) / np.maximum(counted, 1), np.nan)


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points that look the same: of each bucket the lowest and the highest; the ends stay."""
    if len(x) <= most:
        return x, y
    kept = [0, len(x) - 1]
    for bucket in np.array_split(np.arange(len(x)), (most - 2) // 2):
        finite = bucket[np.isfinite(y[bucket])]
        # A bucket without a finite value stays a gap.
        kept += [finite[np.argmin(y[finite])], finite[np.argmax(y[finite])]] if len(finite) else [bucket[0]]
    chosen = np.unique(kept)
    return x[chosen], y[chosen]


def smoothing_window(n: int) -> int:
    """How many updates are averaged, of n."""
    return max(1, round(n * SMOOTHED_SHARE))


def _loss(records: Sequence[Record], last: float) -> Chart | None:
    several = len(records) > 1
    series = []
    for run, record in enumerate(records):
        window = smoothing_window(len(record.updates["step"]))
        mean = "training" if window == 1 else f"training, mean of {window}"
        series += _with_mean(record, "loss", run, record.name if several else mean, faint=not several)
        name, style = (f"{record.name}, held out", "dashed") if several else ("held out", "dots")
        series.append(_series(record.looks, "loss", name, run, style))
    surprises = " or ".join(sorted({"a hidden token" if record.masked else "the next token" for record in records}))
    note = f"How surprised the model is by {surprises}, in nats; lower is better. "
    if several:
        note += (
            "Solid lines are training, as means of neighbouring updates; dashed ones are text that is never trained on."
        )
    else:
        note += "Held-out text is never trained on."
    skipped = np.concatenate([record.skipped for record in records])
    went_back = [number(back.get("to_step")) for record in records for back in record.rollbacks]
    return _chart("loss", "Loss", note, series, last, format="loss", skipped=skipped, went_back=went_back)


def _accuracy(records: Sequence[Record], last: float) -> Chart | None:
    """Of masked models, which have no bits per byte."""
    series = [
        _series(record.looks, "accuracy", record.name if len(records) > 1 else "held out", run, "line")
        for run, record in enumerate(records)
        if record.masked
    ]
    evaluated, best = _evaluated(records, "accuracy", masked=True)
    note = "Share of hidden tokens of text it has not seen that the model guesses right; higher is better."
    return _chart("accuracy", "Held-out accuracy", note, [*series, *evaluated], last, format="bits", low=0, best=best)


def _bits(records: Sequence[Record], last: float) -> Chart | None:
    series = []
    for run, record in enumerate(records):
        name = record.name if len(records) > 1 else "held out"
        series.append(_series(record.looks, "bits_per_byte", name, run, "line"))
    evaluated, best = _evaluated(records, "bits_per_byte", masked=False)
    references = _compressors(records)
    note = "Bits the model needs for a byte of text it has not seen, whatever its vocabulary; lower is better."
    if references:
        note += " The dotted lines are what general-purpose compressors need for the test text."
    return _chart(
        "bits_per_byte",
        "Held-out bits per byte",
        note,
        [*series, *evaluated],
        last,
        format="bits",
        references=references,
        best=best,
    )


def _evaluated(
    records: Sequence[Record], column: str, *, masked: bool
) -> tuple[list[Series], tuple[float, float] | None]:
    """A figure of one run's evaluations by split, and where the best of those is that a watcher made."""
    if len(records) > 1 or records[0].masked != masked:
        return [], None
    (record,) = records
    series = []
    styles: dict[str, Style] = {"validation": "dashed", "test": "dots"}
    for split, style in styles.items():
        rows = [row for row in record.evaluations if row["split"] == split]
        x, y = (np.asarray([number(row.get(key)) for row in rows]) for key in ("step", column))
        series.append(Series(f"{split} text", x, y, 0, style))
    best = next((record.best[split] for split in ("validation", "test") if split in record.best), None)
    if best is None:
        return series, None
    value = next(row.get(column) for row in record.evaluations if (row["step"], row["split"]) == best[:2])
    return series, (float(best.step), number(value))


def _rate(records: Sequence[Record], last: float) -> Chart | None:
    series = [
        _series(record.updates, "lr", record.name if len(records) > 1 else "learning rate", run, "line")
        for run, record in enumerate(records)
    ]
    return _chart(
        "learning_rate", "Learning rate", "How far an update moves the weights.", series, last, format="rate", low=0
    )


def _gradient(records: Sequence[Record], last: float) -> Chart | None:
    note = "Length of the gradient before clipping, on a logarithmic scale; lasting growth means trouble."
    return _chart("gradient_norm", "Gradient norm", note, _noisy(records, "grad_norm"), last, scale="log")


def _speed(records: Sequence[Record], last: float) -> Chart | None:
    note = "Speed of all devices together, evaluations and checkpoints not counted."
    return _chart("tokens_per_second", "Tokens per second", note, _noisy(records, "tokens_per_s"), last, low=0)


def _fullest(records: Sequence[Record], last: float) -> Chart | None:
    note = "Load of the fullest expert of the worst layer, as a multiple of an even share; 1 is perfect balance."
    return _chart("load", "Fullest expert", note, _noisy(records, "load_max_over_mean"), last, low=0)


def _entropy(records: Sequence[Record], last: float) -> Chart | None:
    note = "How undecided routers are, in nats: the logarithm of the number of experts is no preference, 0 certainty."
    return _chart("router_entropy", "Router entropy", note, _noisy(records, "router_entropy"), last, low=0)


def _dropped(records: Sequence[Record], last: float) -> Chart | None:
    note = "Share of the tokens' choices that found their expert full."
    series = _noisy(records, "dropped")
    # Dropless runs have a line of zeros, which tells nothing.
    return (
        _chart("dropped", "Dropped choices", note, series, last, low=0)
        if any(np.nanmax(s.y, initial=0) for s in series)
        else None
    )


_ROUTING = (_fullest, _entropy, _dropped)


def _noisy(records: Sequence[Record], column: str) -> list[Series]:
    """A figure of every update: faint as it is, and its mean; of several runs the mean alone."""
    several = len(records) > 1
    series = []
    for run, record in enumerate(records):
        window = smoothing_window(len(record.updates["step"]))
        name = record.name if several else "each update" if window == 1 else f"mean of {window}"
        series += _with_mean(record, column, run, name, faint=not several)
    return series


def _with_mean(record: Record, column: str, run: int, name: str, faint: bool) -> list[Series]:
    steps, values = record.updates["step"], record.updates[column]
    window = smoothing_window(len(steps))
    # What is not finite is a gap in the mean too, or a failure would be hidden.
    mean = np.where(np.isfinite(values), smoothed(values, window), np.nan) if window > 1 else values
    drawn = [Series(name, *thinned(steps, mean), run, "line")]
    if faint and window > 1:
        drawn.insert(0, Series("each update", *thinned(steps, values), run, "faint"))
    return drawn


def _series(columns: Columns, column: str, name: str, run: int, style: Style) -> Series:
    return Series(name, *thinned(columns["step"], columns[column]), run, style)


def _compressors(records: Sequence[Record]) -> list[Reference]:
    """zlib and lzma on the test text; runs on other text have other levels, and each is drawn once."""
    levels = {}
    for record in records:
        row = record.newest("test") or {}
        for name in ("zlib", "lzma"):
            level = number(row.get(f"{name}_bits_per_byte"))
            if math.isfinite(level):
                levels[name, round(level, 3)] = Reference(name, level)
    return list(levels.values())


def _chart(
    key: str,
    title: str,
    note: str,
    series: Sequence[Series],
    last: float,
    *,
    scale: Scale = "linear",
    format: Format = "short",
    references: Sequence[Reference] = (),
    skipped: Sequence[float] | np.ndarray = (),
    went_back: Sequence[float] = (),
    best: tuple[float, float] | None = None,
    low: float | None = None,
) -> Chart | None:
    """The chart with its ranges, from `low` on if that is given; None where no series has a point to draw."""
    series = [one for one in series if np.any(np.isfinite(scaled(one.y, scale)))]
    if not series:
        return None
    bottom, top = _y_range(series, [reference.y for reference in references], scale, last)
    return Chart(
        key=key,
        title=title,
        note=note,
        series=series,
        y_range=(bottom if low is None else low, top),
        x_range=(-0.01 * last, 1.01 * last),  # dots at both ends stay round
        scale=scale,
        format=format,
        references=references,
        skipped=[float(step) for step in skipped],
        went_back=[step for step in went_back if math.isfinite(step)],
        best=best if best is not None and math.isfinite(best[1]) else None,
    )


def _y_range(series: Sequence[Series], levels: Sequence[float], scale: Scale, last: float) -> tuple[float, float]:
    """What shows the curves: all of them, but neither single spikes of faint ones nor a steep beginning at length."""
    low, high, high_late = [*levels], [*levels], [*levels]
    for one in series:
        y = scaled(one.y, scale)
        known = np.isfinite(y)
        ends = np.quantile(y[known], (0.005, 0.995) if one.style == "faint" else (0.0, 1.0))
        low.append(ends[0])
        high.append(ends[1])
        late = y[known & (one.x >= BEGINNING_SHARE * last)]
        high_late.append(np.quantile(late, 0.995 if one.style == "faint" else 1.0) if len(late) else ends[1])
    bottom, top, top_late = min(low), max(high), max(high_late)
    if top - bottom > STEEP * (top_late - bottom):
        top = top_late + 0.25 * (top_late - bottom)
    margin = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
    ends = np.asarray([bottom - margin, top + margin])
    bottom, top = 10.0**ends if scale == "log" else ends
    return float(bottom), float(top)


def scaled(y: np.ndarray, scale: Scale) -> np.ndarray:
    """Where values lie on an axis: themselves or their decimal logarithms, NaN for what has none."""
    if scale == "linear":
        return y
    return np.log10(y, out=np.full(len(y), np.nan), where=y > 0)
