"""Axes of a score matrix: which dimensions hold the tokens of each side, on the way to a softmax.

The tokens of one side may be spread over several dimensions, such as the rows and columns of an
image. Dimensions are counted from the end, since batch dimensions may be added or removed in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

__all__ = ["PLAIN", "Axes", "in_order", "permuted", "reshaped", "tail", "turned"]

Axes: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]"
"""The dimensions of the left operand's tokens, of the right operand's, and of the heads.
Those of the heads are given only where heads come before the batch. Usually they come after it."""

PLAIN: Axes = ((-2,), (-1,), ())


def turned(axes: Axes) -> Axes:
    """Return the axes of the same scores when the operands change places.

    Example:
        >>> turned(PLAIN)
        ((-1,), (-2,), ())
    """
    return axes[1], axes[0], axes[2]


def tail(axes: Axes) -> int:
    """Return how many dimensions at the end contain all the axes.

    Example:
        >>> tail(PLAIN)
        2
    """
    return -min(axis for group in axes for axis in group)


def permuted(axes: Axes, order: Sequence[int]) -> Axes | None:
    """Return the axes after a permutation of all dimensions.

    Args:
        axes: The axes before.
        order: The old dimension at each new place, counted from the front.

    Returns:
        The axes; ``None`` where it is no longer known which dimension is the batch.

    Example:
        >>> permuted(PLAIN, [0, 2, 1])
        ((-1,), (-2,), ())
        >>> permuted(PLAIN, [1, 0, 2, 3])
        ((-2,), (-1,), (-4,))
    """
    ndim = len(order)
    left, right, heads = (
        tuple(order.index(axis + ndim) - ndim for axis in group) for group in axes
    )
    tokens = [axis + ndim for axis in (*axes[0], *axes[1])]
    rest = [i for i in order if i not in tokens and i - ndim not in axes[2]]
    if rest != sorted(rest):
        if len(rest) > 2 or heads:
            return None
        heads = (order.index(rest[0]) - ndim,)
    return left, right, heads


def reshaped(axes: Axes, old: Sequence[int], new: Sequence[int]) -> Axes | None:
    """Return the axes after a change of shape that keeps the order of the entries.

    Args:
        axes: The axes before.
        old: The shape before.
        new: The shape afterwards.

    Returns:
        The axes; ``None`` where the tokens of a side share a dimension with something else.

    Example:
        >>> reshaped(PLAIN, (2, 6, 4), (2, 2, 3, 4))  # queries by rows and columns
        ((-3, -2), (-1,), ())
        >>> reshaped(PLAIN, (2, 6, 4), (2, 24)) is None
        True
    """
    count = tail(axes)
    if len(new) >= count and tuple(new[-count:]) == tuple(old[-count:]):
        return axes
    if _count(old) != _count(new):
        return None
    groups = [_regrouped(group, old, new) for group in axes]
    left, right, heads = groups
    if left is None or right is None or heads is None:
        return None
    return left, right, heads


def _regrouped(
    group: tuple[int, ...], old: Sequence[int], new: Sequence[int]
) -> tuple[int, ...] | None:
    if not group:
        return ()
    first, last = group[0] + len(old), group[-1] + len(old)
    if [axis + len(old) for axis in group] != [*range(first, last + 1)]:
        return None
    inner = _count(old[last + 1 :])
    outer = inner * _count(old[first : last + 1])
    found = [
        i
        for i in range(len(new))
        if (new[i] > 1 or inner == outer)
        and _count(new[i + 1 :]) >= inner
        and _count(new[i:]) <= outer
    ]
    if not found or _count([new[i] for i in found]) * inner != outer:
        return None
    return tuple(i - len(new) for i in range(found[0], found[-1] + 1))


def _count(sizes: Sequence[int]) -> int:
    """Return the product of sizes. ``torch.compile`` can trace this, but not ``math.prod``."""
    count = 1
    for size in sizes:
        count = count * size
    return count


def in_order(x: Tensor, axes: Axes, shape: Sequence[int]) -> Tensor:
    """Bring a mask for scores into the shape ``(B, ..., N, M)`` of the product.

    Args:
        x: Broadcastable to the scores.
        axes: Axes of the scores.
        shape: Shape of the scores.

    Returns:
        A view, or a copy where several dimensions became one. Dimensions of size 1 keep that size
        where this is possible.

    Example:
        >>> import torch
        >>> in_order(torch.ones(2, 3, 1), ((-3, -2), (-1,), ()), (5, 2, 3, 4)).shape
        torch.Size([1, 6, 1])
    """
    x = x[(None,) * (len(shape) - x.ndim)]
    left, right, heads = ([axis + x.ndim for axis in group] for group in axes)
    rest = [i for i in range(x.ndim) if i not in (*left, *right, *heads)]
    # If heads come before the batch, the dimensions of the batch become one, as nodes have it.
    groups = [rest, heads, left, right] if heads else [*([i] for i in rest), left, right]
    sizes = []
    for group in groups:
        whole = len(group) > 1 and any(x.shape[i] > 1 for i in group)
        if whole:
            x = x.expand([shape[i] if i in group else x.shape[i] for i in range(x.ndim)])
        sizes.append(_count([x.shape[i] for i in group]))
    x = x.permute([i for group in groups for i in group])
    return x.reshape(sizes) if len(sizes) < x.ndim else x
