"""The softmax of scores: it shows that a product is attention, so its nodes are turned on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spanopt.node import switch_on
from spanopt.taps.masks import Read, transposed
from spanopt.taps.softmax.axes import in_order
from spanopt.taps.softmax.scores import WEIGHTS, Product, Scores, carry, scores_of
from spanopt.taps.tap import Tap
from spanopt.taps.telling import Watched, watch_node

__all__ = ["softmax"]


def softmax(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Take a softmax. If it is over scores, turn on the nodes of their products."""
    tap.site.takes_softmax = True
    scores = scores_of(tap, args[0]) if args else None
    if scores is None:
        may_be = args and _has_multiplied(tap) and tap.streams().may_be_of_scores(args[0])
        if may_be and tap.is_live():
            tap.account.ever_lost = True
            _note_where_lost(tap, args[0])
        return func(*args, **kwargs)
    if not scores.products:
        return carry(tap, func(*args, **kwargs), scores)
    x, *rest = args
    dim = kwargs.get("dim", rest[0] if rest else None)
    axis = dim - x.ndim if isinstance(dim, int) and dim >= 0 else dim
    sides = [group for group in scores.axes[:2] if group == (axis,)]
    if axis is None or not sides:
        tap.site.lost_at = "a softmax that is not over one side's tokens"
        return func(*args, **kwargs)
    for product in scores.products:
        # If softmaxes are taken over both axes, the first one tells which side is the keys.
        if not product.swapped:
            product.swapped.append((sides[0] is scores.axes[0]) != product.turned)
        x, real = _switch_on(tap, x, product, scores.read)
    unfocused = x
    if tap.focus is not None:
        is_left = sides[0] is scores.axes[0]
        of_keys = scores.products[0].left if is_left else scores.products[0].right
        has_others = x.shape[axis] != of_keys.x.shape[-2]
        x = tap.focus.scores(tap, x, axis, scores.axes[is_left], has_others)
    weights = func(x, *rest, **kwargs)
    watcher = tap.watching()
    if watcher is not None:
        of_all = weights if x is unfocused else func(unfocused.detach(), *rest, **kwargs)
        by_query = _by_query(of_all.detach(), scores, sides[0] is scores.axes[0])
        watcher.weights(tap.site.name, by_query, real)
    return carry(tap, weights, WEIGHTS)


def _by_query(weights: Tensor, scores: Scores, keys_are_left: bool) -> Tensor:
    """Return weights as (B, ..., N, M), without queries that were joined to the product's."""
    weights = in_order(weights, scores.axes, weights.shape)
    weights = weights.mT if keys_are_left else weights
    left, right, *_ = scores.products[0]
    query = right if keys_are_left else left
    return weights.narrow(-2, scores.start[1 if keys_are_left else 0], query.x.shape[-2])


def _has_multiplied(tap: Tap) -> bool:
    call = tap.current_call()
    return call is not None and call.multiplied


def _note_where_lost(tap: Tap, x: Tensor) -> None:
    call = tap.current_call()
    if call is not None and not torch.compiler.is_compiling():
        tap.site.lost_at = call.trail.lost_at(x) or tap.site.lost_at
        if call.trail.lost_at(x, directly=True) is not None:
            tap.account.lost = True


def _switch_on(tap: Tap, x: Tensor, product: Product, read: Read) -> tuple[Tensor, Tensor | None]:
    """Turn on the nodes of a product; return its scores and the mask of the real queries."""
    query, key = product.left, product.right
    swapped = product.swapped[0] != product.turned
    if swapped:
        query, key = key, query
        read = transposed(read)
    tap.observe(query.x, key.x, "softmax")
    tokens = tap.tokens(query.x, key.x, read, product.self_attention)
    of_query, of_key = tap.given() or (None, None)
    watcher = tap.watching()
    if swapped and of_query is not of_key and any(side.documents is not None for side in tokens):
        raise ValueError(
            f"layer {tap.site.name!r} multiplies keys by queries, in this order: token_mask can "
            "give it documents only if they are the same for both"
        )
    for side, operand, real in zip(("query", "key"), (query, key), tokens, strict=True):
        if operand.switches is not None:
            rescaling = tap.query if side == "query" else tap.key
            rescaling.check_range(operand.x.dtype, f"layer {tap.site.name!r}, {side} side")
            mask = None if real.mask is None else real.mask.reshape(-1, real.mask.shape[-1])
            x = switch_on(x, *operand.switches, side=side, mask=mask)
            if watcher is not None:
                of_node = tap.site.name, side, operand.x, rescaling, *real, operand.other
                watch_node(watcher, Watched(*of_node), operand.node)
    return x, tokens[0].mask
