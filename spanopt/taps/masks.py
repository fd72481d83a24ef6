"""What attention masks show of a score matrix: which tokens they close."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Read",
    "Shown",
    "allowed",
    "allowed_by_fill",
    "both",
    "can_be_read",
    "chosen",
    "doubted",
    "is_open",
    "read",
    "transposed",
]

# A term that is added to a score forbids attention if it is at most this. Usual terms are -inf, the
# dtype's minimum, -1e9 and -1e4, which bfloat16 rounds.
_FORBIDDING = -9e3


class Shown(NamedTuple):
    """What one attention mask shows of a score matrix (N, M), over all heads.

    Attributes:
        rows: Which queries see any key: boolean, shape ``(B, N)``.
        columns: Which keys are seen by any query: boolean, shape ``(B, M)``.
        diagonal: For which i query i sees key i: boolean, shape ``(B, N)``; ``None`` if the matrix
            is not square.
        above: Whether any query sees a key of a higher index: boolean, no dimension.
        below: Whether any query sees a key of a lower index: boolean, no dimension.
        doubt: Whether what the mask closes may have been opened again: boolean, as a tensor where
            values tell.
        chosen: Whether the mask was computed from scores, which choose keys.

    Any dimension may have size 1. Its one entry then holds for all.
    """

    rows: Tensor
    columns: Tensor
    diagonal: Tensor | None
    above: Tensor
    below: Tensor
    doubt: Tensor | bool = False
    chosen: bool = False


Read: TypeAlias = "tuple[Shown, ...]"
"""What each mask of one score matrix shows."""


def allowed(mask: Tensor) -> Tensor:
    """Return where a mask allows attention.

    Args:
        mask: Boolean, true where attention is allowed; or numbers that are added to the scores.

    Returns:
        Boolean, shaped like ``mask``.

    Example:
        >>> import torch
        >>> allowed(torch.tensor([0.0, -1.5, -1e9, -torch.inf]))
        tensor([ True,  True, False, False])
    """
    return mask if mask.dtype == torch.bool else mask.detach() > _FORBIDDING


def allowed_by_fill(where: Tensor, value: float | Tensor) -> Tensor:
    """Return where attention is allowed once scores are overwritten.

    Args:
        where: Boolean, true where a score is overwritten.
        value: The new value of these scores.

    Returns:
        Boolean, shaped like ``where``.

    Example:
        >>> import torch
        >>> allowed_by_fill(torch.tensor([True, False]), -1e9).tolist()
        [False, True]
        >>> allowed_by_fill(torch.tensor([True, False]), 0.0).tolist()
        [True, True]
    """
    if isinstance(value, Tensor):
        return ~where | allowed(value)
    return torch.ones_like(where) if is_open(value) else ~where


def is_open(value: float) -> bool:
    """Return whether a score of this value allows attention.

    Example:
        >>> is_open(-1.5), is_open(-1e9)
        (True, False)
    """
    return value > _FORBIDDING


def read(allowed: Tensor, ndim: int) -> Read:
    """Return what a mask shows.

    Args:
        allowed: Where attention is allowed: boolean, broadcastable to the scores, so of the shape
            ``(B, ..., N, M)`` or ``(N, M)``.
        ndim: Number of dimensions of the scores.

    Returns:
        What the mask shows. The result is empty if the values can be read at once, and every query
        and every key is open.

    Example:
        >>> import torch
        >>> causal = torch.ones(3, 3, dtype=torch.bool).tril()
        >>> read(causal, ndim=4)
        ()
        >>> read(causal & torch.tensor([True, True, False]), ndim=4)[0].columns
        tensor([[ True,  True, False]])
    """
    allowed = allowed[(None,) * (max(ndim, 3) - allowed.ndim)]
    if allowed.ndim > 3:
        allowed = allowed.flatten(1, -3)
        allowed = allowed[:, 0] if allowed.shape[1] == 1 else allowed.any(1)
    known = can_be_read(allowed)
    if known and allowed.stride(-2) == 0:  # a mask of keys, expanded over the queries
        allowed = allowed[:, :1]
    rows, columns = allowed.any(-1), allowed.any(-2)
    if known and bool(rows.all()) and bool(columns.all()):
        return ()
    n, m = allowed.shape[-2:]
    if 1 in (n, m):  # a mask of the keys alone, or of the queries alone
        anything = allowed.any()
        diagonal = columns if n == 1 else rows
        return (Shown(rows, columns, diagonal, anything, anything),)
    square = allowed.diagonal(dim1=-2, dim2=-1) if n == m else None
    if known and (square is None or bool(square[:, 1:].any())):
        above = below = torch.ones((), dtype=torch.bool)  # not strictly causal
    else:
        above, below = allowed.triu(1).any(), allowed.tril(-1).any()
    return (Shown(rows, columns, square, above, below),)


def can_be_read(x: Tensor) -> bool:
    """Return whether the values of a tensor can be read now without waiting for a device."""
    eager = not torch.compiler.is_compiling() and type(x) is Tensor
    return eager and x.device.type == "cpu"


def transposed(read: Read) -> Read:
    """Return what the same masks show when queries and keys change places."""
    turned = [
        Shown(one.columns, one.rows, one.diagonal, one.below, one.above, one.doubt, one.chosen)
        for one in read
    ]
    return tuple(turned)


def chosen(read: Read) -> Read:
    """Return what masks show that were computed from scores."""
    return tuple([Shown(*one[:6], chosen=True) for one in read])


def doubted(read: Read, doubt: Tensor | bool) -> Read:
    """Return what masks show where what they close may have been opened again.

    Args:
        read: What the masks show.
        doubt: Whether it may have been: boolean, as a tensor where values tell.

    Example:
        >>> import torch
        >>> doubted(read(torch.tensor([True, False]), ndim=4), True)[0].doubt
        True
    """
    if doubt is False:
        return read
    return tuple([Shown(*one[:5], one.doubt | doubt, one.chosen) for one in read])


def both(a: Read, b: Read) -> Read:
    """Return what two sets of masks on the same scores show together.

    Example:
        >>> both((), ())
        ()
    """
    return (*a, *b)
