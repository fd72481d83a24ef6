"""The measures of scores in words: in which layers attention to fewer keys could pay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["reading_of"]


def reading_of(rows: Sequence[Mapping[str, Any]], keys: int) -> str:
    """Say in which layers focus could pay, from the last step that was measured.

    It could pay in a layer that meets both conditions of the paper: the means over heads of
    ``lambda_w`` and of ``lambda_x`` are below 1. These conditions suffice for a better bound. They
    promise no gain.

    Args:
        rows: From :attr:`spanopt.SpanMonitor.rows`.
        keys: How many keys focus would keep.

    Returns:
        A sentence or two.

    Raises:
        ValueError: No row has these measures.

    Example:
        >>> row = {"step": 0, "head": 0, "lambda_w": 0.9, "lambda_x": 0.8}
        >>> reading_of([row | {"layer": "0.attn"}, row | {"layer": "1.attn", "lambda_w": 2.0}], 8)
        'step 0: focus on 8 keys could pay in layer 0.attn (lambda_w and lambda_x are below 1); ...'
    """
    known = [row for row in rows if row.get("lambda_w") is not None]
    if not known:
        raise ValueError(
            "no scores have been measured: give SpanMonitor scores=True and take a step, with "
            f"sequences of more than {keys} keys"
        )
    step = max(row["step"] for row in known)
    values: dict[str, list[tuple[float, float]]] = {}
    for row in known:
        if row["step"] == step:
            pair = row["lambda_w"], row["lambda_x"]
            values.setdefault(row["layer"] or "(model)", []).append(pair)
    means = {
        layer: [math.fsum(column) / len(column) for column in zip(*pairs, strict=True)]
        for layer, pairs in values.items()
    }
    could = [layer for layer, both in means.items() if max(both) < 1]
    not_so = [layer for layer in means if layer not in could]
    start = f"step {step}: focus on {keys} keys"
    if not could:
        return f"{start} is not known to pay in any layer: lambda_w or lambda_x is 1 or more in all"
    sentence = f"{start} could pay in {_named(could)} (lambda_w and lambda_x are below 1)"
    return f"{sentence}; not in {_named(not_so)}" if not_so else sentence


def _named(layers: Sequence[str]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {', '.join(layers[:-1])} and {layers[-1]}"
