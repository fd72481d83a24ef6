"""The text table of what is installed on a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from spanopt.declarations import declared
from spanopt.groups import SpanGroup
from spanopt.sites import AttentionSite

__all__ = ["aligned", "collapsed", "described", "table"]

_UNKNOWN = "not known before a forward pass"


def table(sites: Iterable[AttentionSite], groups: Iterable[SpanGroup]) -> str:
    """Return a table of a model's attention layers and scales; equal layers share a line.

    Args:
        sites: The attention layers.
        groups: The scales of those that are scaled.

    Returns:
        A text table with layer, class, tap, heads, head dimension and scales. The line under it
        says what each tap is.

    Example:
        >>> from torch import nn
        >>> import spanopt
        >>> hooks = spanopt.attach(nn.TransformerEncoderLayer(8, nhead=2), spanopt.SpanScale(2.0))
        >>> print(table(hooks.sites, hooks.groups))
        layer      class               tap     heads  head dim  query (par, vio)  key (par, vio)
        self_attn  MultiheadAttention  packed  2      4         2.0, 1.0          2.0, 1.0
        tap: where Q and K are reached. packed: in nn.MultiheadAttention
    """
    scale_of = {group["name"]: group.scale for group in groups}
    head = ("layer", "class", "tap", "heads", "head dim", "query (par, vio)", "key (par, vio)")
    rows: list[Sequence[str]] = []
    for site in sites:
        scales = ["left alone", "left alone"]
        if site.name in scale_of:
            scale = scale_of[site.name]
            scales = [", ".join(map(str, scale.side(side))) for side in ("query", "key")]
        rows.append((*described(site), *scales))
    where = {one.name: one.where for one in declared.values()} | {"?": _UNKNOWN}
    taps = [f"{tap}: {text}" for tap, text in where.items() if any(row[2] == tap for row in rows)]
    legend = f"tap: where Q and K are reached. {'; '.join(taps)}"
    return "\n".join((aligned([head, *collapsed(rows)]), *([legend] if taps else [])))


def described(layer: Any) -> tuple[str, ...]:
    """Return name, class, tap, heads and head dimension of a layer, as cells of a table.

    Args:
        layer: An :class:`~spanopt.sites.AttentionSite`, or an object with the same fields.

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


def collapsed(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Join rows that are equal but for one number in the name, which goes up by one.

    Args:
        rows: Rows of cells. The first cell is the name of a layer.

    Returns:
        The rows. Each run of three or more such rows is one row, at the place of the first.

    Example:
        >>> collapsed([("layers.0", "a"), ("layers.1", "a"), ("layers.2", "a"), ("head", "a")])
        [('layers.0 to layers.2', 'a'), ('head', 'a')]
    """
    runs: list[list[Sequence[str]]] = []
    for row in rows:
        run = next((run for run in runs if _continues(run, row)), None)
        if run is None:
            runs.append([row])
        else:
            run.append(row)
    collapsed_rows: list[tuple[str, ...]] = []
    for run in runs:
        if len(run) < 3:
            collapsed_rows += map(tuple, run)
        else:
            collapsed_rows.append((f"{run[0][0]} to {run[-1][0]}", *run[0][1:]))
    return collapsed_rows


def _continues(run: Sequence[Sequence[str]], row: Sequence[str]) -> bool:
    """Return whether a row is the next one of a run of rows."""
    if run[-1][1:] != row[1:]:
        return False
    place = _step(run[-1][0], row[0])
    return place is not None and (len(run) < 2 or place == _step(run[-2][0], run[-1][0]))


def _step(name: str, following: str) -> int | None:
    """Return the place of the only number that differs, if it goes up by one; else ``None``."""
    parts, others = (re.split(r"(\d+)", text) for text in (name, following))
    if len(parts) != len(others):
        return None
    places = [i for i, pair in enumerate(zip(parts, others, strict=True)) if pair[0] != pair[1]]
    if len(places) != 1 or places[0] % 2 == 0:
        return None
    return places[0] if int(others[places[0]]) == int(parts[places[0]]) + 1 else None


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
