"""Filling results into the text of a page."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["filled"]


def filled(template: str, pattern: re.Pattern[str], fill: Callable[[re.Match[str]], str]) -> str:
    """Return a text with every placeholder filled in.

    Args:
        template: The text.
        pattern: What a placeholder looks like, between ``[[`` and ``]]``.
        fill: Returns what takes the place of a placeholder.

    Raises:
        ValueError: Something in ``[[`` does not look like a placeholder.
    """
    page = pattern.sub(fill, template)
    if "[[" in page:
        raise ValueError(f"no placeholder looks like {page[page.index('[[') :][:40]!r}")
    return page
