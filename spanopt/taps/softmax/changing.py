"""Scores that are changed in place, also through another tensor that shares their memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spanopt.taps.softmax.scores import lose, noted_scores, scores_of
from spanopt.taps.tap import Handler, Tap

__all__ = ["IN_PLACE", "IN_PLACE_IF_ASKED", "changing", "changing_if_asked", "forget"]

_UNCHANGING = ("requires_grad_", "share_memory_", "rename_")
_OPERATORS = ("add", "sub", "mul", "truediv", "div", "pow", "floordiv", "mod", "and", "or", "xor")
_NAMES = (
    *(name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")),
    *(f"__i{name}__" for name in _OPERATORS),
    "__setitem__",
)
IN_PLACE = tuple(name for name in _NAMES if name not in _UNCHANGING)
"""Names of the functions that change their first argument."""
IN_PLACE_IF_ASKED = {
    **dict.fromkeys(("relu", "relu6", "selu", "silu", "mish", "hardswish", "hardsigmoid"), 1),
    **dict.fromkeys(("leaky_relu", "elu", "celu"), 2),
    **dict.fromkeys(("hardtanh", "threshold", "dropout", "dropout1d", "dropout2d", "dropout3d"), 3),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), 3),
    "rrelu": 4,
}
"""Functions that change their first argument if ``inplace`` is true, and its position."""


def forget(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Stop following scores that a function changes in place in some other way."""
    known = bool(args) and scores_of(tap, args[0]) is not None
    result = func(*args, **kwargs)
    if known:
        lose(tap, args[0], func.__name__)
    return result


def changing(handler: Handler) -> Handler:
    """Return a handler that also stops following what shares the memory of the changed tensor."""

    def handle(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
        result = handler(tap, func, *args, **kwargs)
        if args and isinstance(args[0], Tensor):
            _lose_others(tap, args[0], func.__name__)
        return result

    return handle


def changing_if_asked(handler: Handler | None, position: int) -> Handler:
    """Return the handler of a function that takes ``inplace``.

    Args:
        handler: What follows the function where it changes nothing; ``None`` if nothing does.
        position: The position of ``inplace`` among its arguments.
    """
    in_place = changing(forget if handler is None else handler)

    def handle(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
        asked = args[position] if len(args) > position else kwargs.get("inplace", False)
        if asked:
            return in_place(tap, func, *args, **kwargs)
        return func(*args, **kwargs) if handler is None else handler(tap, func, *args, **kwargs)

    return handle


def _lose_others(tap: Tap, x: Tensor, name: str) -> None:
    """Stop following the other tensors in which a change of x in place may show.

    In eager code the versions of tensors show it, but not where x is the ``data`` of another one.
    Compiled code has no versions. There, all that comes from the same products is let go.
    """
    own = scores_of(tap, x)
    if torch.compiler.is_compiling():
        if own is None and not tap.streams().is_of_scores(x):
            return
        for other, scores in noted_scores(tap):
            if other is not x and (own is None or _share(own.products, scores.products)):
                lose(tap, other, name)
    elif own is None and x.grad_fn is None and tap.streams().is_of_scores(x):
        place = x.untyped_storage().data_ptr()
        for other, _ in noted_scores(tap):
            if other.untyped_storage().data_ptr() == place:
                lose(tap, other, "a change of its data")


def _share(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return any(one is other for one in some for other in others)
