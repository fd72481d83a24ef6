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
        if self._traced:
            for other, note in self._traced:
                if x is other:
                    return note
        if torch.compiler.is_compiling() or not self._noted:  # traced code makes no guard on notes
            return None
        notes = getattr(x, _ATTRIBUTE, None)
        return None if notes is None else notes.get(id(self))

    def is_empty(self) -> bool:
        """Return whether there is none."""
        return not self._traced and (torch.compiler.is_compiling() or not self._noted)

    def __setitem__(self, x: Tensor, note: _T) -> None:
        if torch.compiler.is_compiling():
            self._traced.insert(0, (x, note))
            return
        notes = getattr(x, _ATTRIBUTE, None)
        if notes is None:
            setattr(x, _ATTRIBUTE, {id(self): note})
        else:
            notes[id(self)] = note
        self._noted.append(weakref.ref(x))

    def close(self) -> None:
        """Take the notes off the tensors that are left."""
        self._traced.clear()
        if torch.compiler.is_dynamo_compiling():
            return
        for reference in self._noted:
            x = reference()
            notes = getattr(x, _ATTRIBUTE, None)
            if x is not None and notes is not None:
                notes.pop(id(self), None)
                if not notes:
                    delattr(x, _ATTRIBUTE)
        self._noted.clear()
