"""What the callback of any framework does during one run of training."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from spanopt.hooks import SpanHooks
from spanopt.installing import install
from spanopt.plan import Request
from spanopt.scheduler import SpanScheduler
from spanopt.schedules import Schedule

__all__ = ["MakeSchedule", "Run"]

MakeSchedule: TypeAlias = "Callable[[int], Schedule | Mapping[str, Schedule | None]]"
"""A function of the number of optimizer steps in a run, which returns schedules of scales."""


class Run:
    """Hooks on a model, and a scheduler of their scales, from the beginning of a run to its end.

    Args:
        request: What to scale, and how.
        schedule: A function of the number of optimizer steps in the run. It returns a schedule, or
            schedules by layer, for a :class:`~spanopt.SpanScheduler`. ``None`` leaves the scales as
            they are.
        example_inputs: Inputs for one forward pass that checks the layers when the run begins.
        parameters: The parameters that will be trained; ``None`` if that is not known.

    Attributes:
        request: What to scale, and how.
        hooks: The :class:`~spanopt.SpanHooks` during a run, else ``None``.
        scheduler: The :class:`~spanopt.SpanScheduler` during a run with a schedule, else ``None``.

    Example:
        >>> run = Run(Request({"*": (2.0, 1.0)}))
        >>> run.begin(nn.TransformerEncoderLayer(8, nhead=2), steps=100)
        >>> len(run.hooks.groups)
        1
        >>> run.end()
    """

    def __init__(
        self,
        request: Request,
        schedule: MakeSchedule | None = None,
        *,
        example_inputs: Any = None,
        parameters: Iterable[Tensor] | None = None,
    ) -> None:
        if schedule is not None and not callable(schedule):
            raise TypeError(
                "schedule must be a function of the number of optimizer steps, such as "
                f"lambda steps: spanopt.linear(steps // 10), got {schedule!r}"
            )
        self.request = request
        self.schedule = schedule
        self.hooks: SpanHooks | None = None
        self.scheduler: SpanScheduler | None = None
        self._example_inputs = example_inputs
        self._parameters = None if parameters is None else list(parameters)
        self._remove: Callable[[], Any] = lambda: None

    def begin(self, model: nn.Module, steps: int, state: Mapping[str, Any] | None = None) -> None:
        """Install the hooks, after ending an earlier run that an exception left open.

        Args:
            model: The model to train.
            steps: The number of optimizer steps in the run.
            state: What :meth:`state` returned, to continue from there.

        Raises:
            TypeError: An argument of the wrong type, or a schedule that is not a function.
            ValueError: No attention layer, a key that matches no layer, a layer that is scaled
                already, a ``state`` of other layers, or one of a run with a schedule if this run
                has none. Nothing is installed then.

        Example:
            >>> run = Run(Request({"*": (2.0, 1.0)}))
            >>> run.begin(nn.TransformerEncoderLayer(8, nhead=2), steps=100)
        """
        self.end()
        state = state or {}
        if state.get("scheduler") is not None and self.schedule is None:
            raise ValueError(
                "the checkpoint is of a run whose scales followed a schedule, and schedules are "
                "code that is not saved: pass schedule= again"
            )
        self.hooks = install(
            model,
            self.request,
            example_inputs=self._example_inputs,
            parameters=self._parameters,
        )
        # The hooks go when the callback is dropped.
        self._remove = weakref.finalize(self, self.hooks.remove)
        try:
            if "span_groups" in state:
                self.hooks.load_state_dict(state)
            if self.schedule is not None:
                self.scheduler = SpanScheduler(self.hooks, self.schedule(steps))
                if state.get("scheduler") is not None:
                    self.scheduler.load_state_dict(state["scheduler"])
        except BaseException:
            self.end()
            raise

    def check(self) -> None:
        """Raise an error or warn if a layer was not scaled. Call it before an optimizer step.

        Raises:
            UnscaledLayerError: A layer was not scaled, and ``on_missing`` is ``"error"``.

        Example:
            >>> Run(Request()).check()  # outside of a run there is nothing to complain of
        """
        if self.hooks is not None:
            self.hooks.check()

    def stepped(self, skipped: bool = False) -> None:
        """Set the scales for the next step. Call it after an optimizer step.

        Args:
            skipped: Whether nothing was updated, for example after an overflow. The schedule then
                does not step.

        Example:
            >>> Run(Request()).stepped()
        """
        if self.hooks is not None:
            self.hooks.forget()
        if self.scheduler is not None and not skipped:
            self.scheduler.step()

    def state(self) -> dict[str, Any] | None:
        """Return scales and scheduler for a checkpoint, or ``None`` outside of a run.

        Returns:
            Numbers, strings, lists, dicts and ``None`` only.

        Example:
            >>> Run(Request()).state() is None
            True
        """
        if self.hooks is None:
            return None
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {**self.hooks.state_dict(), "scheduler": scheduler}

    def end(self) -> None:
        """Take the hooks off the model. Calling it twice is harmless.

        Example:
            >>> Run(Request()).end()
        """
        self._remove()
        self.hooks = self.scheduler = None
