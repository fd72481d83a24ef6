"""Finding calls of a layer that no tap saw, by the module that projects its queries.

A module hook does not run when the layer's ``forward`` is called directly, and a call may reach a
kernel that no tap sees into. Both still call the module that projects the queries. Where the
gradient comes back through its output, it has gone around the nodes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spanopt.taps.module_hooks import Hook

__all__ = ["Projected"]


class Projected(Hook):
    """A forward hook on the module that projects a layer's queries."""

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        """Watch the gradient of the output until it is known that a tap saw its attention."""
        # Compiled code is told apart from other code by what it was traced in, not by its calls.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not isinstance(result, Tensor) or result.grad_fn is None:
            return
        call = self.tap.current_call()
        if call is None:
            self.tap.watch_for_miss(result.grad_fn)
        else:
            call.projected.append(result.grad_fn)
