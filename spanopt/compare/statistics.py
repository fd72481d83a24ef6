"""Statistics that compare arms over paired seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Change", "adjusted", "changes", "compared", "seeds_missing"]

MOST_SEEDS = 100_000


@dataclass(frozen=True)
class Change:
    """The change of an arm's loss against another arm's, in per cent. Below 0, the loss is less.

    Attributes:
        mean: The mean over seeds.
        low: Lower end of the 95 % confidence interval of the mean.
        high: Upper end of that interval.
        spread: Standard deviation over seeds.
        p: Two-sided p-value of "there is no change".
        seeds: The number of pairs.
        diverged: The number of pairs that are left out, since a run of them diverged.
    """

    mean: float
    low: float
    high: float
    spread: float
    p: float
    seeds: int
    diverged: int = 0


def changes(losses: Sequence[float | None], baseline: Sequence[float | None]) -> list[float]:
    """Return the change of each pair in per cent, without the pairs in which a run diverged."""
    pairs = zip(losses, baseline, strict=True)
    return [100 * (a / b - 1) for a, b in pairs if a is not None and b is not None]


def compared(losses: Sequence[float | None], baseline: Sequence[float | None]) -> Change:
    """Compare losses with those of a baseline on the same seeds: Student's t, paired.

    The interval is valid for a number of seeds that was fixed beforehand.

    Args:
        losses: A loss for each seed; ``None`` for a run that diverged.
        baseline: The baseline's losses in the same order of seeds.

    Returns:
        The change. Its numbers are NaN with fewer than two pairs.
    """
    from scipy import stats

    values = np.array(changes(losses, baseline))
    diverged = len(losses) - len(values)
    if len(values) < 2:
        return Change(*(math.nan,) * 5, seeds=len(values), diverged=diverged)
    if not values.any():  # the runs are equal, and t is not defined
        return Change(0.0, 0.0, 0.0, 0.0, 1.0, len(values), diverged)
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    return Change(
        mean=float(values.mean()),
        low=float(low),
        high=float(high),
        spread=float(values.std(ddof=1)),
        p=float(test.pvalue),
        seeds=len(values),
        diverged=diverged,
    )


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of one table for their number, by Benjamini and Hochberg's procedure."""
    from scipy import stats

    p = np.array(p_values)
    known = ~np.isnan(p)
    p[known] = stats.false_discovery_control(p[known])
    return p.tolist()


def seeds_missing(change: Change, margin: float) -> int:
    """Return about how many more seeds would make half the interval at most as wide as a margin.

    Args:
        change: The change on the seeds so far.
        margin: Half the width of the wanted interval, in per cent.
    """
    from scipy import stats

    if not change.spread > 0:  # the spread is not known yet
        return 0
    low, high = change.seeds, MOST_SEEDS
    while low < high:
        n = (low + high) // 2
        half = stats.t.ppf(0.975, max(n - 1, 1)) * change.spread / math.sqrt(max(n, 1))
        low, high = (low, n) if half <= margin else (n + 1, high)
    return low - change.seeds
