"""Score tap: layers that call ``torch.nn.functional.scaled_dot_product_attention``.

The tap sees the Q and K of the score product: after rotary embedding, QK-norm and the split into
heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from spanopt.declarations import Declaration, declare
from spanopt.taps.mode import keeping
from spanopt.taps.once import read_once
from spanopt.taps.sides import other_sides, put_node, put_nodes
from spanopt.taps.tap import Tap

__all__ = ["HANDLERS", "nodes_on"]


def _scaled_dot_product_attention(
    tap: Tap,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    place = tap.place()
    if place.inside:
        tap.observe(query, key, "score")
        _check_groups(tap, query, key, kwargs.get("enable_gqa", False))
        if tap.projects(query, key):
            seen = () if attn_mask is None else read_once(attn_mask, query.ndim)
            same = query.shape[-2] == key.shape[-2]
            same = same and bool(seen) and tap.is_self_attention(query, key)
            queries, keys = tap.tokens(query, key, seen, same)
            others = other_sides(tap.rescaling.setup, tap.site.name, query, key)
            watcher, layer = tap.watching(), tap.site.name
            if watcher is not None:
                watcher.scores(layer, query, key, queries.mask, attn_mask, *args, **kwargs)
            with keeping(place):
                query, key = put_nodes(
                    (tap.query, tap.key),
                    (query, key),
                    layer,
                    (queries, keys),
                    others,
                    watcher,
                    changed=func is _operands,
                )
        else:
            query = put_node(tap.query, query, tap.site.name, "query")
            key = put_node(tap.key, key, tap.site.name, "key")
        if tap.focus is not None:
            return tap.focus.attention(tap, func, query, key, value, attn_mask, *args, **kwargs)
    return func(query, key, value, attn_mask, *args, **kwargs)


def _check_groups(tap: Tap, query: Tensor, key: Tensor, enable_gqa: bool) -> None:
    heads, kv_heads = (x.shape[-3] if x.ndim > 3 else 1 for x in (query, key))
    if heads == kv_heads or 1 in (heads, kv_heads) or (enable_gqa and heads % kv_heads == 0):
        return
    raise ValueError(
        f"layer {tap.site.name!r}: the query has {heads} heads and the key {kv_heads}: query "
        f"{tuple(query.shape)}, key {tuple(key.shape)}; grouped-query attention needs "
        "enable_gqa=True and a multiple of the key heads, or keys repeated for each query head"
    )


def nodes_on(tap: Tap, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the query and key of an attention call without a mask, with nodes on them.

    Args:
        tap: The layer's tap.
        query: Shape ``(B, H, N, d)``.
        key: Shape ``(B, H', M, d)``.
    """
    pair: tuple[Tensor, Tensor] = _scaled_dot_product_attention(
        tap, _operands, query, key, key, enable_gqa=True
    )
    return pair


def _operands(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return query, key


HANDLERS = {"scaled_dot_product_attention": _scaled_dot_product_attention}
declare(
    Declaration(
        "score",
        "in the call of scaled_dot_product_attention",
        HANDLERS,
        {"scaled_dot_product_attention": F.scaled_dot_product_attention},
        dtensors=True,
    )
)
