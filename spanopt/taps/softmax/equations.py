"""Reading the equation of an einsum as a product of queries and keys."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from spanopt.taps.softmax.axes import Axes

__all__ = ["Layout", "layouts_of", "terms_of"]


def terms_of(equation: Any, left: Any, right: Any) -> tuple[str, str, str] | None:
    """Return the letters of both operands of an einsum and of its result.

    A digit stands for each dimension of an ellipsis. Digits are matched from the last dimension.
    ``None`` where the equation has no arrow or not two operands.
    """
    if not all(isinstance(x, Tensor) for x in (left, right)) or not isinstance(equation, str):
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    ellipses = [
        "9876543210"[10 - (x.ndim - len(term.replace("...", ""))) :]
        for term, x in zip(terms, (left, right), strict=True)
    ]
    one, other = (term.replace("...", dims) for term, dims in zip(terms, ellipses, strict=True))
    return one, other, out.replace("...", max(ellipses, key=len))


class Layout(NamedTuple):
    """How an operand of an einsum is brought into the shape (B, ..., N, d).

    Attributes:
        groups: Its dimensions in the new order. The dimensions of one group become one dimension.
    """

    groups: tuple[tuple[int, ...], ...]

    def lay_out(self, x: Tensor) -> Tensor:
        """Return the operand as (B, ..., N, d): a view, unless dimensions become one."""
        y = x.permute([i for group in self.groups for i in group])
        for at, group in enumerate(self.groups):
            if len(group) > 1:
                y = y.flatten(at, at + len(group) - 1)
        return y

    def lay_back(self, y: Tensor, x: Tensor) -> Tensor:
        """Return a tensor (B, ..., N, d) in the layout of the operand x."""
        order = [i for group in self.groups for i in group]
        if len(order) > len(self.groups):
            y = y.reshape([x.shape[i] for i in order])
        return y.permute([order.index(i) for i in range(len(order))])


def layouts_of(left: str, right: str, out: str) -> tuple[Layout, Layout, Axes] | None:
    """Return how the operands of an einsum become (B, ..., N, d), and the axes of the tokens.

    ``None`` where it is no product of queries and keys. Such a product has a batch dimension, a
    contracted one, and one dimension of tokens on each side. Several contracted dimensions count as
    one set of features, as in attention that is tied over the rows of an alignment.
    """
    contracted = [c for c in left if c in right and c not in out]
    kept = [c for c in left + right if c not in contracted]
    repeated = any(len(set(term)) < len(term) for term in (left, right, out))
    batch = [c for c in left if c in right and c in out]
    if not contracted or not batch or repeated or sorted(set(kept)) != sorted(out):
        return None
    tokens = []
    for own, other in ((left, right), (right, left)):
        only = [c for c in out if c in own and c not in other and not c.isdigit()]
        # If all heads share the keys, two letters are left. Then h or g stands for the heads.
        only = [c for c in only if c not in "hg"] or only
        if len(only) != 1:
            return None
        tokens.append(only[0])
    rest = [c for c in out if c not in tokens]
    heads = [c for c in rest if c in "hg"]
    rows = [c for c in rest if c not in heads]
    first = bool(heads and rows) and out.index(heads[0]) < out.index(rows[-1])
    leading = [rows, heads] if first else [[c] for c in rest]
    layouts = []
    for term, token in zip((left, right), tokens, strict=True):
        groups = [[c for c in group if c in term] for group in (*leading, [token], contracted)]
        layouts.append(Layout(tuple(tuple(map(term.index, group)) for group in groups if group)))
    left_axes, right_axes, of_heads = (
        tuple(out.index(c) - len(out) for c in group)
        for group in (tokens[:1], tokens[1:], heads if first else [])
    )
    return layouts[0], layouts[1], (left_axes, right_axes, of_heads)
