"""The picture of a monitor's rows: one column, by layer and step."""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from typing import Any

from spanopt.figures import new_figure
from spanopt.measures import MEASURES

__all__ = ["draw"]

_LABELS = {
    "parallel_energy": "energy of the parallel part",
    "violation_energy": "energy of the violation",
    "parallel_share": "parallel share",
    "chance_share": "parallel share by chance",
    "effective_rank": "effective rank",
    "condition": "condition number",
    "cosine": "cosine",
    "norm_before": "norm before scaling",
    "norm_after": "norm after scaling",
    "entropy": "attention entropy (nats)",
    "dispersion": "dispersion of the scores",
    "top_dispersion": "dispersion of the k largest scores",
    "separation": "separation of the k-th score and the next",
    "unchosen": "share of keys among the k largest of no query",
    "popular": "share of queries that choose the most popular key",
    "sink_ratio": "sink ratio",
    "jacobian": "largest eigenvalue of the softmax's Jacobian",
    "lambda_w": "condition on weights, met below 1",
    "lambda_x": "condition on inputs, met below 1",
}
_TITLES = {
    "parallel_share": "Share of the gradient's energy that is in the parallel span",
    "cosine": "Cosine between the gradient before and after scaling",
}
_LOGARITHMIC = {"parallel_energy", "violation_energy", "condition", "norm_before", "norm_after"}
_SHARES = {"parallel_share", "chance_share", "unchosen", "popular"}


def draw(rows: list[dict[str, Any]], column: str) -> Any:
    """Draw a column of a monitor's rows: for each side a heatmap, and a line for each layer.

    Args:
        rows: From :attr:`spanopt.SpanMonitor.rows`.
        column: One of :data:`spanopt.measures.MEASURES` or
            :data:`spanopt.scores.SCORE_MEASURES`.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No row has a value in this column, or there is no such column.
    """
    if column not in _LABELS:
        raise ValueError(
            f"no column is named {column!r}; the columns are {', '.join(_LABELS)}. To save the "
            "picture, pass path="
        )
    means = _means(rows, column)
    if not means:
        advice = "" if column in MEASURES else ": give SpanMonitor scores=True"
        raise ValueError(f"no row has a value of {column}{advice}")
    matplotlib = _matplotlib()
    sides = [side for side in ("query", "key") if side in means]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    steps = sorted({row["step"] for row in rows})
    height = 1.6 + len(sides) * max(1.8, 0.16 * len(layers))
    figure = new_figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(len(sides), 2, squeeze=False, width_ratios=(1.15, 1))
    chances = {row["chance_share"] for row in rows if row["head"] is not None}
    chance = chances.pop() if len(chances) == 1 and column == "parallel_share" else None
    limits = _limits(means, column)
    for (heatmap, lines), side in zip(axes, sides, strict=True):
        table = [[means[side].get((layer, step), math.nan) for step in steps] for layer in layers]
        image = _heatmap(heatmap, table, layers, steps, _norm(limits, column))
        heatmap.set_title(f"{side}, by layer")
        figure.colorbar(image, ax=heatmap, label=_LABELS[column])
        _lines(lines, table, layers, steps, matplotlib)
        if chance is not None:
            ink = matplotlib.rcParams["axes.edgecolor"]
            lines.axhline(chance, color=ink, linestyle=":", label="by chance")
        lines.set(title=f"{side}, mean over heads", ylabel=_LABELS[column])
        if column in _LOGARITHMIC:
            lines.set_yscale("log")
        else:
            lines.set_ylim(limits)
        if len(layers) <= 8:
            lines.legend(fontsize="small")
    figure.suptitle(_TITLES.get(column, _LABELS[column].capitalize()))
    return figure


def _means(rows: list[dict[str, Any]], column: str) -> dict[str, dict[tuple[str, int], float]]:
    """Return the mean over heads by side, layer and step; those without a value are left out."""
    heads: dict[str, dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.get(column) is not None:
            heads[row["side"]][row["layer"], row["step"]].append(row[column])
    return {
        side: {place: math.fsum(values) / len(values) for place, values in of_side.items()}
        for side, of_side in heads.items()
    }


def _limits(means: dict[str, dict[tuple[str, int], float]], column: str) -> tuple[float, float]:
    """Return the least and the largest value on the axes, which are the same for both sides."""
    values = [value for of_side in means.values() for value in of_side.values()]
    low, high = min(values), max(values)
    if column in _SHARES:
        return 0.0, min(1.0, 1.2 * high)
    if column in _LOGARITHMIC:
        positive = [value for value in values if value > 0]
        low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
        return low / 1.2, high * 1.2
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
    return low - margin, high + margin


def _norm(limits: tuple[float, float], column: str) -> Any:
    colors = importlib.import_module("matplotlib.colors")
    kind = colors.LogNorm if column in _LOGARITHMIC else colors.Normalize
    return kind(*limits)


def _heatmap(axes: Any, table: list[list[float]], layers: Any, steps: Any, norm: Any) -> Any:
    """Draw a heatmap of layers by steps, and return the image."""
    image = axes.imshow(table, aspect="auto", origin="lower", interpolation="nearest", norm=norm)
    places = range(0, len(steps), max(1, len(steps) // 6))
    axes.set_xticks(places, [str(steps[i]) for i in places])
    named = range(0, len(layers), max(1, len(layers) // 12))
    axes.set_yticks(named, [layers[i] or "(model)" for i in named])
    axes.set_xlabel("optimizer step")
    return image


def _lines(axes: Any, table: list[list[float]], layers: Any, steps: Any, matplotlib: Any) -> None:
    """Draw a line for each layer, in colours that stand out from the background."""
    colours, colors = matplotlib.colormaps["plasma"], importlib.import_module("matplotlib.colors")
    is_dark = sum(colors.to_rgb(matplotlib.rcParams["axes.facecolor"])) < 1.5
    first, last = (0.3, 1.0) if is_dark else (0.0, 0.85)
    for i, (layer, values) in enumerate(zip(layers, table, strict=True)):
        colour = colours(first + (last - first) * i / max(1, len(layers) - 1))
        axes.plot(steps, values, marker=".", color=colour, label=layer or "(model)")
    axes.set_xlabel("optimizer step")


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            "SpanMonitor.plot() needs matplotlib: pip install matplotlib, or install spanopt with "
            "its extra: pip install '.[monitor]' in a clone"
        ) from error
