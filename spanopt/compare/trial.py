"""A trial, which is one call of the user's function."""

from __future__ import annotations

import inspect
import math
import numbers
import random
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from spanopt.compare.arms import Arm
from spanopt.compare.wrapping import Wrap

__all__ = ["Task", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One call of the user's function, described by all that decides its outcome.

    Attributes:
        arm: The name of the arm.
        seed: The seed.
        value: The value of the tuned argument; ``None`` if none is tuned.
        steps: The number of steps that the function is asked to take; ``None`` if it is not told.
        again: The number of the repetition: 0 for the first call, 1 for the next.
    """

    arm: str
    seed: int
    value: float | None = None
    steps: int | None = None
    again: int = 0

    def record(self) -> dict[str, Any]:
        """Return the keyword arguments from which :class:`Trial` makes an equal trial."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """The function and the settings that all trials of a comparison share.

    Attributes:
        train: The user's function.
        arms: The arms by name.
        tuned: The name of the tuned argument; ``None`` if there is none.
        metric: The name of the number that is compared; by default the first one returned.
        steps: Whether the function is told the number of steps.
    """

    train: Callable[..., Any]
    arms: Mapping[str, Arm] = field(default_factory=dict)
    tuned: str | None = None
    metric: str | None = None
    steps: bool = False

    def check(self) -> None:
        """Check that the function takes the arguments that it will be given.

        Raises:
            TypeError: Its signature does not take them.
        """
        for name, arm in self.arms.items():
            arguments: dict[str, Any] = {"seed": 0, "wrap": None}
            if self.tuned is not None:
                arguments[self.tuned] = 1.0
            if self.steps:
                arguments["steps"] = 1
            try:
                inspect.signature(self.train).bind(**arguments | dict(arm.params))
            except TypeError as error:
                given = ", ".join(arguments | dict(arm.params))
                raise TypeError(
                    f"train() is called with the arguments {given} in the arm {name!r}: {error}"
                ) from None
            except ValueError:  # it is a builtin with no known signature
                return

    def run(self, trial: Trial) -> dict[str, Any]:
        """Call the user's function.

        Args:
            trial: The trial, which says with which arguments.

        Returns:
            A dict. ``metrics`` are numbers, or ``None`` where one is not finite. If the function
            raises an exception, ``error`` and ``traceback`` replace them. ``seconds`` is the time.
            ``steps`` and ``step_ms`` are there if the optimizer tells its steps. ``held``, for an
            arm that holds weights, is how many stayed fixed.
        """
        arm = self.arms[trial.arm]
        wrap = Wrap(arm)
        arguments: dict[str, Any] = {"seed": trial.seed, "wrap": wrap}
        if self.tuned is not None and trial.value is not None:
            arguments[self.tuned] = trial.value
        if trial.steps is not None:
            arguments["steps"] = trial.steps
        seed_everything(trial.seed)
        start = time.perf_counter()
        result: dict[str, Any]
        try:
            result = {"metrics": self._metrics(self.train(**arguments | dict(arm.params)), wrap)}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
            result["traceback"] = traceback.format_exc(limit=-8)
        finally:
            wrap.close()
        result["seconds"] = round(time.perf_counter() - start, 3)
        if wrap.steps:
            result |= {"steps": wrap.steps, "step_ms": wrap.step_ms}
        if arm.held:
            result["held"] = wrap.held
        return result

    def _metrics(self, returned: Any, wrap: Wrap) -> dict[str, float | None]:
        if not wrap.calls:
            raise RuntimeError(
                "train() did not call wrap(optimizer, model), so no arm differs from plain training"
            )
        if wrap.arm.held and not wrap.held:
            raise RuntimeError("no weights of Q and K were held still: every weight has a gradient")
        named = returned if isinstance(returned, Mapping) else {"loss": returned}
        metrics = {str(name): _number(name, value) for name, value in named.items()}
        name = self.metric or next(iter(metrics), None)
        if name not in metrics:
            have = ", ".join(metrics) or "nothing"
            raise ValueError(f"train() returned {have}, without the metric {name!r}")
        value = metrics[name]
        if value is not None and value <= 0:
            raise ValueError(
                f"the metric {name!r} is {value:g}; changes are in per cent, so it must be above 0"
            )
        return metrics


def _number(name: Any, value: Any) -> float | None:
    """Return a finite number as a float, and ``None`` for one that is not finite."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"train() returns a number or a dict of numbers; {name!r} is {value!r}")
    return float(value) if math.isfinite(value) else None


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers, in case the user's function does not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
