"""Masks and biases on scores, kept so that a later factor can be judged.

A mask closes keys by very low scores. A small factor may raise these again, and a large one may
make a bias close keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanopt.taps.masks import Read, allowed, allowed_by_fill, doubted, read, transposed
from spanopt.taps.softmax.axes import Axes, in_order

__all__ = ["Layout", "Term", "allowed_where", "could_change"]

# A closed score gets no weight either once it is raised to about -100, a ninetieth of what closes.
_STILL_CLOSED = 90.0


class Layout(NamedTuple):
    """How scores hold the matrix of a product.

    Attributes:
        shape: Shape of the scores.
        axes: Their dimensions of the left operand's tokens, of the right's and of the heads.
        start: How many further rows and columns come before those of the product.
        sizes: The shape ``(B, ..., N, M)`` of the product.
    """

    shape: Sequence[int]
    axes: Axes
    start: tuple[int, int]
    sizes: Sequence[int]

    def read(self, allowed: Tensor) -> Read:
        """Return what a mask on the scores shows of their product, without what was joined to it.

        Args:
            allowed: Where attention is allowed: boolean, broadcastable to the scores.
        """
        allowed = in_order(allowed, self.axes, self.shape)
        batch = self.sizes[:-2]
        if allowed.ndim > max(len(batch) + 2, 3):  # a dimension was added, or the batch was split
            scores = allowed.new_empty(()).expand(self.shape)
            sizes = in_order(scores, self.axes, self.shape).shape[:-2]
            if sizes.numel() == torch.Size(batch).numel():
                allowed = allowed.expand(*sizes, -1, -1).reshape(*batch, *allowed.shape[-2:])
            while allowed.ndim > max(len(batch) + 2, 3):
                allowed = allowed.any(0)
        for dim, start in zip((-2, -1), self.start, strict=True):
            if allowed.ndim >= -dim and allowed.shape[dim] > 1:
                allowed = allowed.narrow(dim, start, self.sizes[dim])
        return read(allowed, allowed.ndim)


class Term(NamedTuple):
    """A mask or a bias on scores, and by what it has been multiplied since.

    Attributes:
        layout: How the scores held their product when the term was put on them.
        value: What was added to the scores, or put in their place: a number, or a tensor that can
            be broadcast to the scores as they were.
        where: Where scores were overwritten: boolean; ``None`` if the value was added.
        versions: The versions of these tensors then; ``None`` in compiled code.
        low: The lowest entry of the product of all factors since.
        high: The highest.
        turned: Whether the operands have changed places since.
    """

    layout: Layout
    value: Tensor | float
    where: Tensor | None
    versions: tuple[int, ...] | None
    low: Tensor | float = 1.0
    high: Tensor | float = 1.0
    turned: bool = False

    @classmethod
    def of(cls, layout: Layout, value: Tensor | float, where: Tensor | None = None) -> Term:
        """Return the term of a value; see the attributes."""
        return cls(layout, value, where, _versions(value, where))

    def turn(self) -> Term:
        """Return the same term for the product whose operands have changed places."""
        return self._replace(turned=not self.turned)

    def times(self, factor: Tensor | float) -> Term:
        """Return the same term, multiplied by a positive factor."""
        if not isinstance(factor, Tensor):
            return self._replace(low=self.low * factor, high=self.high * factor)
        factor = factor.detach()
        return self._replace(low=self.low * factor.amin(), high=self.high * factor.amax())

    def is_unchanged(self) -> bool:
        """Return whether none of its tensors was changed in place since."""
        return self.versions is None or self.versions == _versions(self.value, self.where)

    def read(self) -> Read:
        """Return what the term shows as it is now, in doubt if single factors do not agree."""
        most = self._allowed(self.high)
        shown = self.layout.read(most)
        if isinstance(self.low, Tensor):
            shown = doubted(shown, (most != self._allowed(self.low)).any())
        return transposed(shown) if self.turned else shown

    def is_opened(self) -> Tensor:
        """Return whether factors have opened anything that the term closed at first."""
        opened = self._allowed(self.low * _STILL_CLOSED) & ~self._allowed(1.0)
        return opened.any()

    def closes_as_at_first(self) -> bool:
        """Return whether the factors are known to change nothing of what the term closes."""
        known = not isinstance(self.low, Tensor) and not isinstance(self.high, Tensor)
        return known and bool(self.high <= 1 <= self.low * _STILL_CLOSED)

    def _allowed(self, factor: Tensor | float) -> Tensor:
        value = self.value.detach() if isinstance(self.value, Tensor) else self.value
        return allowed_where(value * factor, self.where)


def allowed_where(value: Tensor | float, where: Tensor | None) -> Tensor:
    """Return where attention is allowed once a value is added to scores, or put in their place.

    Args:
        value: The value; a tensor if it is added.
        where: Where it is put: boolean; ``None`` if it is added.

    Example:
        >>> allowed_where(torch.tensor([0.0, -1e9]), None)
        tensor([ True, False])
        >>> allowed_where(-1e9, torch.tensor([True, False]))
        tensor([False,  True])
    """
    if where is not None:
        return allowed_by_fill(where, value)
    assert isinstance(value, Tensor)
    return allowed(value)


def could_change(value: Tensor | float) -> bool:
    """Return whether some factor could make a value close keys, or open those that it closes.

    Example:
        >>> could_change(-1e4), could_change(-torch.inf), could_change(0.0)
        (True, False, False)
    """
    return isinstance(value, Tensor) or -1e30 < value < 0


def _versions(*tensors: Any) -> tuple[int, ...] | None:
    found = [x for x in tensors if isinstance(x, Tensor)]
    if torch.compiler.is_compiling() or any(x.is_inference() for x in found):
        return None
    return tuple([x._version for x in found])
