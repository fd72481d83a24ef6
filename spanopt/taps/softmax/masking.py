"""Masks on scores, by addition, by filling and by assignment: what they tell about padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spanopt.taps.masks import allowed, allowed_by_fill, both, read
from spanopt.taps.softmax.axes import in_order
from spanopt.taps.softmax.following import elementwise
from spanopt.taps.softmax.scores import Scores, carry, scores_of
from spanopt.taps.tap import Tap

__all__ = ["add", "masked_fill", "note_mask", "setitem", "sub", "where"]


def add(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow a sum of scores with a bias or a mask."""
    result = elementwise(tap, func, *args, **kwargs)
    scores = scores_of(tap, result)
    masks = [x for x in args[:2] if isinstance(x, Tensor) and scores_of(tap, x) is None]
    if scores is not None and masks and masks[0].dtype != torch.bool:
        mask = masks[0].detach() * kwargs.get("alpha", 1)
        note_mask(tap, result, allowed(mask), masks[0])
    return result


def sub(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow a difference of scores and a mask."""
    result = elementwise(tap, func, *args, **kwargs)
    scores = scores_of(tap, result)
    if scores is None or len(args) < 2 or not isinstance(args[1], Tensor):
        return result
    if scores_of(tap, args[1]) is None and args[1].ndim and args[1].shape[-1] > 1:
        mask = -args[1].detach() * kwargs.get("alpha", 1)  # not the maximum of each row
        note_mask(tap, result, allowed(mask), args[1])
    return result


def masked_fill(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow scores that are overwritten where a mask is true."""
    result = elementwise(tap, func, *args, **kwargs)
    if scores_of(tap, result) is not None:
        _, where, value = args
        note_mask(tap, result, allowed_by_fill(where.bool(), value), where)
    return result


def where(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow ``where``, which keeps scores at some places and puts other values at the rest."""
    result = elementwise(tap, func, *args, **kwargs)
    if scores_of(tap, result) is not None and len(args) == 3:
        # torch.where(condition, x, y) or x.where(condition, y)
        condition, x, y = args if scores_of(tap, args[0]) is None else (args[1], args[0], args[2])
        where = ~condition.bool()
        if scores_of(tap, x) is None:
            where, y = ~where, x
        note_mask(tap, result, allowed_by_fill(where, y), condition)
    return result


def setitem(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow an assignment to those scores that a boolean index selects."""
    func(*args, **kwargs)
    x, index, value = args
    scores = scores_of(tap, x)
    by_mask = isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim == x.ndim
    if scores is not None and by_mask and not (isinstance(value, Tensor) and value.ndim):
        note_mask(tap, x, allowed_by_fill(index, value), index)


def note_mask(tap: Tap, x: Tensor, allowed: Tensor, source: Tensor) -> None:
    """Note that the scores x are masked; ``allowed`` was computed from the mask ``source``."""
    scores = scores_of(tap, x)
    if scores is None or scores.widened or tap.streams().is_of_scores(source):
        return
    products = scores.products  # torch 2.6 cannot trace a slice of this tuple
    if not any([one.left.switches or one.right.switches for one in products]):  # noqa: C419
        return
    allowed = in_order(allowed, scores.axes, x.shape)
    left, right = products[0].left.x.shape[-2], products[0].right.x.shape[-2]
    told = read(allowed[..., :left, :right], allowed.ndim)  # without keys that were appended
    carry(tap, x, Scores(scores.products, scores.axes, both(scores.read, told)))
