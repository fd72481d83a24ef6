"""A forward pass that shows what only a forward pass can tell, and restores the model's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["run_once"]


def run_once(model: nn.Module, example_inputs: Any) -> None:
    """Run a model forward with gradients on, then restore the random state and the buffers.

    Args:
        model: The model.
        example_inputs: A tuple of positional arguments, a dict of keyword arguments, or one
            argument.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> run_once(norm, torch.ones(3, 2))
        >>> norm.num_batches_tracked
        tensor(0)
    """
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    args: tuple[Any, ...] = (example_inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, tuple):
        args = example_inputs
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            model(*args, **kwargs)
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)
