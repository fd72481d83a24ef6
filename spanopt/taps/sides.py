"""Putting the nodes on Q and K, with their tokens, the other side and the watcher."""

from __future__ import annotations

import torch
from torch import Tensor

from spanopt.node import rescaling_node
from spanopt.pair import can_be_paired, pair_node
from spanopt.rescaling import Rescaling
from spanopt.setups import Setup
from spanopt.taps.real import Tokens
from spanopt.taps.telling import Watched, Watcher, watch_node

__all__ = ["other_sides", "put_node", "put_nodes"]


def put_nodes(
    rescalings: tuple[Rescaling, Rescaling],
    pair: tuple[Tensor, Tensor],
    layer: str,
    tokens: tuple[Tokens, Tokens],
    others: tuple[Tensor | None, Tensor | None],
    watcher: Watcher | None,
    *,
    changed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Put nodes on Q and K of an attention call: one node on both where that saves time.

    Args:
        rescalings: How the gradients of Q and of K are rescaled.
        pair: Q ``(..., H, N, d)`` and K ``(..., H', M, d)``.
        layer: Name of the layer.
        tokens: The real tokens of Q and of K.
        others: K for the query and Q for the key, where the setup needs them.
        watcher: The watcher to tell of the gradients, if there is one.
        changed: Whether the results may be changed in place. Then each side gets its own node.

    Returns:
        A view of Q and one of K, or a side itself where there is nothing to do.

    Raises:
        ValueError: A factor is not finite in the dtype of Q or K.
    """
    (query, key), (of_query, of_key), (queries, keys) = pair, rescalings, tokens
    by_document = queries.documents is not None or keys.documents is not None
    apart = changed or by_document or not torch.is_grad_enabled()
    if apart or not can_be_paired(query, key, of_query, of_key):
        return (
            put_node(of_query, query, layer, "query", queries, others[0], watcher),
            put_node(of_key, key, layer, "key", keys, others[1], watcher),
        )
    sides = ("query", query, of_query, queries), ("key", key, of_key, keys)
    for side, x, rescaling, _ in sides:
        rescaling.check_range(x.dtype, f"layer {layer!r}, {side} side")
    nodes = pair_node(query, key, of_query, of_key, masks=(queries.mask, keys.mask))
    if watcher is not None:
        for at, (side, x, rescaling, real) in enumerate(sides):
            watch_node(watcher, Watched(layer, side, x, rescaling, *real), nodes[at], at)
    return nodes


def put_node(
    rescaling: Rescaling,
    x: Tensor,
    layer: str,
    side: str,
    tokens: Tokens = Tokens(),  # noqa: B008
    other: Tensor | None = None,
    watcher: Watcher | None = None,
) -> Tensor:
    """Put the node on Q or K.

    Args:
        rescaling: How the gradient of ``x`` is rescaled.
        x: Q or K, shape ``(..., H, N, d)``.
        layer: Name of the layer.
        side: ``"query"`` or ``"key"``.
        tokens: The real tokens of ``x``.
        other: The other side, where the setup needs it.
        watcher: The watcher to tell of the gradients, if there is one.

    Returns:
        A view of ``x``, or ``x`` itself where there is nothing to do.

    Raises:
        ValueError: A factor is not finite in the dtype of ``x``.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    if rescaling.mode == "identity" and watcher is None:
        return x
    rescaling.check_range(x.dtype, f"layer {layer!r}, {side} side")
    node = rescaling_node(x, rescaling, mask=tokens.mask, documents=tokens.documents, other=other)
    if watcher is not None:
        watch_node(watcher, Watched(layer, side, x, rescaling, *tokens, other), node)
    return node


def other_sides(
    setup: Setup, layer: str, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the other side for the query's node and for the key's, where the setup needs it.

    Args:
        setup: The projection setup.
        layer: Name of the layer, for the error.
        query: Shape ``(..., H, N, d)``.
        key: Shape ``(..., H', M, d)``.

    Raises:
        ValueError: The setup cannot be used with these shapes.
    """
    if not setup.needs_other:
        return None, None
    heads, kv_heads = (x.shape[-3] if x.ndim > 3 else 1 for x in (query, key))
    unequal = query.shape[-2] != key.shape[-2] and setup.equal_lengths
    if heads != kv_heads or unequal:
        raise ValueError(
            f"layer {layer!r}: the projection {setup.name!r} needs as many heads"
            f"{' and tokens' if unequal else ''} on both sides, got queries {tuple(query.shape)} "
            f"and keys {tuple(key.shape)}; give this layer projection='span'"
        )
    return key.detach(), query.detach()
