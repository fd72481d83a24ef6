"""Notes on the tensors of one call of a layer."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Notes"]

_T = TypeVar("_T")


class Notes(Generic[_T]):
    """What is known of tensors while a layer runs. It keeps no tensor alive and changes none.

    A note belongs to one tensor object, as long as that lives. Under ``torch.compile`` notes are in
    a list. Dynamo can tell whether two tensors are the same object, but has no ``id`` for them. The
    list costs nothing once the code is compiled.

    Attributes:
        noted: Tensor and note by the tensor's ``id``, in eager code. The tensor may have died, and
            another object may have its ``id`` by now.

    Example:
        >>> notes = Notes()
        >>> x = torch.ones(2)
        >>> notes[x] = "query"
        >>> notes.of(x)
        'query'
        >>> notes.close()
        >>> notes.of(x) is None
        True
    """

    def __init__(self) -> None:
        self.noted: dict[int, tuple[weakref.ref[Tensor], _T]] = {}
        self._traced: list[tuple[Tensor, _T]] = []

    def of(self, x: Any) -> _T | None:
        """Return the note on a tensor, or ``None`` if it has none."""
        if self._traced:
            for other, note in self._traced:
                if x is other:
                    return note
        if torch.compiler.is_dynamo_compiling():  # so that there is no guard on eager notes
            return None
        noted = self.noted.get(id(x))
        return noted[1] if noted is not None and noted[0]() is x else None

    def items(self) -> list[tuple[Tensor, _T]]:
        """Return the tensors that live, each with its note. The newest are first when traced."""
        if torch.compiler.is_dynamo_compiling():
            return list(self._traced)
        pairs = [(reference(), note) for reference, note in self.noted.values()]
        return [(x, note) for x, note in pairs if x is not None]

    def is_empty(self) -> bool:
        """Return whether there are no notes."""
        return not self._traced and (torch.compiler.is_dynamo_compiling() or not self.noted)

    def __setitem__(self, x: Tensor, note: _T) -> None:
        if torch.compiler.is_dynamo_compiling():
            self._traced.insert(0, (x, note))
        else:
            self.noted[id(x)] = weakref.ref(x), note

    def add(self, x: Tensor, note: _T) -> bool:
        """Put a note on a tensor that has none, in eager code. Return whether it had none."""
        noted = self.noted.get(id(x))
        if noted is not None and noted[0]() is x:
            return False
        self.noted[id(x)] = weakref.ref(x), note
        return True

    def close(self) -> None:
        """Forget everything."""
        self._traced.clear()
        if not torch.compiler.is_dynamo_compiling():
            self.noted.clear()
