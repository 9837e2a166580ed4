"""Error bars: how far a figure would move had other items been drawn (percentile bootstrap, Efron 1979)."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 1000
SHARE = 0.95
SEED = 0

# value, and the borders of the middle 95% of what it is over resampled items, low and high.
Estimate = dict[str, float]


def estimate(statistic: Callable[[np.ndarray], float], n: int) -> Estimate:
    """A statistic of n items, given as a function of items' numbers (int [n], some of them more than once).

    The same each time: the numbers are drawn from a seed of their own.
    """
    assert n > 0
    rng = np.random.default_rng(SEED)
    resampled = [statistic(rng.integers(n, size=n)) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return {"value": float(statistic(np.arange(n))), "low": float(low), "high": float(high)}


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of the items' values."""
    return ratio(values, [1.0] * len(values))


def ratio(totals: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> Estimate:
    """The sum of the items' totals divided by the sum of their weights, which are positive."""
    total_N, weight_N = np.array(totals, np.float64), np.array(weights, np.float64)
    return estimate(lambda item_N: float(total_N[item_N].sum() / weight_N[item_N].sum()), len(total_N))


def error(figure: Estimate) -> float:
    """What stands after the plus-minus sign: half of what lies between low and high."""
    return (figure["high"] - figure["low"]) / 2
