"""Import the object that ``package.module:name`` names on a command line."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["Refused", "imported", "one_line"]


class Refused(ValueError):
    """An argument of a command names nothing that can be used."""


def imported(path: str, kind: str) -> Any:
    """Import and return the object that ``package.module:name`` names.

    Args:
        path: The module's full name and the object's, with a colon between them. The current
            folder counts as a place of modules.
        kind: What the object is to be, in one word, for the message about a wrong form.

    Raises:
        Refused: The path is of another form, its module raises, or there is no such object.

    Example:
        >>> imported("torch.optim:AdamW", "optimizer").__name__
        'AdamW'
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise Refused(f"{path!r} is not of the form package.module:{kind}")
    if module_name.endswith(".py"):
        module = Path(module_name).stem
        raise Refused(f"{module_name!r} is a file: name the module, as in {module}:{attribute}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise Refused(f"cannot import {module_name!r}: {one_line(error)}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, vars(found), n=3)
            names = f"; did you mean {' or '.join(near)}?" if near else ""
            raise Refused(f"cannot import {path!r}: no attribute {name!r}{names}")
        found = getattr(found, name)
    return found


def one_line(error: BaseException) -> str:
    """Return the kind and the first line of an error.

    Example:
        >>> one_line(ValueError("first\\nsecond"))
        'ValueError: first'
    """
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
