"""The text table of what is installed on a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from spanopt.scale import SpanGroup
from spanopt.sites import AttentionSite

__all__ = ["aligned", "described", "table"]


def table(sites: Iterable[AttentionSite], groups: Iterable[SpanGroup]) -> str:
    """Describe the attention layers of a model and their scales, a line per layer.

    Args:
        sites: The attention layers.
        groups: The scales of those that are scaled.

    Returns:
        A text table: layer, class, tap, heads, head dimension, scales.

    Example:
        >>> from torch import nn
        >>> import spanopt
        >>> hooks = spanopt.attach(nn.TransformerEncoderLayer(8, nhead=2), spanopt.SpanScale(2.0))
        >>> print(table(hooks.sites, hooks.groups))
        layer      class               tap     heads  head dim  query (par, vio)  key (par, vio)
        self_attn  MultiheadAttention  packed  2      4         2.0, 1.0          2.0, 1.0
    """
    scale_of = {group["name"]: group.scale for group in groups}
    rows: list[Sequence[str]] = [
        ("layer", "class", "tap", "heads", "head dim", "query (par, vio)", "key (par, vio)")
    ]
    for site in sites:
        scales = ["left alone", "left alone"]
        if site.name in scale_of:
            scale = scale_of[site.name]
            scales = [", ".join(map(str, scale.side(side))) for side in ("query", "key")]
        rows.append((*described(site), *scales))
    return aligned(rows)


def described(layer: Any) -> tuple[str, ...]:
    """Return name, class, tap, heads and head dimension of a layer, as cells of a table.

    Args:
        layer: An :class:`~spanopt.sites.AttentionSite`, or what has its fields.

    Example:
        >>> from torch import nn
        >>> from spanopt import find_attention
        >>> described(find_attention(nn.TransformerEncoderLayer(8, nhead=2))[0])
        ('self_attn', 'MultiheadAttention', 'packed', '2', '4')
    """
    heads = "?" if layer.heads is None else str(layer.heads)
    if layer.kv_heads != layer.heads:
        heads += f"/{layer.kv_heads}"
    head_dim = "?" if layer.head_dim is None else str(layer.head_dim)
    return layer.name or '""', layer.class_name, layer.tap or "?", heads, head_dim


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text with their columns aligned.

    Example:
        >>> print(aligned([("a", "b"), ("long", "c")]))
        a     b
        long  c
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
