"""The same picture for a light and for a dark page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["save_both"]

_DARK_PAGE, _LIGHT_INK, _DIM_INK = "#1e2129", "#e3e6ee", "#b4b9c8"
# By what the file's name ends in, as `#only-dark` on the site and <picture> in the README take it.
SHADES: Mapping[str, Mapping[str, Any]] = {
    "": {"figure.facecolor": "white"},
    "-dark": {
        "figure.facecolor": _DARK_PAGE,
        "axes.facecolor": _DARK_PAGE,
        "legend.facecolor": _DARK_PAGE,
        "legend.edgecolor": _DIM_INK,
        "text.color": _LIGHT_INK,
        "axes.labelcolor": _LIGHT_INK,
        "axes.titlecolor": _LIGHT_INK,
        "axes.edgecolor": _LIGHT_INK,
        "xtick.color": _LIGHT_INK,
        "ytick.color": _LIGHT_INK,
        "grid.color": _DIM_INK,
    },
}


def save_both(draw: Callable[[], Figure], path: Path, *, dpi: int = 130) -> None:
    """Draw a picture twice and write it, for a dark page under a name that ends in ``-dark``.

    Args:
        draw: Draws the picture, with the colours of ``matplotlib.rcParams`` for all but the data.
        path: The file for a light page.
        dpi: Pixels in an inch.
    """
    for ending, style in SHADES.items():
        with matplotlib.rc_context(dict(style)):
            file = path.with_stem(path.stem + ending)
            # Without the version of matplotlib, which would change the file.
            draw().savefig(file, dpi=dpi, metadata={"Software": None})
