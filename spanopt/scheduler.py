"""Schedules of the scales, in the manner of ``torch.optim.lr_scheduler``.

A schedule is a function of the step. It gives the *strength* with which the scales act: 1 is what
the user asked for, 0 is the identity (1, 1), and anything between or beyond is linear in both
factors. Or it gives a scale itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from spanopt.hooks import SpanHooks
from spanopt.scale import Factor, ScaleLike, SpanGroup, SpanScale, matching, scales_of

__all__ = ["Schedule", "SpanScheduler", "chained", "constant", "cosine", "linear", "piecewise"]

Schedule: TypeAlias = Callable[[int], "float | ScaleLike"]
"""From the number of steps taken to a strength or a scale."""


class SpanScheduler:
    """Move the scales of a wrapped optimizer from step to step.

    Scales are set at once for step 0, and by each :meth:`step` for the next. The layers, and the
    scales that a strength refers to, are those at the time this is made: a layer that comes to the
    model later needs a scheduler of its own.

    Args:
        optimizer: A :class:`~spanopt.SpanScaledOptimizer`, or the :class:`~spanopt.SpanHooks` of
            :func:`~spanopt.attach`.
        schedule: One for all layers, or schedules by layer name or pattern, with the rules of the
            scales dict: an exact name goes before patterns, a later pattern before an earlier one,
            and what no key matches, or ``None``, is left alone.

    Raises:
        TypeError: A schedule that is not callable.
        ValueError: A key that matches no scaled layer, or a schedule that gives what is no scale.
            The scales are then as they were.

    Example:
        >>> import torch
        >>> from spanopt import SpanScaledOptimizer
        >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
        >>> bare = torch.optim.SGD(model.parameters())
        >>> optimizer = SpanScaledOptimizer(bare, model, {"*": (3, 1)})
        >>> scheduler = SpanScheduler(optimizer, linear(4))  # warm-up from the identity
        >>> for _ in range(3):
        ...     optimizer.step()
        ...     scheduler.step()
        ...     scheduler.get_last_scale()[""].parallel
        1.5
        2.0
        2.5
    """

    def __init__(self, optimizer: Any, schedule: Schedule | Mapping[str, Schedule | None]) -> None:
        self._hooks: SpanHooks = getattr(optimizer, "hooks", optimizer)
        if not isinstance(self._hooks, SpanHooks):
            raise TypeError(
                "a SpanScheduler takes a SpanScaledOptimizer or what spanopt.attach() returns, got "
                f"{type(optimizer).__name__}"
            )
        base = {group["name"]: group.scale for group in self._hooks.groups}
        self._schedules = _by_name(schedule, list(base))
        self._base = {name: base[name] for name in self._schedules}
        self._step = 0
        scales = self._scales_at(0)
        self._hooks.set_scales(scales)
        self._hooks.hold(self._schedules)

    def step(self) -> None:
        """Set the scales for the next step; to be called after the optimizer's.

        Raises:
            ValueError: A schedule gave what is no scale. The scales are then as they were.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.MultiheadAttention(8, 2), {"*": (2.0, 1.0)})
            >>> scheduler = SpanScheduler(hooks, linear(10))
            >>> scheduler.step()
        """
        scales = self._scales_at(self._step + 1)
        self._hooks.set_scales(scales)
        self._step += 1

    def get_last_scale(self) -> dict[str, SpanScale]:
        """Return the scales set last, by layer name.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.MultiheadAttention(8, 2), {"*": (3.0, 1.0)})
            >>> SpanScheduler(hooks, constant(0.5)).get_last_scale()[""].parallel
            2.0
        """
        return {
            group["name"]: group.scale
            for group in self._hooks.groups
            if group["name"] in self._schedules
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the step, and the scales that strengths refer to.

        Schedules themselves are code and are not saved.

        Returns:
            Numbers, strings, lists, dicts and ``None`` only.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.MultiheadAttention(8, 2), {"*": (2.0, 1.0)})
            >>> SpanScheduler(hooks, constant()).state_dict()["step"]
            0
        """
        base = [SpanGroup(name, scale).plain() for name, scale in self._base.items()]
        return {"step": self._step, "base_scales": base}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another scheduler was, and set its scales.

        Args:
            state_dict: From :meth:`state_dict`.

        Raises:
            ValueError: It names other layers, or is no state dict of a scheduler. Nothing has
                changed then.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.MultiheadAttention(8, 2), {"*": (2.0, 1.0)})
            >>> scheduler = SpanScheduler(hooks, linear(10))
            >>> scheduler.load_state_dict(scheduler.state_dict())
        """
        step, base = state_dict.get("step"), scales_of(state_dict.get("base_scales"))
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"the state dict of a SpanScheduler has a 'step' >= 0, got {step!r}")
        if set(base) != set(self._base):
            raise ValueError(
                "the state dict is of a SpanScheduler of other layers: only in the state dict: "
                f"{sorted(set(base) - set(self._base))}; only here: "
                f"{sorted(set(self._base) - set(base))}"
            )
        before, self._base = self._base, base
        try:
            self._hooks.set_scales(self._scales_at(step))
        except BaseException:
            self._base = before
            raise
        self._step = step

    def _scales_at(self, step: int) -> dict[str, SpanScale]:
        scales = {}
        for name, schedule in self._schedules.items():
            value = schedule(step)
            try:
                scales[name] = _scale(self._base[name], value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"the schedule of layer {name!r} at step {step}: {error}"
                ) from error
        return scales


def constant(strength: float = 1.0) -> Schedule:
    """Return a schedule that stays as it is.

    Example:
        >>> constant(0.5)(1000)
        0.5
    """
    return lambda step: strength


def linear(steps: int, start: float = 0.0, end: float = 1.0) -> Schedule:
    """Return a schedule from one strength to another in equal steps: a warm-up by default.

    Args:
        steps: How many; it stays at ``end`` from there on.
        start: Strength at step 0.
        end: Strength at ``steps``.

    Example:
        >>> [linear(4)(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    _check_steps(steps)
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cosine(steps: int, start: float = 1.0, end: float = 0.0) -> Schedule:
    """Return a schedule from one strength to another along half a cosine: a decay by default.

    Args:
        steps: How many; it stays at ``end`` from there on.
        start: Strength at step 0.
        end: Strength at ``steps``.

    Example:
        >>> [round(cosine(4)(step), 3) for step in (0, 1, 2, 4, 9)]
        [1.0, 0.854, 0.5, 0.0, 0.0]
    """
    _check_steps(steps)
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def piecewise(values: Mapping[int, float | ScaleLike]) -> Schedule:
    """Return a schedule that takes given strengths or scales from given steps on.

    Args:
        values: By the step from which on they hold; 0 must be among them.

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
    """Return schedules one after another, each with steps counted from its beginning.

    Args:
        *parts: ``(schedule, steps)`` pairs, and a last schedule that goes on.

    Raises:
        TypeError: A part other than the last without its number of steps.
        ValueError: Fewer than one step.

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


def _by_name(
    schedule: Schedule | Mapping[str, Schedule | None], names: list[str]
) -> dict[str, Schedule]:
    schedules = schedule if isinstance(schedule, Mapping) else {"*": schedule}
    for key, value in schedules.items():
        if value is not None and not callable(value):
            raise TypeError(
                f"the schedule of {key!r} must be a function of the step, got {value!r}"
            )
    chosen = matching(schedules, names, "schedule")
    return {name: value for name, value in chosen.items() if value is not None}


def _scale(base: SpanScale, value: Any) -> SpanScale:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return SpanScale.of(value)
    strength = float(value)
    sides = {
        side: tuple(_toward(factor, strength) for factor in base.side(side))
        for side in ("query", "key")
    }
    (parallel, violation), _ = sides.values()
    if sides["query"] == sides["key"]:
        return SpanScale(parallel, violation)
    return SpanScale(parallel, violation, query=sides["query"], key=sides["key"])


def _toward(factor: Factor, strength: float) -> Any:
    """Return what lies between 1 and a factor."""
    if isinstance(factor, tuple):
        return tuple(_toward(one, strength) for one in factor)
    return 1.0 + strength * (factor - 1.0)
