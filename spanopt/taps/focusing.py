"""What taps ask of focus: which keys a layer's queries keep. Focus changes the forward pass."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Focusing", "focusing_of"]


class Focusing(Protocol):
    """The focus of one layer: :mod:`spanopt.focus` implements this.

    The tap first reads the masks and puts the nodes on Q and K. Then it asks this object instead of
    making the attention call itself.
    """

    def acts(self, tap: Any, args: Any, kwargs: Any) -> bool:
        """Return whether a call with these arguments must be watched even without gradients."""
        ...

    def reach(self, tap: Any) -> None:
        """Note that the layer's attention is seen."""
        ...

    def signature(self, tap: Any) -> tuple[Any, ...]:
        """Return everything that compiled code depends on, as numbers and text."""
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
        """Return the scores to take the softmax of. Axes are counted from the end."""
        ...

    def unseen(self, tap: Any, reason: str) -> RuntimeError:
        """Return the error about a layer whose scores are not seen."""
        ...


focusing_of: weakref.WeakKeyDictionary[nn.Module, Focusing] = weakref.WeakKeyDictionary()
"""The focus of each layer that has one. A tap that is made later finds its layer's focus here."""
