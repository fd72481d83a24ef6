"""Masks on scores, by addition, by filling and by assignment: what they tell about padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spanopt.taps.masks import allowed, both, chosen, doubted, is_open
from spanopt.taps.softmax.axes import in_order
from spanopt.taps.softmax.bounds import factor_of, upper_bound
from spanopt.taps.softmax.following import elementwise
from spanopt.taps.softmax.scores import carry, lose, scores_of
from spanopt.taps.softmax.terms import Term, allowed_where, could_change
from spanopt.taps.tap import Tap

__all__ = ["add", "limit", "masked_fill", "note_mask", "rescale", "setitem", "sub", "where"]


def add(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow a sum of scores with a bias or a mask."""
    known = [scores_of(tap, x) for x in args[:2]]
    masks = [x for x, its in zip(args[:2], known, strict=True) if isinstance(x, Tensor) and not its]
    if not any(known) or not masks:
        return elementwise(tap, func, *args, **kwargs)
    alpha = kwargs.get("alpha", 1) if known[0] else 1
    value = _times(masks[0], alpha, copy=args[0] is masks[0])
    result = elementwise(tap, func, *args, **kwargs)
    note_mask(tap, result, value, sources=masks)
    return result


def sub(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow a difference of scores and a mask."""
    known = [scores_of(tap, x) for x in args[:2]]
    if not any(known) or all(known) or not all(isinstance(x, Tensor) for x in args[:2]):
        return elementwise(tap, func, *args, **kwargs)
    x = args[0] if known[1] else args[1]
    factor = 1 if known[1] else -kwargs.get("alpha", 1)
    value = _times(x, factor, copy=args[0] is x)
    result = elementwise(tap, func, *args, **kwargs)
    note_mask(tap, result, value, sources=[x])
    return result


def limit(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow scores that are limited: an upper limit may be a mask."""
    known = [scores_of(tap, x) for x in args]
    bound = upper_bound(func.__name__, args, kwargs, known) if any(known) else None
    result = elementwise(tap, func, *args, **kwargs)
    if bound is not None:
        note_mask(tap, result, bound, sources=[bound])
    return result


def rescale(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow scores times a factor, which may open what a mask closed, or close more."""
    known = [scores_of(tap, x) for x in args]
    if not any(scores.terms for scores in known if scores is not None):
        return elementwise(tap, func, *args, **kwargs)
    factor = factor_of(func.__name__, args, known)  # before it may be changed in place
    result = elementwise(tap, func, *args, **kwargs)
    scores = scores_of(tap, result)
    if scores is None or factor is None:
        return result
    if not all(term.is_unchanged() for term in scores.terms):
        lose(tap, result, f"{func.__name__} after a change of the mask in place")
        return result
    terms = tuple([term.times(factor) for term in scores.terms])
    shown = scores.read
    for term in terms:
        if not term.closes_as_at_first():
            shown = both(doubted(shown, term.is_opened()), term.read())
    return carry(tap, result, scores.but(read=shown, terms=terms))


def masked_fill(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow scores that are overwritten where a mask is true."""
    result = elementwise(tap, func, *args, **kwargs)
    if scores_of(tap, result) is not None:
        _, where, value = args
        _note_fill(tap, result, where.bool(), value, where)
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
        _note_fill(tap, result, where, y, condition)
    return result


def setitem(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow an assignment to those scores that an index selects."""
    x, index, value = args
    scores = scores_of(tap, x)
    func(*args, **kwargs)
    if scores is None:
        return
    if isinstance(value, Tensor) and value.ndim and tap.streams().is_of_scores(value):
        lose(tap, x, "an assignment")
        return
    carry(tap, x, scores)
    by_mask = isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim == x.ndim
    if by_mask and not (isinstance(value, Tensor) and value.ndim):
        _note_fill(tap, x, index, value, index)
        return
    where = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    where[index] = True
    parts = index if isinstance(index, tuple) else (index,)
    sources = [part for part in parts if isinstance(part, Tensor)]
    if isinstance(value, Tensor):
        values = torch.zeros(x.shape, dtype=value.dtype, device=x.device)
        values[index] = value.detach()
        value = values
    _note_fill(tap, x, where, value, *sources)


def _times(mask: Tensor, factor: float, copy: bool) -> Tensor:
    """Return a mask times a factor, as a copy where the mask may be changed in place."""
    same = factor == 1 and mask.dtype != torch.bool and not copy
    return mask.detach() if same else mask.detach() * factor


def _note_fill(tap: Tap, x: Tensor, where: Tensor, value: Any, *sources: Tensor) -> None:
    """Note that the scores x were overwritten by a value where a mask is true."""
    scores = scores_of(tap, x)
    if scores is not None and scores.closes():
        # A fill of whole rows opens no single key: it gives closed queries a softmax.
        of_keys = in_order(where, scores.axes, x.shape).shape[-1] > 1
        if of_keys and isinstance(value, Tensor):
            carry(tap, x, scores.but(read=doubted(scores.read, (where & allowed(value)).any())))
        elif of_keys and is_open(value):
            carry(tap, x, scores.but(read=doubted(scores.read, where.any())))
    note_mask(tap, x, value, where, sources)


def note_mask(
    tap: Tap,
    x: Tensor,
    value: Tensor | float,
    where: Tensor | None = None,
    sources: Sequence[Tensor] = (),
) -> None:
    """Note that scores are masked.

    Args:
        tap: The tap.
        x: The scores.
        value: What was added to the scores, or put in their place.
        where: Where it was put; ``None`` if it was added.
        sources: From what the mask was computed.
    """
    scores = scores_of(tap, x)
    if scores is None:
        return
    scores = scores.but(masked=True)
    if any(one.left.switches or one.right.switches for one in scores.products):
        of_scores = any(tap.streams().is_of_scores(source) for source in sources)
        # Scores choose keys, and that alone tells nothing of padding.
        if not of_scores or tap.verdicts.has_padding():
            open_ = allowed_where(value, where)
            told = scores.layout(x).read(open_)
            told = chosen(told) if of_scores else told
            scores = scores.but(read=both(scores.read, told))
        if not of_scores and could_change(value):
            term = Term.of(scores.layout(x), value, where)
            scores = scores.but(terms=(*scores.terms, term))
    carry(tap, x, scores)
