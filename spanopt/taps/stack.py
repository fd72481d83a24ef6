"""Taps on a thread's stack of function modes: finding them, and taking stale ones off."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from spanopt.compiling import before_compilations, constant_when_traced
from spanopt.taps.calls import live_taps, taps_by_name
from spanopt.taps.running import calls_forward_directly, calls_of, traced_place_in

__all__ = [
    "INSIDE",
    "INSIDE_PERHAPS",
    "OUTSIDE",
    "OUTSIDE_PERHAPS",
    "is_traced_directly",
    "remove_stale",
    "take_out",
    "traced_place",
]


def remove_stale(entering: Any = None) -> None:
    """Take taps off this thread's stack if their layer is no longer running.

    Module hooks are not called when a KeyboardInterrupt ends a forward pass, for example in a
    notebook. The tap then stays on the stack. Until it is taken off, it passes calls through.

    Args:
        entering: A tap whose layer is being called, and which is not yet on the stack for that.
    """
    if torch.compiler.is_dynamo_compiling():
        return
    before_compilations(_before_compilation)
    stack = _get_current_function_mode_stack()
    taps: set[Any] = {mode for mode in stack if mode in live_taps}
    for tap in taps:
        running = 0 if tap.removed else calls_of(tap.site.module) - (tap is entering)
        for _ in range(stack.count(tap) - max(running, 0)):
            tap.forget_call()
            take_out(tap)


def _before_compilation(*args: Any) -> None:
    """Take off stale taps, since they would be traced."""
    remove_stale()


@constant_when_traced
def traced_place(unique_name: str) -> int:
    """Return where the code that is being traced runs: one of the four numbers below.

    This is for :meth:`LayerMode.place`. ``torch.compile`` calls it while it traces that method.
    """
    before_compilations(_before_compilation)
    tap = taps_by_name.get(unique_name)
    if tap is None:
        return OUTSIDE
    inside, whole, known = traced_place_in(tap.site.module)
    if not whole and not known:
        return INSIDE_PERHAPS if inside else OUTSIDE_PERHAPS
    return INSIDE if inside else OUTSIDE


@constant_when_traced
def is_traced_directly(unique_name: str) -> bool:
    """Return whether a layer's forward is being traced without a call of the layer.

    This is for :meth:`Account.note_projected`. ``torch.compile`` calls it while it traces that.
    """
    tap = taps_by_name.get(unique_name)
    return tap is not None and calls_forward_directly(tap.site.module, traced=True)


OUTSIDE, INSIDE, OUTSIDE_PERHAPS, INSIDE_PERHAPS = range(4)


def take_out(tap: Any) -> None:
    """Take a tap off this thread's stack, wherever it lies there."""
    above = []
    while tap in _get_current_function_mode_stack():
        mode = _pop_mode()
        if mode is tap:
            break
        above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)
