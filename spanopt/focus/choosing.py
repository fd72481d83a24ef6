"""The choice of the keys that each query keeps, as functions from scores to positions of keys."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from spanopt.focus.spec import Keeping
from spanopt.mathematics.checks import can_be_read

__all__ = [
    "FORBIDDEN",
    "chosen",
    "kept_scores",
    "may_be_none",
    "own_scores",
    "spread",
    "stride_of",
    "width_of",
]

# A score of this or less means that a mask closes the key, the same as in spanopt.taps.masks.
FORBIDDEN = -9e3
_GROUP = 8


def width_of(keeping: Keeping, keys: int) -> int:
    """Return how many positions :func:`chosen` returns for each query.

    Example:
        >>> width_of(Keeping("top", 2, (0,)), 9), width_of(Keeping("strided", 4), 9)
        (3, 3)
    """
    if keeping.kind == "strided":
        return -(-keys // stride_of(keeping, keys)) + len(keeping.always)
    return keeping.k + len(keeping.always)


def stride_of(keeping: Keeping, keys: int) -> int:
    """Return the distance between the kept keys of a strided pattern."""
    return -(-keys // keeping.k)


def chosen(scores: Tensor, keeping: Keeping, first: int, queries: int, keys: int) -> Tensor:
    """Return the positions of the keys that some queries keep.

    Args:
        scores: Scores with their masks, shape ``(..., n, M')``, in the dtype in which keys are
            chosen. Keys from M' on are closed to all n queries.
        keeping: Which keys are kept, see :meth:`~spanopt.focus.spec.Keeping.fitting`.
        first: Number of the first of the n queries.
        queries: Number N of all queries.
        keys: Number M of all keys.

    Returns:
        Integers, shape ``(..., n, width_of(keeping, keys))``. The keys of a query are all
        different. A number of M or more stands for no key.

    Example:
        >>> scores = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
        >>> chosen(scores, Keeping("top", 2), 0, 1, 4).sort(-1).values
        tensor([[1, 2]])
        >>> chosen(scores, Keeping("top", 1, (0,)), 0, 1, 4)
        tensor([[1, 0]])
    """
    n, width = scores.shape[-2:]
    device = scores.device
    # Where there are more keys than queries, the queries are at the last positions.
    at = torch.arange(first, first + n, device=device)[:, None] + max(keys - queries, 0)
    always = torch.tensor(keeping.always, dtype=torch.int64, device=device)
    if keeping.kind == "block":
        own = at // keeping.k * keeping.k + torch.arange(keeping.k, device=device)
    elif keeping.kind == "strided":
        stride = stride_of(keeping, keys)
        own = at % stride + torch.arange(0, keys, stride, device=device)
    else:
        preference = scores
        if keeping.kind == "window":
            to = torch.arange(width, device=device)
            # Earlier keys count as half a step further away, so that no two are equally near.
            nearness = (at - to).abs() * -2 - (to < at).long()
            closed = scores.new_full((), -math.inf)
            preference = torch.where(scores > FORBIDDEN, nearness.to(scores.dtype), closed)
        if keeping.always:
            preference = preference.index_fill(-1, always, -math.inf)
        own = _largest(preference, keeping.k)
        if keeping.always:
            own = own.masked_fill(preference.gather(-1, own) == -math.inf, keys)
    if keeping.kind in ("block", "strided"):
        if keeping.always:
            own = own.masked_fill((own[..., None] == always).any(-1), keys)
        own = own.clamp(max=keys).expand(*scores.shape[:-1], own.shape[-1])
    if not keeping.always:
        return own
    return torch.cat((own, always.expand(*scores.shape[:-1], len(keeping.always))), -1)


def _largest(x: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest entries of each row, exactly k of them.

    They lie in the k groups of entries that have the largest maxima. On a CPU it is faster to find
    these groups first, unless there are few entries.
    """
    width = x.shape[-1]
    if x.device.type != "cpu" or width % _GROUP or width < max(2 * _GROUP * k, 512):
        return _top(x, k)
    groups = width // _GROUP
    best = _top(x.unflatten(-1, (_GROUP, groups)).amax(-2), k)
    within = torch.arange(_GROUP, device=x.device) * groups
    places = (best[..., None] + within).flatten(-2)
    return places.gather(-1, _top(x.gather(-1, places), k))


def _top(x: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest entries of each row, on a CPU as NumPy finds them.

    That takes half as long as PyTorch, or less.
    """
    if not can_be_read(x) or x.dtype not in (torch.float32, torch.float64):
        return x.topk(k, dim=-1, sorted=False).indices
    positions = np.argpartition(x.detach().numpy(), x.shape[-1] - k, axis=-1)[..., -k:]
    return torch.from_numpy(positions).contiguous()


def may_be_none(keeping: Keeping) -> bool:
    """Return whether a position from :func:`chosen` may stand for no key."""
    return keeping.kind in ("block", "strided") or bool(keeping.always)


def kept_scores(scores: Tensor, positions: Tensor, may_be_none: bool) -> tuple[Tensor, Tensor]:
    """Return scores that are -inf at keys that are not kept.

    Args:
        scores: Shape ``(..., n, M)``.
        positions: From :func:`chosen`.
        may_be_none: From the function of this name.

    Returns:
        The scores, and the largest score of each query's chosen keys, shape ``(..., n, 1)``. A
        query whose chosen keys are all closed keeps all keys.
    """
    own = own_scores(scores, positions, may_be_none)
    kept = spread(own, positions, scores.shape[-1], may_be_none, -math.inf)
    best = own.amax(-1, keepdim=True)
    return torch.where(best <= FORBIDDEN, scores, kept), best


def own_scores(scores: Tensor, positions: Tensor, may_be_none: bool) -> Tensor:
    """Return the scores of chosen keys, and -inf where a position stands for no key.

    Args:
        scores: Shape ``(..., n, M)``.
        positions: From :func:`chosen`.
        may_be_none: From the function of this name.
    """
    if not may_be_none:
        return scores.gather(-1, positions)
    width = scores.shape[-1]
    own = scores.gather(-1, positions.clamp(max=width - 1))
    return own.masked_fill(positions >= width, -math.inf)


def spread(
    values: Tensor, positions: Tensor, width: int, may_be_none: bool, fill: float = 0.0
) -> Tensor:
    """Return a tensor ``(..., n, width)`` with the values of chosen keys, and ``fill`` elsewhere.

    Args:
        values: A value for each chosen key, with the shape of ``positions``.
        positions: From :func:`chosen`.
        width: Number of keys.
        may_be_none: From the function of this name.
        fill: The value of the other keys.

    Example:
        >>> spread(torch.tensor([[5.0, 6.0]]), torch.tensor([[2, 3]]), 3, True, 1.0)
        tensor([[1., 1., 5.]])
    """
    if not may_be_none:
        return values.new_full((*positions.shape[:-1], width), fill).scatter_(-1, positions, values)
    all_keys = values.new_full((*positions.shape[:-1], width + 1), fill)
    return all_keys.scatter_(-1, positions.clamp(max=width), values)[..., :width]
