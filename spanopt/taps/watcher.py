"""What taps tell whoever measures, as :class:`spanopt.SpanMonitor` does."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from spanopt.node import Method
from spanopt.shards import is_spread

__all__ = ["Watched", "Watcher", "watch_node"]


class Watched(NamedTuple):
    """Q or K of an attention call.

    Attributes:
        layer: Name of the layer.
        side: ``"query"`` or ``"key"``.
        x: Its values, shape ``(..., H, N, d)``.
        method: How its gradient is rescaled, beside the factors.
        mask: Boolean, broadcastable to ``(..., H, N)``, true at real tokens.
        documents: As in :func:`~spanopt.projection.rescale_by_document`.
        other: The other side, where the projection needs it.
    """

    layer: str
    side: str
    x: Tensor
    method: Method
    mask: Tensor | None = None
    documents: Tensor | None = None
    other: Tensor | None = None


class Watcher(Protocol):
    """Told of the attention calls of one optimizer step."""

    def gradients(self, watched: Watched, given: Tensor, rescaled: Tensor) -> None:
        """Take note of a gradient before and after, both like ``watched.x``."""
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
        """Take note of an attention whose weights are not seen.

        Args:
            layer: Name of the layer.
            query: Shape ``(..., H, N, d)``.
            key: Shape ``(..., H', M, d)``.
            real: True at real queries, broadcastable to ``(..., H, N)``.
            mask: As ``scaled_dot_product_attention`` takes it.
            dropout_p: Likewise.
            is_causal: Likewise.
            scale: Likewise.
            enable_gqa: Likewise.
        """
        ...

    def weights(self, layer: str, weights: Tensor, real: Tensor | None) -> None:
        """Take note of attention weights, shape ``(..., H, N, M)``, and of the real queries."""
        ...


def watch_node(watcher: Watcher, watched: Watched, node: Tensor) -> None:
    """Have a watcher told of the gradients when they pass a node.

    Args:
        watcher: Who is told.
        watched: What the node is on.
        node: The tensor with the node on it. Its ``grad_fn`` has the gradient given as its first
            output's, and the rescaled one as its first input's.

    Raises:
        TypeError: It is a ``DTensor``.
    """
    if is_spread(node):
        raise TypeError(
            f"layer {watched.layer!r}: the {watched.side} tensor is a DTensor, spread over "
            "processes, which SpanMonitor does not measure: close() the monitor here"
        )
    watched = watched._replace(x=watched.x.detach())

    def note(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> Any:
        if inputs[0] is not None and outputs[0] is not None:
            watcher.gradients(watched, outputs[0], inputs[0])

    assert node.grad_fn is not None
    node.grad_fn.register_hook(note)
