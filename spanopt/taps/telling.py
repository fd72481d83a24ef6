"""What taps tell whoever measures, as :class:`spanopt.SpanMonitor` does."""

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
    """Told of the attention calls of one optimizer step. Its methods raise nothing."""

    def gradients(self, watched: Watched, given: Tensor, rescaled: Tensor) -> None:
        """Take note of a gradient before and after, both with the shape of ``watched.x``."""
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

        The last five arguments are those of ``torch.nn.functional.scaled_dot_product_attention``.

        Args:
            layer: Name of the layer.
            query: Shape ``(..., H, N, d)``.
            key: Shape ``(..., H', M, d)``.
            real: True at real queries, broadcastable to ``(..., H, N)``.
            mask: Its ``attn_mask``.
            dropout_p: Probability of dropout.
            is_causal: Whether a query sees no later key.
            scale: Factor of the scores; ``None`` for 1 / sqrt(d).
            enable_gqa: Whether several query heads share a key head.
        """
        ...

    def weights(self, layer: str, weights: Tensor, real: Tensor | None) -> None:
        """Take note of attention weights, shape ``(..., H, N, M)``, and of the real queries."""
        ...

    def failed(self, layer: str, side: str | None, reason: str) -> None:
        """Take note of what could not be measured, of one side or of the attention weights."""
        ...

    def ran(self, layer: str) -> None:
        """Take note, at the end of a step, that the layer's attention ran in it."""
        ...


class Watchers:
    """Several watchers that are told the same.

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


def watch_node(watcher: Watcher, watched: Watched, node: Tensor) -> None:
    """Have a watcher told of the gradients when they pass a node.

    Args:
        watcher: Who is told.
        watched: What the node is on.
        node: The tensor with the node on it. Its ``grad_fn`` has the gradient given as its first
            output's, and the rescaled one as its first input's.
    """
    if is_spread(node):
        reason = "it is a DTensor, spread over processes, which is not measured"
        watcher.failed(watched.layer, watched.side, reason)
        return
    watched = watched._replace(x=watched.x.detach())

    def note(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> Any:
        if inputs[0] is not None and outputs[0] is not None:
            watcher.gradients(watched, outputs[0], inputs[0])

    assert node.grad_fn is not None
    node.grad_fn.register_hook(note)
