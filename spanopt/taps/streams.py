"""What a tensor in a layer was computed from.

This tells self-attention from cross-attention. In self-attention a padded key is also a padded
query; in cross-attention it is not. The attention call can look the same for both, shapes included.
This also tells a mask from a tensor that was computed from the scores, and a key from a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spanopt.taps.notes import Notes

__all__ = ["Streams"]

_OF_SCORES = 1  # the lowest bit; each input of the layer has one of the higher bits

# Functions that take only the shape or the type from the arguments after the first.
_SHAPED_AS = frozenset({"expand_as", "view_as", "reshape_as", "type_as", "to", "broadcast_to"})
# Products: the result of a constant and a parameter no longer counts as that parameter.
_PRODUCTS = frozenset(
    {"linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum"}
    | {"addmm", "baddbmm", "tensordot", "conv1d", "conv2d", "conv3d"}
)
_SEVERAL = "parameters"
# Functions that take only the shape or the type from any of their arguments.
_NEW = frozenset(
    f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
) | frozenset({"new", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"})

_NESTED = (tuple, list, dict)
_WITHOUT_TENSORS = (int, float, str, torch.Size, torch.dtype, torch.device)


class Streams:
    """The inputs of one call of one layer, and what is computed from them.

    Args:
        arguments: What the layer was called with.
    """

    def __init__(self, arguments: Any) -> None:
        self._inputs = [x for x in _arguments(arguments) if x.is_floating_point()]
        # Inputs without a gradient, such as angles or temperatures, may be used on one side only.
        # They do not count as streams if any input has a gradient.
        trained = [x.requires_grad for x in self._inputs]
        every = not any(trained)
        # A tensor's note is the bits of the inputs that it was computed from. If it was computed
        # from parameters alone, the note is that parameter, or _SEVERAL.
        self._notes: Notes[int | nn.Parameter | str] = Notes()
        self._streams = 0
        bit = _OF_SCORES
        for x, requires_grad in zip(self._inputs, trained, strict=True):
            bit <<= 1
            if every or requires_grad:
                self._streams |= bit
            if not torch.compiler.is_dynamo_compiling():
                self._notes.add(x, bit)

    def input_nodes(self) -> list[Any]:
        """Return the inputs' nodes in the autograd graph."""
        return [x.grad_fn for x in self._inputs if x.grad_fn is not None]

    def of(self, x: Tensor) -> int:
        """Return which inputs a tensor was computed from: one bit for each input."""
        return self._bits(x) & self._streams

    def _bits(self, x: Tensor) -> int:
        # Traced code does not read the notes of eager code, so it compares with the inputs.
        if torch.compiler.is_dynamo_compiling():
            bit = self._input_bit(x)
            if bit:
                return bit
        note = self._notes.of(x)
        return note if isinstance(note, int) else 0

    def _input_bit(self, x: Tensor) -> int:
        bit = _OF_SCORES
        for stream in self._inputs:
            bit <<= 1
            if x is stream:
                return bit
        return 0

    def knows(self, x: Tensor) -> bool:
        """Return whether it is known what a tensor was computed from."""
        return bool(self._bits(x))

    def is_of_scores(self, x: Tensor) -> bool:
        """Return whether a tensor is, or was computed from, a product of activations."""
        return bool(self._bits(x) & _OF_SCORES)

    def may_be_of_scores(self, x: Any) -> bool:
        """Return whether a tensor may have been computed from a product of activations."""
        return isinstance(x, Tensor) and (self.is_of_scores(x) or not self._bits(x))

    def note_scores(self, x: Tensor) -> None:
        """Note that a tensor is a product of activations."""
        self._notes[x] = self._bits(x) | _OF_SCORES

    def is_weight(self, x: Tensor) -> bool:
        """Return whether a tensor is one parameter, or was computed from one, as by a cast."""
        return isinstance(self._made_of(x), nn.Parameter)

    def _made_of(self, x: Tensor) -> nn.Parameter | str | None:
        """Return the parameter (or ``_SEVERAL``) that alone made a tensor; otherwise ``None``."""
        if isinstance(x, nn.Parameter):
            return x
        note = self._notes.of(x)
        return None if isinstance(note, int) else note

    def are_one(self, x: Tensor, y: Tensor) -> bool:
        """Return whether two tensors were computed from the same inputs."""
        bits = [self._stream(x), self._stream(y)]
        if not any(bits):  # neither tensor was computed from a stream
            bits = [self._bits(x) & ~_OF_SCORES, self._bits(y) & ~_OF_SCORES]
        return bits[0] != 0 and bits[0] == bits[1]

    def _stream(self, x: Tensor) -> int:
        # Some functions are not seen: an autograd.Function, or in compiled code a property such
        # as k.mT. If the layer has one input, the result was computed from that input.
        if len(self._inputs) == 1 and x.requires_grad and not self._bits(x):
            return 0 if self._made_of(x) is not None else self._streams
        return self.of(x)

    def follow(self, name: str, result: Any, args: Any, kwargs: Any) -> None:
        """Note what the result of a call of a function of this name was computed from."""
        if name in _NEW or (type(result) is not Tensor and isinstance(result, _WITHOUT_TENSORS)):
            return
        given = args
        if name in _SHAPED_AS:
            given = args[:1]
        elif kwargs:
            given = (*args, *kwargs.values())
        traced = torch.compiler.is_dynamo_compiling()
        bits = self._traced_bits_in(given) if traced else self._bits_in(given)
        if not bits:
            self._follow_parameters(name, result, _tensors_in(given))
            return
        # A call without a result is an assignment to a part of the first argument.
        changed = args[:1] if result is None else result
        for x in (result,) if type(result) is Tensor else _tensors_in(changed):
            # Most results are new. Inputs and scores stay what they are.
            if (traced or not self._notes.add(x, bits)) and self._input_bit(x) == 0:
                self._notes[x] = bits | (self._bits(x) & _OF_SCORES)

    def _traced_bits_in(self, values: Any) -> int:
        """Return the bits of all tensors in nested tuples, lists and dicts, in traced code."""
        bits = 0
        for x in _tensors_in(values):
            bits |= self._bits(x)
        return bits

    def _bits_in(self, values: Iterable[Any]) -> int:
        """Return the bits of all tensors in nested tuples, lists and dicts, in eager code."""
        bits = 0
        noted = self._notes.noted
        for x in values:  # this runs for every function that a layer calls
            known = noted.get(id(x))
            if known is not None:
                if type(known[1]) is int and known[0]() is x:
                    bits |= known[1]
            elif isinstance(x, _NESTED):
                bits |= self._bits_in(x.values() if isinstance(x, dict) else x)
        return bits

    def _follow_parameters(self, name: str, result: Any, given: list[Tensor]) -> None:
        constants = [x for x in given if not x.requires_grad and self._made_of(x) is None]
        made = [self._made_of(x) for x in given if not any(x is other for other in constants)]
        if not made or any(of is None for of in made):
            return
        # A scale, a mask or noise leaves a weight that weight. Indices would make it a lookup.
        kept = all(x.is_floating_point() or x.dtype == torch.bool for x in constants)
        if any(of is not made[0] for of in made) or not kept or (constants and name in _PRODUCTS):
            made[0] = _SEVERAL
        for x in _tensors_in(result):
            self._notes[x] = made[0]  # type: ignore[assignment]

    def close(self) -> None:
        """Forget what was noted."""
        self._notes.close()


def _arguments(value: Any) -> list[Tensor]:
    """Return the tensors that a layer was called with, also those in objects such as a batch."""
    found: list[Tensor] = []
    for x in value:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, _NESTED):
            found += _arguments(list(x.values()) if isinstance(x, dict) else x)
        elif hasattr(x, "__dict__") and not isinstance(x, (nn.Module, type)):
            found += _tensors_in(list(vars(x).values()))
    return found


def _tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    found: list[Tensor] = []
    if isinstance(value, (tuple, list)):
        for item in value:  # written out for speed: every function of a layer comes here
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, _NESTED):
                found += _tensors_in(item)
    return found
