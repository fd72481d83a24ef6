"""What taps tell watchers, the objects that measure. :class:`spanopt.SpanMonitor` has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from spanopt.rescaling import Rescaling
from spanopt.shards import is_spread

__all__ = ["Watched", "Watcher", "Watchers", "watch_node"]


class Watched(NamedTuple):
    """Q or K of an attention call.

    Attributes:
        layer: Name of the layer.
        side: ``"query"`` or ``"key"``.
        x: Its values, shape ``(..., H, N, d)``.
        rescaling: How its gradient is rescaled.
        mask: Boolean, broadcastable to ``(..., H, N)``, true at real tokens; ``None`` if all are.
        documents: Integers, shape ``(B, N)``: the number of the document that a token is of; tokens
            below 0 are padding. ``None`` where a sequence is one document.
        other: The other side, shape ``(..., H, M, d)``, where the projection needs it.
    """

    layer: str
    side: str
    x: Tensor
    rescaling: Rescaling
    mask: Tensor | None = None
    documents: Tensor | None = None
    other: Tensor | None = None


class Watcher(Protocol):
    """An object that is told of the attention calls of a step. Its methods raise nothing."""

    def gradients(self, watched: Watched, given: Tensor, rescaled: Tensor) -> None:
        """Take note of a gradient before and after rescaling; both shaped like ``watched.x``."""
        ...

    def scores(
        self,
        layer: str,
        query: Tensor,
        key: Tensor,
        real: Tensor | None,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Take note of an attention call whose weights are not seen.

        The last five arguments are those of ``torch.nn.functional.scaled_dot_product_attention``.

        Args:
            layer: Name of the layer.
            query: Shape ``(..., H, N, d)``.
            key: Shape ``(..., H', M, d)``.
            real: True at real queries, broadcastable to ``(..., H, N)``.
            mask: The ``attn_mask`` of the call.
            dropout_p: Probability of dropout.
            is_causal: Whether a query sees no later key.
            scale: What the scores are multiplied by; ``None`` for 1 / sqrt(d).
            enable_gqa: Whether several query heads share a key head.
        """
        ...

    def weights(self, layer: str, weights: Tensor, real: Tensor | None) -> None:
        """Take note of attention weights, shape ``(..., H, N, M)``, and of the real queries."""
        ...

    def failed(self, layer: str, side: str | None, reason: str) -> None:
        """Take note that one side, or the attention weights, could not be measured, and why."""
        ...

    def ran(self, layer: str) -> None:
        """Take note, at the end of a step, that the layer's attention ran in it."""
        ...


class Watchers:
    """Passes on what it is told to several watchers.

    Args:
        watchers: The watchers.
    """

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self.watchers: tuple[Watcher, ...] = tuple(watchers)

    def gradients(self, *args: Any, **kwargs: Any) -> None:
        """Pass on :meth:`Watcher.gradients`."""
        for watcher in self.watchers:
            watcher.gradients(*args, **kwargs)

    def scores(self, *args: Any, **kwargs: Any) -> None:
        """Pass on :meth:`Watcher.scores`."""
        for watcher in self.watchers:
            watcher.scores(*args, **kwargs)

    def weights(self, *args: Any, **kwargs: Any) -> None:
        """Pass on :meth:`Watcher.weights`."""
        for watcher in self.watchers:
            watcher.weights(*args, **kwargs)

    def failed(self, *args: Any, **kwargs: Any) -> None:
        """Pass on :meth:`Watcher.failed`."""
        for watcher in self.watchers:
            watcher.failed(*args, **kwargs)

    def ran(self, *args: Any, **kwargs: Any) -> None:
        """Pass on :meth:`Watcher.ran`."""
        for watcher in self.watchers:
            watcher.ran(*args, **kwargs)


def watch_node(watcher: Watcher, watched: Watched, node: Tensor, at: int = 0) -> None:
    """Arrange for a watcher to be told of the gradients that pass a node.

    Args:
        watcher: The watcher.
        watched: The Q or K that the node is on.
        node: The tensor with the node on it. In a hook on its ``grad_fn``, an output has the given
            gradient, and the input at the same place has the rescaled one.
        at: That place.
    """
    if is_spread(node):
        reason = "it is a DTensor, spread over processes, which is not measured"
        watcher.failed(watched.layer, watched.side, reason)
        return
    watched = watched._replace(x=watched.x.detach())

    def note(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> Any:
        rescaled, given = inputs[at], outputs[at]
        if rescaled is not None and given is not None:
            watcher.gradients(watched, given, rescaled)

    assert node.grad_fn is not None
    node.grad_fn.register_hook(note)
