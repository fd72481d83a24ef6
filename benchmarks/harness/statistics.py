"""Comparing arms over paired seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["Change", "adjusted", "compare"]


@dataclass(frozen=True)
class Change:
    """The change of an arm's loss against its baseline's, in per cent; below 0 is better.

    Attributes:
        mean: Over seeds.
        low: Lower end of the 95 % confidence interval of the mean (Student's t, paired).
        high: Its upper end.
        spread: Standard deviation over seeds.
        p: Two-sided p-value of the paired t-test.
        seeds: How many pairs there are.
        diverged: How many more there would be if neither run of the pair had diverged.
    """

    mean: float
    low: float
    high: float
    spread: float
    p: float
    seeds: int
    diverged: int = 0


def compare(losses: Sequence[float | None], baseline: Sequence[float | None]) -> Change:
    """Compare losses with those of the baseline on the same seeds.

    Args:
        losses: One for each seed, ``None`` for a run that diverged.
        baseline: Likewise, in the same order.

    Returns:
        The change. With fewer than two pairs it is NaN.
    """
    pairs = [(a, b) for a, b in zip(losses, baseline, strict=True) if None not in (a, b)]
    diverged = len(losses) - len(pairs)
    if len(pairs) < 2:
        return Change(*(math.nan,) * 5, seeds=len(pairs), diverged=diverged)
    changes = np.array([100 * (a / b - 1) for a, b in pairs])  # type: ignore[operator]
    test = stats.ttest_1samp(changes, 0.0)
    low, high = test.confidence_interval(0.95)
    return Change(
        mean=float(changes.mean()),
        low=float(low),
        high=float(high),
        spread=float(changes.std(ddof=1)),
        p=float(test.pvalue),
        seeds=len(pairs),
        diverged=diverged,
    )


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of one table for their number, by Benjamini and Hochberg's procedure."""
    p = np.array(p_values)
    known = ~np.isnan(p)
    p[known] = stats.false_discovery_control(p[known])
    return p.tolist()
