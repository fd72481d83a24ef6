"""What the autograd graph tells about tensors on the way from scores to a softmax.

A function mode does not see functions of ``torch.jit.script`` or an ``autograd.Function``. The
autograd graph contains their nodes nevertheless.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from spanopt.traits import scripts_of

__all__ = ["PRODUCTS", "Trail", "is_elementwise", "operation"]

# Functions of one tensor, or of a tensor and a number, by their names in autograd and TorchScript.
# Sums are not among them, since what is added may be a mask.
_ELEMENTWISE = {"mul", "div", "tanh", "neg", "clamp", "abs", "relu", "pow", "sqrt", "sigmoid"}
PRODUCTS = {"mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "dot", "convolution", "linear"}
_SCRIPTED = "DifferentiableGraphBackward"
_scripts_are_elementwise: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class Trail:
    """Where scores are in the autograd graph of one call of a layer.

    Nodes are remembered by their sequence numbers, which keeps nothing alive.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, torch.Size]] = {}
        self._lost: dict[int, str] = {}

    def note(self, x: Tensor, scores: Any) -> None:
        """Note that a tensor is scores."""
        if x.grad_fn is not None:
            self._known[x.grad_fn._sequence_nr()] = scores, x.shape

    def note_lost(self, x: Tensor, operation: str) -> None:
        """Note at which operation a tensor that was scores is no longer followed."""
        if x.grad_fn is not None:
            number = x.grad_fn._sequence_nr()
            self._known.pop(number, None)
            self._lost[number] = operation

    def close(self) -> None:
        """Forget everything."""
        self._known.clear()
        self._lost.clear()

    def through_elementwise(self, x: Tensor, layer: nn.Module) -> Any:
        """Return the scores that a tensor was computed from entry by entry, or ``None``.

        Args:
            x: The result of a function that no mode has seen.
            layer: The layer. A part of the graph that TorchScript made counts as elementwise if
                all TorchScript functions that the layer may run are elementwise.
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
        """Return the operation between scores and a tensor that was not followed, or ``None``.

        Args:
            x: What a softmax is taken of.
            directly: Whether to look only for scores with no further product between them and
                ``x``. Linear attention whose result goes into a router has such a product.
        """
        if not (self._known or self._lost):
            return None
        first = min([*self._known, *self._lost])
        pending, visited = [x.grad_fn], set()
        for node in pending:
            if node is not None and node._sequence_nr() in self._lost:
                return self._lost[node._sequence_nr()]
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
    """Return a node's operation: ``masked_fill`` for ``MaskedFillBackward0``, and so on."""
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
    # The name of a user's autograd.Function, such as TanhBackward, ends in no number.
    return re.fullmatch(r"\w+Backward\d+", name) is not None and operation(name) in _ELEMENTWISE


def is_elementwise(graph: Any) -> bool:
    """Return whether a TorchScript graph computes each result entry from one input entry.

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
