"""Schedules: functions from the number of steps taken to a strength or a scale.

The *strength* says how far the scales act: 0 is the identity (1, 1), and 1 is the scale that the
user asked for. Both factors are linear in it: 0.5 is half way, and 2 is twice as far from (1, 1).
Below 0, a factor moves to the other side of 1. A schedule may also return a scale, not a strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from spanopt.scale import ScaleLike

__all__ = ["Schedule", "chained", "constant", "cosine", "linear", "piecewise"]

Schedule: TypeAlias = Callable[[int], "float | ScaleLike"]
"""A function from the number of steps taken to a strength or a scale."""


def constant(strength: float = 1.0) -> Schedule:
    """Return a schedule that has the same strength at every step.

    Args:
        strength: The strength at every step, 1 by default.

    Returns:
        The schedule.

    Example:
        >>> constant(0.5)(1000)
        0.5
    """
    return lambda step: strength


def linear(steps: int, start: float = 0.0, end: float = 1.0) -> Schedule:
    """Return a schedule that goes from one strength to another linearly: by default a warm-up.

    Args:
        steps: Number of optimizer steps, at least 1. After them the strength stays at ``end``.
        start: Strength at step 0, by default 0.
        end: Strength at ``steps``, by default 1.

    Returns:
        The schedule.

    Raises:
        ValueError: ``steps`` is not a whole number of at least 1.

    Example:
        >>> [linear(4)(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    _check_steps(steps)
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cosine(steps: int, start: float = 1.0, end: float = 0.0) -> Schedule:
    """Return a schedule that follows half a cosine between two strengths: by default a decay.

    Args:
        steps: Number of optimizer steps, at least 1. After them the strength stays at ``end``.
        start: Strength at step 0, by default 1.
        end: Strength at ``steps``, by default 0.

    Returns:
        The schedule.

    Raises:
        ValueError: ``steps`` is not a whole number of at least 1.

    Example:
        >>> [round(cosine(4)(step), 3) for step in (0, 1, 2, 4, 9)]
        [1.0, 0.854, 0.5, 0.0, 0.0]
    """
    _check_steps(steps)
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def piecewise(values: Mapping[int, float | ScaleLike]) -> Schedule:
    """Return a schedule that changes to a given strength or scale at each given step.

    Args:
        values: Strengths or scales by the step at which they begin. One of the steps must be 0.

    Returns:
        The schedule.

    Raises:
        ValueError: No value at step 0, or a step that is negative.

    Example:
        >>> schedule = piecewise({0: 0.0, 100: (2.0, 1.0)})
        >>> schedule(99), schedule(100)
        (0.0, (2.0, 1.0))
    """
    steps = sorted(values)
    if not steps or steps[0] != 0:
        raise ValueError(f"piecewise needs a value for step 0 and none before, got {steps}")
    return lambda step: values[max(other for other in steps if other <= step)]


def chained(*parts: tuple[Schedule, int] | Schedule) -> Schedule:
    """Return a schedule that runs others one after another. Each counts its own steps from 0.

    Args:
        *parts: Pairs of a schedule and its number of steps, then one schedule without a number,
            which runs to the end.

    Returns:
        The schedule.

    Raises:
        TypeError: A part before the last has no number of steps, or the last has one.
        ValueError: A number of steps is less than 1.

    Example:
        >>> schedule = chained((linear(10), 10), (constant(), 80), cosine(10))
        >>> [round(schedule(step), 2) for step in (0, 5, 50, 95, 200)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if not parts or not callable(parts[-1]) or any(callable(part) for part in parts[:-1]):
        raise TypeError("chained takes (schedule, steps) pairs and then one schedule that goes on")
    *pairs, last = parts
    begins, begin = [], 0
    for schedule, steps in pairs:  # type: ignore[misc]
        _check_steps(steps)
        begins.append((begin, schedule))
        begin += steps
    begins.append((begin, last))

    def schedule_of(step: int) -> Any:
        first, schedule = [pair for pair in begins if pair[0] <= step][-1]
        return schedule(step - first)

    return schedule_of


def _check_steps(steps: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"a number of steps must be a whole number of at least 1, got {steps!r}")
