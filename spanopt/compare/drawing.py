"""Tables and pictures of comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spanopt.compare.statistics import Change
from spanopt.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "draw_interval", "forest", "markdown", "save"]

# Paul Tol's "bright" colours, which people with any kind of colour blindness can tell apart.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#AA3377", "#66CCEE", "#8C8C8C")
BETTER, WORSE, UNCLEAR = COLOURS[0], COLOURS[1], COLOURS[6]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_interval(axes: Any, change: Change, y: float, colour: str, label: str = "") -> None:
    """Draw a mean and its interval along a horizontal line."""
    axes.plot([change.low, change.high], [y, y], color=colour, linewidth=2)
    axes.plot(change.mean, y, "o", color=colour, label=label)


def forest(changes: Mapping[str, Change], label: str, *, larger_is_better: bool = False) -> Figure:
    """Draw each arm's change with its interval: blue if clearly better, red if clearly worse.

    Args:
        changes: The changes by arm, from top to bottom.
        label: The label of the axis.
        larger_is_better: Whether a change above 0 is better.
    """
    from matplotlib import rcParams

    figure: Figure = new_figure(figsize=(8, 0.9 + 0.3 * len(changes)), layout="constrained")
    axes = figure.subplots()
    for row, change in enumerate(changes.values()):
        better = change.mean > 0 if larger_is_better else change.mean < 0
        clear = change.low > 0 or change.high < 0
        draw_interval(axes, change, row, (BETTER if better else WORSE) if clear else UNCLEAR)
    axes.axvline(0, color=rcParams["axes.edgecolor"], linewidth=0.8)
    axes.set_yticks(range(len(changes)), [*changes])
    axes.set_ylim(len(changes) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(label)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure, without a date in it."""
    figure.savefig(path, dpi=130, metadata={"Software": None})
