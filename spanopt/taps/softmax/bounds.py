"""What an elementwise function does to a mask that scores already have on them.

A mask closes a token by a very low score. A function may raise this score again, or may turn a very
high score into a very low one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spanopt.taps.masks import allowed, is_open
from spanopt.taps.softmax.scores import Scores

__all__ = ["FACTORS", "doubt_of", "factor_of", "is_negated", "upper_bound"]

# fmt: off
_RAISING = frozenset((
    "tanh", "tanh_", "abs", "abs_", "absolute", "absolute_", "__abs__", "relu", "relu_", "relu6",
    "leaky_relu", "leaky_relu_", "elu", "elu_", "gelu", "silu", "softplus", "sqrt", "sqrt_",
    "square", "square_", "pow", "pow_", "__pow__", "__ipow__", "log1p", "log1p_",
))
_NEGATIVE = frozenset(("neg", "neg_", "negative", "negative_", "__neg__", "__rsub__"))
_DIVISIONS = frozenset((
    "div", "div_", "divide", "divide_", "true_divide", "true_divide_", "__truediv__",
    "__itruediv__", "__idiv__",
))
FACTORS = _DIVISIONS | {
    "mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__",
}
"""Names of the functions that multiply scores by something, or divide them."""
_DIFFERENCES = frozenset(("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"))
_CLAMPS = frozenset(("clamp", "clamp_", "clip", "clip_"))
# fmt: on


def is_negated(name: str, args: Any, kwargs: Any, known: list[Scores | None]) -> bool:
    """Return whether a function turns the sign of scores with a mask or a bias on them.

    Args:
        name: Name of the function.
        args: Its arguments by position.
        kwargs: Its arguments by name.
        known: What is known of each argument by position, where it is scores.
    """
    masked = [scores is not None and scores.masked for scores in known]
    if not any(masked):
        return False
    if name in _NEGATIVE:
        return True
    if name in FACTORS:
        return any(isinstance(x, (int, float)) and x < 0 for x in args)
    alpha = kwargs.get("alpha", 1)
    if name in _DIFFERENCES:
        alpha = -alpha
    return len(masked) > 1 and masked[1] and name not in _CLAMPS and alpha < 0


def doubt_of(name: str, args: Any, kwargs: Any, known: list[Scores | None]) -> Tensor | bool:
    """Return whether a function of scores may open what a mask on them closes.

    Args:
        name: Name of the function.
        args: Its arguments by position.
        kwargs: Its arguments by name.
        known: What is known of each argument by position, where it is scores.

    Returns:
        A boolean, as a tensor where the values of tensors tell.
    """
    if name in _RAISING:
        return True
    others = [x for x, scores in zip(args, known, strict=True) if scores is None]
    if name in FACTORS:
        of_numbers = [x for x in others if not isinstance(x, Tensor)]
        of_tensors = [(x.detach() <= 0).any() for x in others if isinstance(x, Tensor)]
        return of_tensors[0] if of_tensors else any(x <= 0 for x in of_numbers)
    if name in ("max", "maximum"):
        bound = others[0] if others else None
    elif name in ("clamp_min", "clamp_min_") or name in _CLAMPS:
        bound = args[1] if len(args) > 1 else kwargs.get("min")
    elif name in ("nan_to_num", "nan_to_num_"):
        bound = args[3] if len(args) > 3 else kwargs.get("neginf")
    else:
        bound = None
    if isinstance(bound, Tensor):
        return allowed(bound).any()
    return bound is not None and is_open(bound)


def factor_of(name: str, args: Any, known: list[Scores | None]) -> Tensor | float | None:
    """Return what a product or quotient multiplies scores by; ``None`` where that is not known.

    Args:
        name: Name of the function, one of :data:`FACTORS`.
        args: Its arguments by position.
        known: What is known of each argument by position, where it is scores.
    """
    others = [x for x, scores in zip(args, known, strict=True) if scores is None]
    if len(args) != 2 or len(others) != 1 or isinstance(others[0], complex):
        return None
    factor: Tensor | float = others[0]
    if isinstance(factor, Tensor) and (factor.dtype == torch.bool or factor.numel() == 0):
        return None
    if not isinstance(factor, Tensor) and factor == 0:
        return None
    return 1 / factor if name in _DIVISIONS else factor


def upper_bound(name: str, args: Any, kwargs: Any, known: list[Scores | None]) -> Tensor | None:
    """Return the tensor that a function limits scores to, which may be a mask, or ``None``.

    Args:
        name: Name of the function.
        args: Its arguments by position.
        kwargs: Its arguments by name.
        known: What is known of each argument by position, where it is scores.
    """
    bound: Any = None
    if name in ("min", "minimum"):
        others = [x for x, scores in zip(args, known, strict=True) if scores is None]
        bound = others[0] if others else None
    elif name in ("clamp_max", "clamp_max_"):
        bound = args[1] if len(args) > 1 else kwargs.get("max")
    elif name in _CLAMPS:
        bound = args[2] if len(args) > 2 else kwargs.get("max")
    return bound if isinstance(bound, Tensor) else None
