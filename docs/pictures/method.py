"""Draw what the method does to one gradient: docs/method.png.

Token space is drawn with three tokens, so that the span of a Q with two features is a plane. The
gradient, its parts and the rescaled gradient are computed by the library.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, Polygon

from spanopt import decompose, rescale

BLUE, ORANGE, GREEN, BLACK = "#0072b2", "#d55e00", "#009e73", "#222222"
# Where the axes of the three tokens point on the page.
PAGE = np.array([[0.92, -0.28], [0.62, 0.42], [0.0, 1.0]])


def draw(path: Path) -> None:
    """Draw the picture into a file."""
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.12, 0.1]], dtype=torch.float64)
    g = torch.tensor([[0.75, 0.0], [0.35, 0.0], [0.85, 0.0]], dtype=torch.float64)
    parallel, _ = decompose(g, q)
    rescaled = rescale(g, q, parallel=2.0, violation=1.0)
    points = {
        name: x[:, 0].numpy() @ PAGE
        for name, x in {"g": g, "parallel": parallel, "rescaled": rescaled}.items()
    }
    origin = np.zeros(2)
    figure, axes = plt.subplots(figsize=(6.4, 3.5))
    a, b = (q[:, i].numpy() @ PAGE for i in (0, 1))
    low, high = -0.25, 1.9
    corners = [low * a + low * b, high * a + low * b, high * a + 1.25 * b, low * a + 1.25 * b]
    axes.add_patch(Polygon(corners, facecolor=BLUE, alpha=0.12, edgecolor=BLUE, linewidth=0.8))
    axes.annotate(
        "the span: all that the columns of Q add up to",
        corners[1],
        (-14, 22),
        textcoords="offset points",
        color=BLUE,
        ha="right",
        fontsize=9,
    )

    def arrow(start: np.ndarray, end: np.ndarray, colour: str, style: str = "-") -> None:
        axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                mutation_scale=15,
                color=colour,
                linewidth=2,
                linestyle=style,
                shrinkA=0,
                shrinkB=0,
            )
        )

    arrow(origin, points["rescaled"], GREEN)
    arrow(origin, points["g"], BLACK)
    arrow(origin, points["parallel"], BLUE)
    arrow(points["parallel"], points["g"], ORANGE, (0, (4, 2)))
    double = 2 * points["parallel"]
    axes.plot(*zip(points["parallel"], double, strict=True), color=BLUE, linewidth=1, linestyle=":")
    axes.plot(*zip(double, points["rescaled"], strict=True), color=ORANGE, lw=1, linestyle=":")
    for text, place, offset, colour in (
        ("gradient g", points["g"], (-8, 6), BLACK),
        ("parallel part P g", points["parallel"] * 0.8, (4, -14), BLUE),
        ("violation g - P g", 0.75 * points["parallel"] + 0.25 * points["g"], (8, 0), ORANGE),
        ("g' with scales (2, 1)", points["rescaled"], (-10, 8), GREEN),
    ):
        axes.annotate(text, place, offset, textcoords="offset points", color=colour, fontsize=10)
    axes.set_aspect("equal")
    axes.autoscale_view()
    axes.margins(0.08)
    axes.axis("off")
    figure.tight_layout(pad=0.1)
    figure.savefig(path, dpi=160, facecolor="white")


if __name__ == "__main__":
    draw(Path(__file__).parents[1] / "method.png")
