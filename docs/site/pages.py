"""Formulas become MathML, pictures follow the shade of the page, links stay inside the site."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)

_EXAMPLE = re.compile(r"\]\(\.\./examples/(\w+)\.py\)")
_PICTURE = re.compile(r"(!\[[^\]]*\])\(((?:\.\./)?)([\w-]+)\.png\)")
_SOURCE = re.compile(r"\[([^\]]+)\]\(\.\./(?:benchmarks|tests|spanopt)/[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with links into the repository that hold on the site too."""
    markdown = _PICTURE.sub(_both_shades, markdown)
    return _SOURCE.sub(r"`\1`", _EXAMPLE.sub(r"](examples/\1.md)", markdown))


def _both_shades(picture: re.Match[str]) -> str:
    """Return a picture twice, for a light and a dark page, if there is a dark one."""
    alt, folder, name = picture.groups()
    if not (Path(__file__).parents[1] / f"{name}-dark.png").exists():
        return picture[0]
    return f"{alt}({folder}{name}.png#only-light)\n{alt}({folder}{name}-dark.png#only-dark)"


def on_page_content(content: str, **_: Any) -> str:
    """Return the page's HTML with each formula as MathML."""
    content = _INLINE.sub(lambda found: convert(html.unescape(found[1])), content)
    return _BLOCK.sub(lambda found: convert(html.unescape(found[1]), display="block"), content)
