"""What the autograd graph tells of tensors on the way from scores to a softmax.

A function mode does not see all functions: not those of ``torch.jit.script``, and no
``autograd.Function``. The graph has their nodes all the same.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from spanopt.traits import scripts_of

__all__ = ["PRODUCTS", "Trail", "is_elementwise", "operation"]

# Functions of one tensor, or of one and a number, by their names in autograd and in TorchScript.
# Sums are not among them: what is added may be a mask.
_ELEMENTWISE = {"mul", "div", "tanh", "neg", "clamp", "abs", "relu", "pow", "sqrt", "sigmoid"}
PRODUCTS = {"mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "dot", "convolution", "linear"}
_SCRIPTED = "DifferentiableGraphBackward"
_scripts_are_elementwise: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class Trail:
    """Where scores are in the autograd graph of one call of a layer.

    Nodes are known by their sequence numbers, which keeps nothing alive.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, torch.Size]] = {}

    def note(self, x: Tensor, scores: Any) -> None:
        """Note that a tensor is scores."""
        if x.grad_fn is not None:
            self._known[x.grad_fn._sequence_nr()] = scores, x.shape

    def close(self) -> None:
        """Forget everything."""
        self._known.clear()

    def through_elementwise(self, x: Tensor, layer: nn.Module) -> Any:
        """Return the scores that a tensor was computed from, entry by entry; ``None`` if not so.

        Args:
            x: A tensor that a function made which no mode has seen.
            layer: The layer. A part of the graph that TorchScript made counts as elementwise
                where all TorchScript functions that the layer may run are.
        """
        pending = [x.grad_fn] if self._known else []
        while pending:
            node = pending.pop()
            if node is None:
                continue
            scores, shape = self._known.get(node._sequence_nr(), (None, None))
            if scores is not None and shape == x.shape:
                return scores
            name = node.name()
            if _is_elementwise_node(name) or (
                name.endswith(_SCRIPTED) and _runs_elementwise_scripts(layer)
            ):
                pending += [before for before, _ in node.next_functions]
        return None

    def lost_at(self, x: Tensor, *, directly: bool = False) -> str | None:
        """Return the operation after scores that was not followed on the way to a tensor.

        Args:
            x: What a softmax is taken of.
            directly: Whether to look for scores only that no further product lies behind, as one
                lies behind those of linear attention whose result goes into a router.
        """
        if not self._known:
            return None
        first = min(self._known)
        pending, visited = [x.grad_fn], set()
        for node in pending:
            if node is None or (directly and operation(node.name()) in PRODUCTS):
                continue
            for before, _ in node.next_functions:
                number = -1 if before is None else before._sequence_nr()
                if number in visited or number < first:
                    continue
                visited.add(number)
                if number not in self._known:
                    pending.append(before)
                elif self._known[number][0].products:
                    return operation(node.name())
        return None


def operation(name: str) -> str:
    """Return ``masked_fill`` for ``MaskedFillBackward0``, and the names of other nodes."""
    if name.endswith(_SCRIPTED):
        return "a torch.jit.script function"
    match = re.fullmatch(r"(\w+)Backward\d+", name)
    if match is None:
        return name
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", match[1]).lower()
    return "pad" if words == "constant_pad_nd" else words


def _runs_elementwise_scripts(layer: nn.Module) -> bool:
    known = _scripts_are_elementwise.get(layer)
    if known is None:
        scripts = scripts_of(layer)
        known = bool(scripts) and all(is_elementwise(script.inlined_graph) for script in scripts)
        _scripts_are_elementwise[layer] = known
    return known


def _is_elementwise_node(name: str) -> bool:
    # A user's autograd.Function named Tanh has no number.
    return re.fullmatch(r"\w+Backward\d+", name) is not None and operation(name) in _ELEMENTWISE


def is_elementwise(graph: Any) -> bool:
    """Return whether a TorchScript graph computes each entry of its result from one of its input.

    Args:
        graph: A ``torch.Graph``, such as ``function.inlined_graph``.

    Example:
        >>> unit = torch.jit.CompilationUnit("def cap(x):\\n return 2 * (x / 2).tanh()\\n")
        >>> is_elementwise(unit.cap.inlined_graph)
        True
    """
    kinds = [node.kind().partition("::") for node in graph.nodes()]
    return all(
        kind == ("prim", "::", "Constant")
        or (kind[0] == "aten" and kind[2].rstrip("_") in _ELEMENTWISE)
        for kind in kinds
    )
