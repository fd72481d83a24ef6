"""How long a monitor measures: a hook that does not keep it alive, and what stops it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["end", "stop", "teller"]


def teller(monitor: weakref.ref[Any]) -> Callable[..., None]:
    """Return a hook for after steps that does not keep the monitor that it tells.

    Args:
        monitor: A reference to the monitor. Its ``_after_step`` is called with the optimizer.
    """

    def after_step(optimizer: Any, *_: Any) -> None:
        told = monitor()
        if told is not None:
            told._after_step(optimizer)

    return after_step


def stop(handle: Any, stops: list[Callable[[], None]]) -> None:
    """Take a monitor's hooks off.

    Args:
        handle: Of the hook for after steps.
        stops: Functions that stop what watches the layers. They are called and removed.
    """
    handle.remove()
    while stops:
        stops.pop()()


def end(handle: Any, stops: list[Callable[[], None]], rows: list[dict[str, Any]]) -> None:
    """Stop a monitor that nobody keeps, and warn if it measured nothing.

    Args:
        handle: See :func:`stop`.
        stops: See :func:`stop`.
        rows: What the monitor has measured.
    """
    stop(handle, stops)
    if not rows:
        warnings.warn(
            "a SpanMonitor was dropped before it measured anything: keep it in a variable while "
            "training, and close() it then",
            stacklevel=2,
        )
