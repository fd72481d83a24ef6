"""A grid of values that is extended until its best value is not at an end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

__all__ = ["Grid"]


class Grid:
    """Values of a hyperparameter to try. It tells which to try next. A single value is not tuned.

    Args:
        values: The values to begin with: positive, ascending, at least one.
        extensions: How many values may be added at each end. The factor between added values is
            the factor between the two given values at that end.
        refine: Whether values half way between the best value and its neighbours are tried too.

    Raises:
        ValueError: Values that are not positive and ascending.
    """

    def __init__(self, values: Sequence[float], extensions: int = 3, refine: bool = False) -> None:
        ascending = all(a < b for a, b in itertools.pairwise(values))
        if not values or values[0] <= 0 or not ascending:
            raise ValueError(f"a grid is of positive numbers in ascending order, got {values!r}")
        self.values: list[float] = list(values)
        self._step = 2 if refine else 1
        below = values[1] / values[0] if len(values) > 1 else 2.0
        above = values[-1] / values[-2] if len(values) > 1 else 2.0
        coarse = [_rounded(values[0] / below**n) for n in range(extensions, 0, -1)]
        coarse += self.values
        coarse += [_rounded(values[-1] * above**n) for n in range(1, extensions + 1)]
        self.points: list[float] = coarse
        if refine:
            between = [_rounded(math.sqrt(a * b)) for a, b in itertools.pairwise(coarse)]
            self.points = sorted([*coarse, *between])

    def wanted(self, losses: Mapping[float, float]) -> list[float]:
        """Return the values that have to be tried next; none if the best one is known.

        Args:
            losses: The loss at each value tried so far; infinite if training diverged.
        """
        if len(self.values) == 1:
            return []
        missing = [value for value in self.values if value not in losses]
        if missing:
            return missing
        best = self.points.index(self.best(losses))
        for step in range(self._step, 0, -1):  # the neighbours, then those half way
            beside = [self.points[n] for n in (best - step, best + step) if self._has(n)]
            if best % self._step == 0 and any(value not in losses for value in beside):
                return [value for value in beside if value not in losses]
        return []

    def best(self, losses: Mapping[float, float]) -> float:
        """Return the value with the least loss; if there are several, the smallest of them."""
        if len(self.values) == 1:
            return self.values[0]
        return min(sorted(losses), key=lambda value: losses[value])

    def is_inside(self, losses: Mapping[float, float]) -> bool:
        """Return whether worse values have been tried on both sides of the best one."""
        if len(self.values) == 1:
            return True
        return min(losses) < self.best(losses) < max(losses)

    def _has(self, index: int) -> bool:
        return 0 <= index < len(self.points)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
