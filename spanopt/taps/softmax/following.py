"""Following scores from their product to a softmax: elementwise functions and changes of shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spanopt.taps.softmax.axes import permuted, reshaped, tail
from spanopt.taps.softmax.scores import Scores, carry, scores_of, together
from spanopt.taps.tap import Tap

__all__ = ["cat", "elementwise", "forget", "get", "getitem", "permute", "reshape", "signs"]


def elementwise(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow a function that computes each entry from the same entry of its arguments."""
    result = func(*args, **kwargs)
    found = [scores for scores in (scores_of(tap, x) for x in args) if scores is not None]
    found = [scores for scores in found if not scores.signs] or found
    if not found or not _keeps_axes(tap, result, args, found[0]):
        return result
    scores = found[0]
    for other in found[1:]:
        scores = together(scores, other)
    return carry(tap, result, scores)


def _keeps_axes(tap: Tap, result: Any, args: Any, scores: Scores) -> bool:
    """Return whether the dimensions that hold the axes of the scores have kept their sizes."""
    if not isinstance(result, Tensor):
        return False
    x = next(x for x in args if scores_of(tap, x) is scores)
    count = tail(scores.axes)
    return result.ndim >= count and result.shape[-count:] == x.shape[-count:]


def signs(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow the signs of scores, which no gradient goes through."""
    result = func(*args, **kwargs)
    scores = scores_of(tap, args[0])
    if scores is None:
        return result
    signs = Scores(scores.products, scores.axes, scores.read, scores.widened, signs=True)
    return carry(tap, result, signs)


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
    return carry(tap, result, scores.at(permuted(scores.axes, order)))


def get(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow the property ``mT``, the transpose. ``torch.compile`` does not show properties."""
    if getattr(getattr(func, "__self__", None), "__name__", "") == "mT":
        return permute(tap, func, *args, **kwargs)
    return func(*args, **kwargs)


def cat(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Follow scores to which those of further keys are joined, such as an attention sink."""
    result = func(*args, **kwargs)
    tensors = args[0] if isinstance(args[0], (list, tuple)) else ()
    found = [scores for scores in (scores_of(tap, x) for x in tensors) if scores is not None]
    if len(found) == 1:  # an attention sink is a further key
        scores = found[0]
        widened = scores.widened or scores_of(tap, tensors[0]) is None
        carry(tap, result, Scores(scores.products, scores.axes, scores.read, widened))
    return result


def forget(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Stop following scores that are reshaped, reordered or overwritten in place."""
    result = func(*args, **kwargs)
    call = tap.current_call()
    if call is not None and scores_of(tap, args[0]) is not None:
        call.scores[args[0]] = None
    return result
