"""The object that the user's function calls to put an arm's scales on its optimizer."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from spanopt.compare.arms import Arm
from spanopt.optimizer import SpanScaledOptimizer

__all__ = ["Held", "Wrap"]


class Wrap:
    """Puts an arm's scales on an optimizer: ``optimizer = wrap(optimizer, model)``.

    In plain training it returns the optimizer as it is. Wrap the optimizer that has the parameters
    of the attention layers. Wrap it once, and before you put any hook or scheduler on it.

    Args:
        arm: The arm.
    """

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.calls: int = 0
        self._times: list[float] = []
        self._wrapped: list[SpanScaledOptimizer] = []
        self._held: list[Held] = []

    def __call__(self, optimizer: Any, model: nn.Module) -> Any:
        """Return the optimizer with the arm's scales on it.

        Args:
            optimizer: The optimizer of the attention layers' parameters.
            model: The model.
        """
        self.calls += 1
        if self.calls == 1 and hasattr(optimizer, "register_step_post_hook"):
            optimizer.register_step_post_hook(self._note_time)
        if self.arm.scales is None:
            return optimizer
        wrapped = SpanScaledOptimizer(optimizer, model, self.arm.layers, **self.arm.options)
        self._wrapped.append(wrapped)
        if self.arm.held:
            self._held.append(Held(wrapped, model))
        return wrapped

    def _note_time(self, *_: Any) -> None:
        self._times.append(time.perf_counter())

    @property
    def steps(self) -> int:
        """The number of steps that the optimizer has taken."""
        return len(self._times)

    @property
    def step_ms(self) -> float | None:
        """The median time from one step to the next in ms; ``None`` with fewer than two steps."""
        between = [1e3 * (b - a) for a, b in zip(self._times, self._times[1:], strict=False)]
        return round(statistics.median(between), 3) if between else None

    @property
    def held(self) -> int:
        """The number of weights that stayed fixed in every step."""
        return sum(held.count() for held in self._held)

    def close(self) -> None:
        """Take the hooks off the model."""
        for wrapped in self._wrapped:
            wrapped.hooks.remove()


class Held:
    """Keeps weights fixed whose gradient comes only through Q and K, and is scaled by 0.

    With factors of 0, those weights have a gradient of exactly 0 in every step, but weight decay
    would still move them. So after each step, every weight whose gradient has been 0 in all steps
    so far is set back to its value before the step. This takes a copy of the parameters.

    Args:
        optimizer: The wrapped optimizer, with factors of 0.
        model: The model.
    """

    def __init__(self, optimizer: SpanScaledOptimizer, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._moved: list[Tensor | None] = [None] * len(self._parameters)
        self._before: list[Tensor] = []
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._put_back)

    @torch.no_grad()
    def _keep(self, *_: Any) -> None:
        self._before = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        for index, (p, before) in enumerate(zip(self._parameters, self._before, strict=True)):
            if p.grad is None:
                continue
            moves, earlier = p.grad != 0, self._moved[index]
            self._moved[index] = moves if earlier is None else earlier | moves
            p.copy_(torch.where(self._moved[index], p, before))  # type: ignore[arg-type]
        self._before = []

    def count(self) -> int:
        """Return how many weights have not moved in any step."""
        return sum(int((~moved).sum()) for moved in self._moved if moved is not None)
