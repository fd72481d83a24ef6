"""What came of a layer's calls: which a backward pass went through, with attention or without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

__all__ = ["Account", "may_train", "nodes_of", "projection_of"]


@dataclasses.dataclass
class Account:
    """What is known of a layer's calls with gradients since the last optimizer step.

    Attributes:
        seen: Attention was seen in a call.
        waiting: Attention was seen in a call whose backward pass reports when it comes.
        passed: A backward pass went through such a call.
        lost: A product was lost on its way to a softmax, perhaps beside others that were seen.
        missed: A backward pass went through a call in which no attention was seen.
        direct: A backward pass went through the layer's forward, which was called directly.
        around: The layer got gradients, and no backward pass went through the calls that wait.
        unsure: Attention was seen that needs no node, as it does where all scales are 1. In the
            autograd graph it looks like attention past the hooks.
    """

    seen: bool = False
    waiting: bool = False
    passed: bool = False
    lost: bool = False
    missed: bool = False
    direct: bool = False
    around: bool = False
    unsure: bool = False

    def is_complete(self) -> bool:
        """Return whether attention was seen, and nothing is known to have gone past the hooks."""
        return self.seen and not self.ways_past()

    def ways_past(self) -> list[str]:
        """Return how a backward pass went past the hooks beside what was seen, as field names."""
        past = ("lost", "missed", "direct", "around") if self.seen else ()
        return [way for way in past if getattr(self, way)]

    def forget(self) -> None:
        """Start anew, as after an optimizer step."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, False)

    def report(self, result: Any, what: str) -> bool:
        """Have a field set once a backward pass goes through what a call returned.

        Args:
            result: What it returned.
            what: The field.

        Returns:
            Whether all that a gradient may come through was found.
        """
        nodes = nodes_of(result)
        for node in nodes or ():
            node.register_prehook(_Report(self, what))
        return bool(nodes)


class _Report:
    """A hook on a node of the autograd graph that sets a field of an account."""

    def __init__(self, account: Account, what: str) -> None:
        self.account = account
        self.what = what

    def __call__(self, gradients: Any) -> None:
        setattr(self.account, self.what, True)


def nodes_of(value: Any) -> list[Any] | None:
    """Return the autograd nodes of the tensors in what a module returned.

    ``None`` if there is something in it that can't be looked into.
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
        inputs: Nodes at which not to go on, those of the layer's inputs.
        parameters: The parameters. Where none of them is trained, nothing tells.
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
        # A checkpoint or a compiled graph uses parameters that are not among its inputs.
        if isinstance(node, BackwardCFunction) or id(getattr(node, "variable", None)) in wanted:
            return True
        pending += [before for before, _ in node.next_functions]
    return False


def projection_of(layer: nn.Module, parameters: Iterable[nn.Parameter]) -> nn.Module | None:
    """Return the first module in a layer, but not the layer, that owns one of its parameters."""
    wanted = set(parameters)
    for module in layer.modules():
        if module is not layer and not wanted.isdisjoint(module.parameters(recurse=False)):
            return module
    return None
