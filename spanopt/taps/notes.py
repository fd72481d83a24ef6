"""Notes on the tensors of one call of a layer."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Notes"]

_T = TypeVar("_T")
_ATTRIBUTE = "_spanopt_notes"


class Notes(Generic[_T]):
    """What is known of tensors while a layer runs; nothing is left on them afterwards.

    A note is an attribute of its tensor, so that it lives as long. Under ``torch.compile`` it is an
    entry of a list: Dynamo sets no attributes on tensors that come in a tuple, hands attributes on
    to the user, and a list costs nothing once the code is compiled.

    Example:
        >>> notes = Notes()
        >>> x = torch.ones(2)
        >>> notes[x] = "query"
        >>> notes.of(x)
        'query'
        >>> notes.close()
        >>> x.__dict__
        {}
    """

    def __init__(self) -> None:
        self._noted: list[weakref.ref[Tensor]] = []
        self._traced: list[tuple[Tensor, Any]] = []

    def of(self, x: Any) -> _T | None:
        """Return the note on a tensor, ``None`` where there is none."""
        for other, note in self._traced:
            if x is other:
                return note
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return None
        return getattr(x, _ATTRIBUTE, {}).get(id(self))

    def __setitem__(self, x: Tensor, note: _T) -> None:
        if torch.compiler.is_compiling():
            self._traced.insert(0, (x, note))
            return
        if not hasattr(x, _ATTRIBUTE):
            setattr(x, _ATTRIBUTE, {})
        getattr(x, _ATTRIBUTE)[id(self)] = note
        self._noted.append(weakref.ref(x))

    def close(self) -> None:
        """Take the notes off the tensors that are left."""
        self._traced.clear()
        if torch.compiler.is_compiling():
            return
        for reference in self._noted:
            x = reference()
            notes = getattr(x, _ATTRIBUTE, None)
            if x is not None and notes is not None:
                notes.pop(id(self), None)
                if not notes:
                    delattr(x, _ATTRIBUTE)
        self._noted.clear()
