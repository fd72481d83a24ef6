"""Formulas become MathML while the site is built, and links to examples lead to their pages."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


_EXAMPLE = re.compile(r"\]\(\.\./examples/(\w+)\.py\)")
_SOURCE = re.compile(r"\[([^\]]+)\]\(\.\./(?:benchmarks|tests|spanopt)/[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with links into the repository that hold on the site too."""
    return _SOURCE.sub(r"`\1`", _EXAMPLE.sub(r"](examples/\1.md)", markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Return the page's HTML with each formula as MathML."""
    content = _INLINE.sub(lambda found: convert(html.unescape(found[1])), content)
    return _BLOCK.sub(lambda found: convert(html.unescape(found[1]), display="block"), content)
