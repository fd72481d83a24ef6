"""What a module has returned: whether gradients flow back through it, and by which nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

__all__ = ["may_carry_gradient", "may_train", "nodes_of"]


def may_carry_gradient(value: Any) -> bool:
    """Return whether a result has a tensor with a gradient, or may have one.

    It may have one if it has no tensor, or contains an object that cannot be looked into.
    """
    pending, tensors = [value], 0
    while pending:
        one = pending.pop()
        if isinstance(one, Tensor):
            if one.requires_grad:
                return True
            tensors += 1
        elif isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, (tuple, list)):
            pending += one
        elif not (one is None or isinstance(one, (bool, int, float, str))):
            return True
    return not tensors


def nodes_of(value: Any) -> list[Any] | None:
    """Return the autograd nodes of the tensors in what a module returned.

    ``None`` if the result contains an object that cannot be looked into.
    """
    nodes: list[Any] = []
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, Tensor):
            if one.grad_fn is not None and not any(one.grad_fn is node for node in nodes):
                nodes.append(one.grad_fn)
        elif isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, (tuple, list)):
            pending += one
        elif not (one is None or isinstance(one, (bool, int, float, str))):
            return None
    return nodes


def may_train(nodes: Iterable[Any], inputs: Iterable[Any], parameters: list[nn.Parameter]) -> bool:
    """Return whether a backward pass from some nodes may reach parameters.

    Args:
        nodes: Nodes of the autograd graph.
        inputs: The nodes of the layer's inputs. The search stops at them.
        parameters: The parameters. If none of them is trained, this cannot be told, and the result
            is true.
    """
    wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
    if not wanted:
        return True
    visited = set(inputs)
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        # A checkpoint or a compiled graph may use parameters that are not among its inputs.
        if isinstance(node, BackwardCFunction) or id(getattr(node, "variable", None)) in wanted:
            return True
        pending += [before for before, _ in node.next_functions]
    return False
