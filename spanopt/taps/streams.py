"""From which of a layer's inputs a tensor was computed: tells self-attention from cross-attention.

In self-attention a padded key is also a padded query, in cross-attention it is not, and the
attention call looks the same for both, also in its shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Streams", "tensors_in"]

_TAG = "_spanopt_streams"


class Streams:
    """The inputs of one call of one layer, and what is computed from them.

    Args:
        inputs: Floating-point inputs.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs
        # Dynamo sets no attributes on tensors that come in a tuple; compiled code keeps no list.
        self._traced: list[tuple[Tensor, int]] = []

    def of(self, x: Tensor) -> int:
        """Return the inputs that a tensor was computed from, a bit for each."""
        for bit, stream in enumerate(self.inputs):
            if x is stream:
                return 1 << bit
        if torch.compiler.is_compiling():
            for other, bits in self._traced:
                if x is other:
                    return bits
            return 0
        tag = getattr(x, _TAG, None)
        return tag.bits if tag is not None and tag.streams is self else 0

    def follow(self, result: Any, args: Any, kwargs: Any) -> None:
        """Note what the result of a call was computed from."""
        bits = 0
        for x in tensors_in((args, kwargs)):
            bits |= self.of(x)
        if not bits:
            return
        for x in tensors_in(result):
            if any(x is stream for stream in self.inputs):
                continue
            if torch.compiler.is_compiling():
                self._traced.insert(0, (x, bits))
            else:
                setattr(x, _TAG, _Tag(self, bits))


class _Tag:
    """Kept as an attribute of a tensor; a copy or pickle of the tensor has none of it."""

    def __init__(self, streams: Streams, bits: int) -> None:
        self.streams = streams
        self.bits = bits

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, ()


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts.

    Example:
        >>> import torch
        >>> len(tensors_in((torch.ones(1), {"mask": [torch.ones(2), None]})))
        2
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [x for item in value for x in tensors_in(item)]
    return []
