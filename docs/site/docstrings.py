"""Turn the roles of the docstrings into Markdown links, for the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Replace roles such as ``:func:`~spanopt.project``` and double backticks."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            text = _ROLE.sub(_link, obj.docstring.value)
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"``(.+?)``", r"`\1`", text)


def _link(role: re.Match[str]) -> str:
    """Return the Markdown for a role: its last name if it begins with a tilde, else all of it."""
    target = role[2]
    return f"`{target.rsplit('.', 1)[-1] if role[1] else target}`"
