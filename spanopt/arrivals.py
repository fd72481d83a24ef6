"""A record that tells which parameters got a gradient since the last optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["Arrivals"]


class Arrivals:
    """A record of the gradients that parameters had at the last step.

    Example:
        >>> import torch
        >>> parameter = torch.ones(2, requires_grad=True)
        >>> arrivals = Arrivals()
        >>> parameter.sum().backward()
        >>> arrivals.has_come(parameter)
        True
        >>> arrivals.mark([parameter])
        >>> arrivals.has_come(parameter)
        False
    """

    def __init__(self) -> None:
        self._marks: dict[int, tuple[Any, int]] = {}

    def mark(self, parameters: Iterable[Tensor]) -> None:
        """Note the gradients of parameters, after a step.

        Args:
            parameters: The parameters.
        """
        self._marks = {
            id(parameter): (weakref.ref(parameter.grad), parameter.grad._version)
            for parameter in parameters
            if parameter.grad is not None
        }

    def has_come(self, parameter: Tensor) -> bool:
        """Return whether a parameter has a new or changed gradient that is not zero.

        Args:
            parameter: The parameter.

        New means: since the last step. Gradients of zeros don't count, since
        torch.distributed.checkpoint makes some and takes a step to build the optimizer's state.
        Reading the values may wait for the device, but only where an error is likely.
        """
        grad = parameter.grad
        if grad is None:
            return False
        mark, version = self._marks.get(id(parameter), (lambda: None, -1))
        if mark() is grad and version == grad._version:
            return False
        values = grad._values() if grad.is_sparse else grad
        return bool((values != 0).any())
