"""Intervals and p-values that stay valid however often they are looked at.

Source: the scale-invariant Gaussian mixture of the t-test, see Perez-Ortiz, Lardy, de Heide and
Gruenwald, "E-statistics, group invariance and anytime-valid testing" (Annals of Statistics 2024),
and Wang and Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian means with unknown
variance" (Sequential Analysis 2025, arXiv 2310.03722).

Let there be n differences, t their t-statistic and v = n - 1. Take the mixture over effects
mean / sd ~ N(0, c). Then

    E = (1 + n c)^(-1/2) * [(1 + t^2/v) / (1 + t^2/(v (1 + n c)))]^(n/2)

is a test martingale of "the mean is 0". So P(E ever reaches 1/a) <= a, which gives the p-value
1/max E. The means that are not rejected at n make an interval. With probability 1 - a at least,
the intervals at all n cover the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spanopt.compare.statistics import Change, changes

__all__ = ["at_any_time", "half_width", "width"]

ALPHA = 0.05
MIXTURE = 1.0  # c, which gives nearly the narrowest intervals from 8 seeds to 50


def half_width(spread: float, n: int, alpha: float = ALPHA) -> float:
    """Return half the width of the interval of the mean. It is infinite while n is too small.

    Args:
        spread: Standard deviation of the differences.
        n: The number of differences.
        alpha: The probability that any interval of the whole sequence misses the truth.
    """
    if n < 2:
        return math.inf
    if spread == 0:
        return 0.0
    grown = 1 + n * MIXTURE
    bound = (math.sqrt(grown) / alpha) ** (2 / n)
    if bound >= grown:
        return math.inf
    t2 = (n - 1) * (bound - 1) / (1 - bound / grown)
    return math.sqrt(t2 / n) * spread


def width(losses: Sequence[float | None], baseline: Sequence[float | None]) -> float:
    """Return the width of the interval that :func:`at_any_time` gives."""
    values = np.array(changes(losses, baseline))
    return 2 * half_width(float(values.std(ddof=1)), len(values)) if len(values) > 1 else math.inf


def evidence(values: NDArray[np.float64]) -> float:
    """Return the logarithm of E for these differences, against a mean of 0."""
    n = len(values)
    if n < 2:
        return 0.0
    spread = values.std(ddof=1)
    if spread == 0:
        return 0.0 if values[0] == 0 else math.inf
    x = values.mean() ** 2 * n / spread**2 / (n - 1)  # t^2 / v
    grown = 1 + n * MIXTURE
    return float(n / 2 * (math.log1p(x) - math.log1p(x / grown)) - math.log(grown) / 2)


def at_any_time(losses: Sequence[float | None], baseline: Sequence[float | None]) -> Change:
    """Compare losses with those of a baseline on the same seeds, valid at any number of seeds.

    Args:
        losses: A loss for each seed, in the order in which seeds were run; ``None`` for a run that
            diverged.
        baseline: The baseline's losses in the same order.

    Returns:
        The change, with its always-valid interval and p-value. They are NaN with fewer than two
        pairs.
    """
    values = np.array(changes(losses, baseline))
    n, diverged = len(values), len(losses) - len(values)
    if n < 2:
        return Change(*(math.nan,) * 5, seeds=n, diverged=diverged)
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    half = half_width(spread, n)
    most = max(evidence(values[:k]) for k in range(1, n + 1))
    p = math.exp(-max(most, 0.0))
    return Change(mean, mean - half, mean + half, spread, p, n, diverged)
