"""Round numbers for an axis, and numbers as they are read."""

import math

from llm_jax.report.curves import Format, Scale
from llm_jax.train.metrics import short


def ticks(low: float, high: float, scale: Scale, most: int = 7) -> list[float]:
    """Round values from low to high, at most so many; 1, 2 and 5 times powers of ten where an axis spans several."""
    if scale == "log" and high / low > 5:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for leads in ((1, 2, 5), (1, 3), (1,)):
            values = [lead * 10.0**decade for decade in decades for lead in leads]
            inside = [value for value in values if low <= value <= high]
            if len(inside) <= most:
                return inside
        return inside[:: -(-len(inside) // most)]  # more decades than that: some of them
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    for lead in (1, 2, 2.5, 5, 10, 20):
        step = lead * size
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [index * step for index in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A round number without needless digits: 0.5, 200, 20k, 2e-3."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.6g}{letter}"
    if value and abs(value) < 0.01:
        return _exponent(f"{value:.5e}")
    return f"{value:.6g}"


def value_text(value: float, format: Format) -> str:
    """A measured number in the digits that its kind deserves."""
    match format:
        case "loss" | "bits":
            return f"{value:.3f}"
        case "rate":
            return _exponent(f"{value:.2e}")
        case "short":
            return short(value)


def _exponent(text: str) -> str:
    """1.50e-04 as 1.5e-4."""
    digits, power = text.split("e")
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}e{int(power)}"
