"""Reading and judging a mask once, when several layers of a model share it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from spanopt.taps.judging import Verdict, judge
from spanopt.taps.masks import Read, allowed, read

__all__ = ["judge_once", "read_once"]


class _Last(threading.local):
    """What was read and judged last in this thread."""

    def __init__(self) -> None:
        self.mask: Callable[[], Tensor | None] = lambda: None
        self.version: tuple[int, int] | None = None
        self.read: Read = ()
        self.judged: Read | None = None
        self.case: tuple[int, int, bool, list[int]] | None = None
        self.padding: list[Tensor] = []
        self.verdict: Verdict | None = None


_last = _Last()


def read_once(mask: Tensor, ndim: int) -> Read:
    """Return what a mask shows. If the mask is the one read last, that result is reused.

    Args:
        mask: Boolean, true where attention is allowed; or numbers that are added to the scores.
        ndim: Number of dimensions of the scores.

    Returns:
        What the mask shows; see :func:`spanopt.taps.masks.read`.

    Example:
        >>> mask = torch.tensor([[[[True, False]]]])
        >>> read_once(mask, 4) is read_once(mask, 4)
        True
    """
    if torch.compiler.is_compiling() or type(mask) is not Tensor or mask.is_inference():
        return read(allowed(mask), ndim)
    version = mask._version, ndim
    if _last.mask() is not mask or _last.version != version:
        _last.read = read(allowed(mask), ndim)
        _last.mask, _last.version = weakref.ref(mask), version
    return _last.read


def judge_once(
    read: Read, n: int, m: int, self_attention: bool, padding: list[Tensor]
) -> Verdict | None:
    """Tell padding from real tokens. If the last call asked the same, its result is reused.

    Args:
        read: What the masks show.
        n: Number of queries.
        m: Number of keys.
        self_attention: Whether queries and keys are the same tokens.
        padding: Padding masks that the model was called with.

    Returns:
        The verdict of :func:`spanopt.taps.judging.judge`.

    Example:
        >>> shown = read_once(torch.tensor([[[[True, False]]]]), 4)
        >>> judge_once(shown, 2, 2, True, []) is judge_once(shown, 2, 2, True, [])
        True
    """
    if torch.compiler.is_compiling() or any(x.is_inference() for x in padding):
        return judge(read, n, m, self_attention=self_attention, padding=padding)
    case = n, m, self_attention, [x._version for x in padding]
    known = read is _last.judged and case == _last.case
    if not known or not all(x is y for x, y in zip(padding, _last.padding, strict=True)):
        _last.verdict = judge(read, n, m, self_attention=self_attention, padding=padding)
        _last.judged, _last.case, _last.padding = read, case, padding
    return _last.verdict
