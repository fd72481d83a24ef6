"""Following scores from their product to a softmax: elementwise functions and changes of shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spanopt.taps.masks import doubted
from spanopt.taps.softmax.axes import permuted, reshaped, tail
from spanopt.taps.softmax.bounds import doubt_of, is_negated
from spanopt.taps.softmax.scores import Scores, carry, lose, scores_of, together
from spanopt.taps.tap import Tap

__all__ = ["cat", "elementwise", "get", "getitem", "permute", "reshape", "signs"]

_SUMS = (
    *("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "subtract", "subtract_"),
    *("__sub__", "__isub__", "__rsub__"),
)


def elementwise(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow a function that computes each entry from the same entry of its arguments."""
    known = [scores_of(tap, x) for x in args]  # before the function may change one of them
    result = func(*args, **kwargs)
    found = [scores for scores in known if scores is not None]
    if not found:
        return result
    name = func.__name__
    scores = _combined(name, args, kwargs, known)
    if scores is None or not _keeps_axes(result, args, known, scores):
        if isinstance(result, Tensor) and result is args[0]:
            lose(tap, result, name)
        return result
    return carry(tap, result, scores)


def _combined(name: str, args: Any, kwargs: Any, known: list[Scores | None]) -> Scores | None:
    """Return what is known of an elementwise function's result; ``None`` if nothing is."""
    found = [scores for scores in known if scores is not None]
    found = [scores for scores in found if not scores.signs] or found
    if is_negated(name, args, kwargs, known):
        return None
    scores: Scores | None = found[0]
    for other in found[1:]:
        scores = None if scores is None else together(scores, other)
    if scores is None or not scores.closes():
        return scores
    doubt = len(found) > 1 and name not in _SUMS
    return scores.but(read=doubted(scores.read, doubt or doubt_of(name, args, kwargs, known)))


def _keeps_axes(result: Any, args: Any, known: list[Scores | None], scores: Scores) -> bool:
    """Return whether the dimensions that hold the axes of the scores have kept their sizes."""
    if not isinstance(result, Tensor):
        return False
    count = tail(scores.axes)
    sizes = [x.shape[-count:] for x, its in zip(args, known, strict=True) if its is not None]
    return result.ndim >= count and result.shape[-count:] in sizes


def signs(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow the signs of scores, which no gradient goes through."""
    result = func(*args, **kwargs)
    scores = scores_of(tap, args[0])
    if scores is None:
        return result
    return carry(tap, result, scores.but(signs=True, read=doubted(scores.read, True)))


def reshape(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow a change of shape or type that keeps the order of the entries."""
    result = func(*args, **kwargs)
    scores = scores_of(tap, args[0]) if args else None
    if scores is None:
        return result
    axes = reshaped(scores.axes, args[0].shape, result.shape)
    return result if axes is None else carry(tap, result, scores.at(axes))


def getitem(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow an index that takes all of the scores and may add dimensions of size 1."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    for part in index:
        if not (part is None or part is ... or (isinstance(part, slice) and part == slice(None))):
            return func(*args, **kwargs)
    return reshape(tap, func, *args, **kwargs)


def permute(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow a permutation of the dimensions."""
    result = func(*args, **kwargs)
    scores = scores_of(tap, args[0])
    if scores is None:
        return result
    ndim = args[0].ndim
    order = list(range(ndim))
    if func.__name__ == "permute":
        dims = kwargs["dims"] if len(args) == 1 else args[1]
        dims = args[1:] if isinstance(dims, int) else dims
        order = [dim % ndim for dim in dims]
    elif len(args) == 3:
        a, b = (dim % ndim for dim in args[1:])
        order[a], order[b] = b, a
    elif func.__name__ == "__get__":
        order[-1], order[-2] = ndim - 2, ndim - 1
    else:
        return result
    axes = permuted(scores.axes, order)
    return result if axes is None else carry(tap, result, scores.at(axes))


def get(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow the property ``mT``, the transpose. ``torch.compile`` does not show properties."""
    if getattr(getattr(func, "__self__", None), "__name__", "") == "mT":
        return permute(tap, func, *args, **kwargs)
    return func(*args, **kwargs)


def cat(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow scores to which those of further keys or queries are joined, as an attention sink."""
    result = func(*args, **kwargs)
    tensors, *rest = args
    dim = rest[0] if rest else kwargs.get("dim", kwargs.get("axis", 0))
    tensors = tensors if isinstance(tensors, (list, tuple)) else ()
    known = [scores_of(tap, x) for x in tensors]
    found = [(i, scores) for i, scores in enumerate(known) if scores is not None]
    if len(found) != 1 or not isinstance(dim, int):
        return result
    ((place, scores),) = found
    axis = dim - result.ndim if dim >= 0 else dim
    before = sum([x.shape[axis] for x in tensors[:place] if x.ndim == result.ndim])
    left, right = scores.start
    if scores.axes[0] == (axis,):
        return carry(tap, result, scores.but(start=(left + before, right)))
    if scores.axes[1] == (axis,) or not scores.products:
        return carry(tap, result, scores.but(start=(left, right + before)))
    return result  # what is joined along another dimension has masks of its own
