"""A figure of matplotlib that a notebook shows when a cell ends with it."""

from __future__ import annotations

import importlib
import io
from typing import Any

__all__ = ["new_figure"]


def new_figure(**options: Any) -> Any:
    """Return an empty figure, which no window and no pyplot knows of.

    Args:
        **options: Of ``matplotlib.figure.Figure``.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    base: Any = importlib.import_module("matplotlib.figure").Figure

    class ShownFigure(base):
        """Jupyter shows a plain figure only where pyplot was imported before."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=100)
            return buffer.getvalue()

    ShownFigure.__name__ = ShownFigure.__qualname__ = "Figure"
    return ShownFigure(**options)
