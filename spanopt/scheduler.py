"""A scheduler that moves the scales from step to step, like ``torch.optim.lr_scheduler``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spanopt import schedules
from spanopt.groups import SpanGroup, scales_of
from spanopt.hooks import SpanHooks
from spanopt.patterns import matching
from spanopt.scale import Factor, SpanScale
from spanopt.schedules import Schedule

__all__ = ["SpanScheduler"]


class SpanScheduler:
    """Move the scales of a wrapped optimizer from step to step.

    Making the scheduler sets the scales for step 0. Each :meth:`step` sets them for the next step.
    The scheduler takes the layers and their present scales, to which a strength refers, when it is
    made. A layer that comes to the model later needs a scheduler of its own.

    Args:
        optimizer: A :class:`~spanopt.SpanScaledOptimizer`, or the :class:`~spanopt.SpanHooks` of
            :func:`~spanopt.attach`.
        schedule: A function of the number of steps taken, such as :func:`spanopt.linear` returns,
            or a dict of such functions by layer name or pattern. An exact name beats a pattern, and
            a later pattern beats an earlier one. A layer is left alone if no key matches it or its
            value is ``None``. A function returns a scale or a strength. A strength is a number: 0
            stands for (1, 1), and 1 for the scale that the layer has now. Both factors are linear
            in it, also outside [0, 1].

    Raises:
        TypeError: A schedule that is not callable, such as the name of one.
        ValueError: A key matches no scaled layer, or a schedule returns something that is neither
            a strength nor a scale. The scales are then as they were.

    Example:
        >>> import torch
        >>> from spanopt import SpanScaledOptimizer, linear
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
        """Set the scales for the next step. Call it after the optimizer's ``step``.

        Raises:
            ValueError: A schedule returned something that is neither a strength nor a scale. The
                scales are then as they were.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach, constant, linear
            >>> hooks = attach(nn.MultiheadAttention(8, 2), {"*": (2.0, 1.0)})
            >>> scheduler = SpanScheduler(hooks, linear(10))
            >>> scheduler.step()
        """
        scales = self._scales_at(self._step + 1)
        self._hooks.set_scales(scales)
        self._step += 1

    def get_last_scale(self) -> dict[str, SpanScale]:
        """Return the scales that were set last, by layer name.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach, constant, linear
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
        """Return the step number, and the scales to which strengths refer.

        The schedules are not saved, since they are code.

        Returns:
            Numbers, strings, lists, dicts and ``None`` only.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach, constant, linear
            >>> hooks = attach(nn.MultiheadAttention(8, 2), {"*": (2.0, 1.0)})
            >>> SpanScheduler(hooks, constant()).state_dict()["step"]
            0
        """
        base = [SpanGroup(name, scale).plain() for name, scale in self._base.items()]
        return {"step": self._step, "base_scales": base}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the step of a saved scheduler, and set its scales.

        Args:
            state_dict: From :meth:`state_dict`.

        Raises:
            ValueError: It names other layers, or it is not the state dict of a scheduler. Nothing
                has changed then.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach, constant, linear
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


def _advice() -> str:
    names = ", ".join(f"spanopt.{name}" for name in schedules.__all__ if name != "Schedule")
    return f"; {names} return such functions, as linear(100) does for 100 steps"


def _by_name(
    schedule: Schedule | Mapping[str, Schedule | None], names: list[str]
) -> dict[str, Schedule]:
    schedules = schedule if isinstance(schedule, Mapping) else {"*": schedule}
    for key, value in schedules.items():
        if value is not None and not callable(value):
            raise TypeError(
                f"the schedule of {key!r} must be a function of the step, got {value!r}{_advice()}"
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
    """Return the number that is ``strength`` of the way from 1 to a factor."""
    if isinstance(factor, tuple):
        return tuple(_toward(one, strength) for one in factor)
    return 1.0 + strength * (factor - 1.0)
