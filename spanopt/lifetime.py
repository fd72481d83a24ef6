"""The lifetime of a monitor: a hook that does not keep it alive, and functions that stop it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["end", "stop", "teller"]


def teller(monitor: weakref.ref[Any]) -> Callable[..., None]:
    """Return a step post-hook that tells a monitor of steps but does not keep it alive.

    Args:
        monitor: A weak reference to the monitor, whose ``_after_step`` the hook calls.
    """

    def after_step(optimizer: Any, *_: Any) -> None:
        told = monitor()
        if told is not None:
            told._after_step(optimizer)

    return after_step


def stop(handle: Any, stops: list[Callable[[], None]]) -> None:
    """Remove a monitor's hooks.

    Args:
        handle: The handle of the step post-hook.
        stops: Functions that stop the watchers of the layers. They are called and removed.
    """
    handle.remove()
    while stops:
        stops.pop()()


def end(handle: Any, stops: list[Callable[[], None]], rows: list[dict[str, Any]]) -> None:
    """Stop a monitor that was dropped, and warn if it measured nothing.

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
