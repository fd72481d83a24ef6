"""Draw the pictures of the method: what a span is, its parts, the scales, and where it happens.

Token space is drawn with three tokens, so that the span of a Q with two features is a plane. The
gradient, its parts and the rescaled gradients are computed by the library.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from harness.shades import save_both  # noqa: E402

from spanopt import decompose, rescale  # noqa: E402
from spanopt.compare.drawing import COLOURS  # noqa: E402

ON_DARK = ("#7fb0e6", "#ff8a99", "#5fcb78")  # lighter shades, for words and lines on a dark page
# Where the axes of the three tokens point on the page.
PAGE = np.array([[0.92, -0.28], [0.62, 0.42], [0.0, 1.0]])
Q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.12, 0.1]], dtype=torch.float64)
G = torch.tensor([[0.75, 0.0], [0.35, 0.0], [0.85, 0.0]], dtype=torch.float64)
PARALLEL = decompose(G, Q)[0]


def colours() -> tuple[str, ...]:
    """Return blue, red and green for the page that is drawn on."""
    return COLOURS[:3] if rcParams["text.color"] == "black" else ON_DARK


def on_page(x: torch.Tensor) -> np.ndarray:
    """Return where a vector of token space ends on the page."""
    return x[:, 0].numpy() @ PAGE


def arrow(axes: Any, start: Any, end: Any, colour: str, style: Any = "-") -> None:
    """Draw an arrow."""
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


def plane(axes: Any, reach: float = 1.9, depth: float = 1.25) -> np.ndarray:
    """Draw the span of Q, and return its corners."""
    a, b = (Q[:, i].numpy() @ PAGE for i in (0, 1))
    low, (blue, *_) = -0.25, colours()
    corners = np.array(
        [low * a + low * b, reach * a + low * b, reach * a + depth * b, low * a + depth * b]
    )
    axes.add_patch(Polygon(corners, facecolor=blue, alpha=0.15, edgecolor="none"))
    axes.add_patch(Polygon(corners, facecolor="none", edgecolor=blue, linewidth=0.8))
    return corners


def note(axes: Any, text: str, at: Any, offset: tuple[int, int], colour: str, **more: Any) -> None:
    """Write a text near a point."""
    axes.annotate(text, at, offset, textcoords="offset points", color=colour, fontsize=11, **more)


def finished(figure: Figure) -> Figure:
    """Take the frames off."""
    for axes in figure.axes:
        axes.set_aspect("equal")
        axes.autoscale_view()
        axes.margins(0.06)
        axes.axis("off")
    return figure


def span() -> Figure:
    """Draw the axes of token space, the columns of Q, and the plane that they span."""
    blue, *_ = colours()
    figure = Figure(figsize=(6.6, 3.6), layout="constrained")
    axes, ink = figure.subplots(), rcParams["text.color"]
    corners = plane(axes, 1.8)
    for i in range(3):
        end = 1.75 * PAGE[i] if i < 2 else 1.1 * PAGE[i]
        axes.plot(*zip((0, 0), end, strict=True), color=ink, linewidth=1, linestyle=":")
        note(axes, f"token {i + 1}", end, (4, -4), ink)
    for i, name in enumerate(("first", "second")):
        column = Q[:, i].numpy() @ PAGE
        arrow(axes, (0, 0), column, blue)
        offset = (-40, -30) if i == 0 else (-6, 10)
        note(axes, f"{name} column of Q", column, offset, blue)
    note(axes, "the span:\nevery mixture of the columns", 0.5 * corners[2], (0, -6), blue)
    return finished(figure)


def parts() -> Figure:
    """Draw a gradient, its parallel part, its violation, and the rescaled gradient."""
    blue, red, green = colours()
    figure = Figure(figsize=(6.6, 3.6), layout="constrained")
    axes, ink, origin = figure.subplots(), rcParams["text.color"], np.zeros(2)
    g, parallel = on_page(G), on_page(PARALLEL)
    rescaled = on_page(rescale(G, Q, parallel=2.0, violation=1.0))
    corners = plane(axes)
    note(axes, "the span of Q", corners[1], (-30, 14), blue, ha="right")
    arrow(axes, origin, rescaled, green)
    arrow(axes, origin, g, ink)
    arrow(axes, origin, parallel, blue)
    arrow(axes, parallel, g, red, (0, (4, 2)))
    axes.plot(*zip(parallel, 2 * parallel, strict=True), color=blue, linewidth=1.2, linestyle=":")
    axes.plot(*zip(2 * parallel, rescaled, strict=True), color=red, linewidth=1.2, linestyle=":")
    note(axes, "gradient g", g, (-8, 6), ink)
    note(axes, "parallel part P g", 0.8 * parallel, (4, -16), blue)
    note(axes, "violation g - P g", 0.75 * parallel + 0.25 * g, (8, 0), red)
    note(axes, "g' with scales (2, 1)", rescaled, (-10, 8), green)
    return finished(figure)


def scales() -> Figure:
    """Draw what five pairs of scales make of one gradient."""
    _, _, green = colours()
    pairs = {
        (2.0, 1.0): "more of the span",
        (1.0, 2.0): "more of the violation",
        (2.0, 2.0): "more of both",
        (1.0, 0.0): "the span alone",
        (0.0, 1.0): "the violation alone",
    }
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    ink = rcParams["text.color"]
    places = figure.subplots(2, 3).flatten()
    for axes, (pair, text) in zip(places, pairs.items(), strict=False):
        plane(axes, 1.7, 1.1)
        arrow(axes, (0, 0), on_page(G), ink)
        end = on_page(rescale(G, Q, parallel=pair[0], violation=pair[1]))
        arrow(axes, (0, 0), end, green)
        axes.set_title(f"({pair[0]:g}, {pair[1]:g}): {text}", fontsize=12)
        axes.plot(*zip(*(2 * on_page(G), (-0.1, -0.2), (1.9, 0)), strict=True), alpha=0)
    places[-1].text(0.5, 0.62, "the gradient g", ha="center", color=ink, fontsize=11)
    places[-1].text(
        0.5, 0.4, "g', which goes on in its place", ha="center", color=green, fontsize=11
    )
    places[-1].set(xlim=(0, 1), ylim=(0, 1))
    return finished(figure)


def flow() -> Figure:
    """Draw the forward pass of attention, and the two places where backward changes."""
    _, red, green = colours()
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes, ink = figure.subplots(), rcParams["text.color"]
    boxes = {
        "x": (0, 1, "input"),
        "wq": (1.5, 2, "W_Q"),
        "wk": (1.5, 0, "W_K"),
        "q": (3.2, 2, "Q"),
        "k": (3.2, 0, "K"),
        "s": (4.9, 1, "scores\nQ Kᵀ"),
        "a": (6.5, 1, "softmax\nand V"),
        "l": (8.1, 1, "loss"),
    }
    for name, (x, y, text) in boxes.items():
        special = name in ("q", "k")
        axes.add_patch(
            FancyBboxPatch(
                (x - 0.45, y - 0.3),
                0.9,
                0.6,
                boxstyle="round,pad=0.03",
                facecolor=rcParams["axes.facecolor"],
                edgecolor=green if special else ink,
                linewidth=2.5 if special else 1.2,
                zorder=3,
            )
        )
        axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=11, zorder=4)
    links = [("x", "wq"), ("x", "wk"), ("wq", "q"), ("wk", "k"), ("q", "s"), ("k", "s")]
    for start, end in [*links, ("s", "a"), ("a", "l")]:
        here, there = np.array(boxes[start][:2]), np.array(boxes[end][:2])
        along = (there - here) / np.linalg.norm(there - here)
        aside = 0.09 * np.array([-along[1], along[0]])
        first, last = here + 0.5 * along + aside, there - 0.5 * along + aside
        arrow(axes, first, last, ink)
        arrow(axes, last - 2 * aside, first - 2 * aside, red, (0, (3, 2)))
    for x, y, text, colour in (
        (4.05, 2.72, "here g becomes g'", green),
        (4.05, -0.78, "and here, with K's own span", green),
        (7.6, 2.2, "forward: as ever", ink),
        (7.6, -0.2, "backward: gradients", red),
    ):
        axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=11)
    axes.set(xlim=(-0.6, 8.9), ylim=(-1, 3))
    return finished(figure)


if __name__ == "__main__":
    for name, draw in {"span": span, "method": parts, "scales": scales, "flow": flow}.items():
        save_both(draw, ROOT / "docs" / f"{name}.png", dpi=150)
