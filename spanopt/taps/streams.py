"""From which of a layer's inputs a tensor was computed: tells self-attention from cross-attention.

In self-attention a padded key is also a padded query, in cross-attention it is not, and the
attention call looks the same for both, also in its shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spanopt.taps.notes import Notes

__all__ = ["Streams"]


class Streams:
    """The inputs of one call of one layer, and what is computed from them.

    Args:
        arguments: What the layer was called with.
    """

    def __init__(self, arguments: Any) -> None:
        floats = [x for x in _tensors_in(arguments) if x.is_floating_point()]
        # Angles, temperatures and the like are of one side only at times, and have no gradient.
        self._inputs = [x for x in floats if x.requires_grad] or floats
        self._notes: Notes[int] = Notes()

    def of(self, x: Tensor) -> int:
        """Return the inputs that a tensor was computed from, a bit for each."""
        for bit, stream in enumerate(self._inputs):
            if x is stream:
                return 1 << bit
        return self._notes.of(x) or 0

    def are_one(self, x: Tensor, y: Tensor) -> bool:
        """Return whether two tensors were computed from the same inputs."""
        bits = (self.of(x), self.of(y))
        # Dynamo shows no properties, such as the transpose k.mT: with one input it is of that.
        if torch.compiler.is_compiling() and len(self._inputs) == 1:
            bits = (bits[0] or bits[1], bits[1] or bits[0])
        return bits[0] != 0 and bits[0] == bits[1]

    def follow(self, result: Any, args: Any, kwargs: Any) -> None:
        """Note what the result of a call was computed from."""
        bits = 0
        for x in _tensors_in((args, kwargs)):
            bits |= self.of(x)
        if not bits:
            return
        # Without a result it is an assignment to a part of the first argument.
        for x in _tensors_in(args[:1] if result is None else result):
            if not any(x is stream for stream in self._inputs):
                self._notes[x] = bits

    def close(self) -> None:
        """Take what was noted off the tensors."""
        self._notes.close()


def _tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [x for item in value for x in _tensors_in(item)]
    return []
