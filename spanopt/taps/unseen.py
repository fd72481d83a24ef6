"""Finding attention in an autograd graph that no node of the library is on, and its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.autograd.function import BackwardCFunction

from spanopt.taps.graph import PRODUCTS, operation

__all__ = ["SEEN", "unscaled_weights"]

SEEN = "spanopt: seen"
"""A key in the ``metadata`` of a node that passes weights to attention that was seen."""

_SOFTMAX = frozenset({"softmax", "safe_softmax"})


def unscaled_weights(roots: Iterable[Any], ends: Iterable[Any] = ()) -> frozenset[int]:
    """Return the weights that make Q or K of attention without a node of the library.

    Args:
        roots: The nodes of the autograd graph to start at.
        ends: Nodes at which to stop.

    Returns:
        The ``id`` of each such parameter.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> x, w = torch.randn(1, 1, 3, 4), torch.randn(4, 4, requires_grad=True)
        >>> y = F.scaled_dot_product_attention(F.linear(x, w), x, x)
        >>> unscaled_weights([y.grad_fn]) == {id(w)}
        True
    """
    found: set[int] = set()
    visited = set(ends)
    pending = [root for root in roots if root not in visited]
    while pending:
        node = pending.pop()
        if node in visited:
            continue
        visited.add(node)
        pending += _before(node)
        operands = _operands(node)
        projections: list[Any] = []
        if all(_may_be_unscaled(operand, projections) for operand in operands):
            found.update(id(weight) for product in projections for weight in _weights(product))
    return frozenset(found)


def _before(node: Any) -> Iterator[Any]:
    return (before for before, _ in node.next_functions if before is not None)


def _operands(node: Any) -> list[Any]:
    """Return the nodes of Q and K if a node is that of attention, and otherwise nothing."""
    name = node.name()
    if name.startswith("ScaledDotProduct"):
        return [before for before, _ in node.next_functions[:2] if before is not None]
    if operation(name) not in _SOFTMAX:
        return []
    products: list[Any] = []
    if not all(_may_be_unscaled(before, products) for before in _before(node)):
        return []
    operands = []
    for product in products:
        factors = [before for before, _ in product.next_functions[-2:] if before is not None]
        # A product with a weight is a linear map, as in a classifier. Its result is not scores.
        if not any(next(_weights_behind(factor), None) is not None for factor in factors):
            operands += factors
    return operands


def _may_be_unscaled(node: Any, products: list[Any]) -> bool:
    """Collect the products before a node. Return whether no node of the library lies between."""
    visited: set[Any] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node in visited:
            continue
        visited.add(node)
        name = node.name()
        if isinstance(node, BackwardCFunction) and _is_ours(node):
            return False
        if operation(name) in PRODUCTS:
            products.append(node)
        elif not name.startswith("ScaledDotProduct"):
            pending += _before(node)
    return True


def _is_ours(node: Any) -> bool:
    """Return whether a node is from the library, or from compiled code, which may contain one."""
    function = getattr(type(node), "_forward_cls", None)
    module = getattr(function, "__module__", None) or ""
    return module.startswith(("spanopt.", "torch._functorch.", "torch._dynamo."))


def _weights(product: Any) -> Iterator[Any]:
    """Yield the parameters that are factors or terms of a product, also if reshaped or cast."""
    for before in _before(product):
        yield from _weights_behind(before)


def _weights_behind(node: Any) -> Iterator[Any]:
    while not hasattr(node, "variable"):
        before = node.next_functions
        if len(before) != 1 or before[0][0] is None or SEEN in node.metadata:
            return
        node = before[0][0]
    yield node.variable
