"""What taps ask of semantic focus: which keys a layer's queries keep. It changes the forward."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Focusing", "focusing_of"]


class Focusing(Protocol):
    """Focus on one layer, as :mod:`spanopt.focus` has it.

    A tap asks it in place of making the attention call, after it has read the masks and put the
    nodes on Q and K.
    """

    def acts(self, tap: Any, args: Any, kwargs: Any) -> bool:
        """Return whether the layer, called with this, may have to be watched without gradients."""
        ...

    def reach(self, tap: Any) -> None:
        """Note that the layer's attention is seen."""
        ...

    def signature(self, tap: Any) -> tuple[Any, ...]:
        """Return all that compiled code depends on, as numbers and text."""
        ...

    def attention(self, tap: Any, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the result of a call of ``scaled_dot_product_attention``."""
        ...

    def scores(
        self,
        tap: Any,
        x: Tensor,
        key_axis: int,
        query_axes: tuple[int, ...],
        has_others: bool = False,
    ) -> Tensor:
        """Return scores for their softmax; axes are counted from the end."""
        ...

    def unseen(self, tap: Any, reason: str) -> RuntimeError:
        """Return the error about a layer whose scores are not seen."""
        ...


focusing_of: weakref.WeakKeyDictionary[nn.Module, Focusing] = weakref.WeakKeyDictionary()
"""The focus on layers. A tap that is made later takes its layer's from here."""
