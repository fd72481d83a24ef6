"""Mixing of heads: an entry of the result comes from scores of one query and one key."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spanopt.taps.masks import doubted
from spanopt.taps.softmax.axes import tail
from spanopt.taps.softmax.scores import Scores, carry, scores_of
from spanopt.taps.tap import Tap

__all__ = ["convolution", "linear", "mixed_by_einsum", "mixed_by_product"]


def mixed_by_einsum(
    tap: Tap, terms: tuple[str, str, str], left: Tensor, right: Tensor
) -> Scores | None:
    """Return what is known of an einsum's result, if the einsum mixes the heads of scores."""
    own, other, out = terms
    scores = scores_of(tap, left)
    if scores is None:
        own, other, scores = other, own, scores_of(tap, right)
    elif scores_of(tap, right) is not None:
        return None
    if scores is None or not scores.products:
        return None
    groups = [[own[axis + len(own)] for axis in group] for group in scores.axes]
    if any(letter not in out for group in groups[:2] for letter in group):
        return None
    if groups[2]:
        groups[2] = [c for c in out if c in groups[2] or (c in other and c not in own)]
    of_left, of_right, heads = (tuple(out.index(c) - len(out) for c in group) for group in groups)
    return _mixed(scores).at((of_left, of_right, heads))


def mixed_by_product(tap: Tap, left: Any, right: Any) -> Scores | None:
    """Return what is known of a product that contracts scores over no dimension of tokens."""
    if not all(isinstance(x, Tensor) and x.ndim > 1 for x in (left, right)):
        return None
    for x, contracted in ((left, -1), (right, -2)):
        scores = scores_of(tap, x)
        if scores is None or not scores.products:
            continue
        if contracted not in (*scores.axes[0], *scores.axes[1]):
            return _mixed(scores)
    return None


def linear(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow a linear map of scores whose last dimension is the heads."""
    result = func(*args, **kwargs)
    scores = scores_of(tap, args[0])
    if scores is not None and -1 not in (*scores.axes[0], *scores.axes[1]):
        return carry(tap, result, _mixed(scores))
    return result


def convolution(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow a convolution with kernels of size 1 over scores whose channels are the heads."""
    result = func(*args, **kwargs)
    scores, x, weight = scores_of(tap, args[0]), *args[:2]
    space = weight.ndim - 2
    of_each_entry = weight.shape[2:].numel() == 1 and result.shape[-space:] == x.shape[-space:]
    if scores is not None and of_each_entry and tail(scores.axes) <= space:
        return carry(tap, result, _mixed(scores))
    return result


def _mixed(scores: Scores) -> Scores:
    """Return what is known after mixing: what a mask closes in one head, another may open."""
    return scores.but(read=doubted(scores.read, True))
