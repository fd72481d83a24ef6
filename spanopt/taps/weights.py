"""Noticing that a layer was used past the hooks, by the gradients that reach its own weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spanopt.taps.running import roots_of_backward
from spanopt.taps.unseen import SEEN, unscaled_weights

__all__ = ["OwnWeights"]


class OwnWeights:
    """The weights that make a layer's Q and K, watched in case no module's call shows their use.

    A hook on one of the weights is called when a backward pass has its gradient. If not all of it
    came from calls that were seen, the graph of the backward pass is searched. The search is for
    attention over these weights without a node. It does not find attention in compiled code or in
    kernels.

    Args:
        parameters: The weights. No other layer has them.
        needed: Whether no module's call is known to show that they are used. If one is known, they
            are watched for the first step only, unless :meth:`note_call` is called.

    Attributes:
        found: A backward pass went through attention over these weights that was not seen.
        unsure: Attention was seen that looks unseen in the autograd graph, for example because all
            scales are 1 and it has no nodes. Then unseen attention is not looked for.
    """

    def __init__(self, parameters: Sequence[nn.Parameter] = (), needed: bool = False) -> None:
        self.found: bool = False
        self.unsure: bool = False
        # Matrices first: a bias may be there and not be used.
        self._parameters = sorted(parameters, key=lambda parameter: parameter.ndim < 2)
        self._needed = needed
        self._watched: nn.Parameter | None = None
        self._handle: Any = None
        self._alias: tuple[Tensor, int, int] | None = None
        self._aliased = False
        self._delivered: dict[int, Tensor] = {}

    def watch(self) -> nn.Parameter | None:
        """Put the hook on the first weight that is trained, and return it."""
        if self._watched is not None and self._watched.requires_grad:
            return self._watched
        trained = (p for p in self._parameters if p.requires_grad and p.is_leaf)
        weight = next(trained, None)
        if weight is not None:
            self.remove()
            self._watched, self._handle = weight, weight.register_hook(_Arrival(self))
        return weight

    def remove(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
        self._watched = self._handle = None

    def let_go(self) -> None:
        """Take the hook off, unless only the weights tell that the layer is used."""
        if not self._needed:
            self.remove()

    def forget(self) -> None:
        """Forget what came from calls that were seen, for example after an optimizer step."""
        self.found = self.unsure = False
        self._alias = None
        self._delivered.clear()
        self.let_go()

    def stand_in(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of an attention call, with a view in place of the watched weight.

        The gradient that reaches the weight through the view comes from a call that was seen.
        """
        weight = self.watch()
        if weight is None or not torch.is_grad_enabled():
            return args, kwargs
        if not any(x is weight for x in (*args, *kwargs.values())):
            return args, kwargs
        alias = self._view_of(weight)
        self._aliased = True
        return (
            tuple(alias if x is weight else x for x in args),
            {name: alias if x is weight else x for name, x in kwargs.items()},
        )

    def _view_of(self, weight: nn.Parameter) -> Tensor:
        """Return one view for all calls until the weight changes. One node gets its gradient."""
        state = weight._version, weight.untyped_storage()._cdata
        if self._alias is not None and self._alias[1:] == state:
            return self._alias[0]
        alias = weight.view_as(weight)
        node: Any = alias.grad_fn
        node.metadata[SEEN] = True
        node.register_hook(_Delivery(self._delivered))
        # A view that holds no values, as under a FakeTensorMode, must not be kept.
        if type(alias) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(alias):
            self._alias = alias, *state
        return alias

    def note_call(self, nodes: Sequence[Any], inputs: Sequence[Any]) -> None:
        """Note a call of the layer in which attention was seen.

        Args:
            nodes: The autograd nodes of what the call returned.
            inputs: The autograd nodes of its inputs.
        """
        self._needed = True
        self.watch()
        if not self._aliased and self._is_among(unscaled_weights(nodes, inputs)):
            self.unsure = True  # a call past the hooks would look the same
        self._aliased = False

    def _is_among(self, weights: frozenset[int]) -> bool:
        return any(id(parameter) in weights for parameter in self._parameters)

    def arrived(self, gradient: Tensor) -> None:
        """Note the gradient that a backward pass has for the watched weight."""
        if torch.compiler.is_compiling():
            return
        task = torch._C._current_graph_task_id()
        if self._delivered.pop(task, None) is gradient:
            return
        if not (self.found or self.unsure):
            self.found = self._is_among(_unscaled_in(task))


class _Arrival:
    """A hook on a parameter; it is not copied or pickled with the parameter."""

    __torch_unserializable__ = True

    def __init__(self, weights: OwnWeights) -> None:
        self.weights = weights

    def __call__(self, gradient: Tensor) -> None:
        self.weights.arrived(gradient)


class _Delivery:
    """A hook on the node of a view: it keeps the gradient until that has reached the weight."""

    def __init__(self, delivered: dict[int, Tensor]) -> None:
        self.delivered = delivered

    def __call__(self, inputs: tuple[Tensor | None, ...], outputs: Any) -> None:
        if inputs[0] is not None:
            self.delivered[torch._C._current_graph_task_id()] = inputs[0]


_last: tuple[int, frozenset[int]] = -1, frozenset()


def _unscaled_in(task: int) -> frozenset[int]:
    """Return the weights of unscaled attention in a backward pass. Its graph is searched once."""
    global _last
    last = _last
    if last[0] != task:
        last = _last = task, unscaled_weights(roots_of_backward())
    return last[1]
