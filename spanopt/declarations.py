"""The ways to reach Q and K, as each tap declares itself: what the rest of the library reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Declaration", "declare", "declared", "names", "withdraw"]


@dataclass(frozen=True)
class Declaration:
    """One way to reach Q and K.

    Attributes:
        name: What tables call it.
        where: Where Q and K are reached, in words that follow the name.
        handlers: ``handler(tap, func, *args, **kwargs)`` by the names of functions. A handler makes
            the call for the layer.
        functions: Attention functions. A layer whose own code calls one of them is an attention
            layer.
        dtensors: Whether Q and K may be DTensors, which are spread over processes.
    """

    name: str
    where: str
    handlers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    functions: Mapping[str, Any] = field(default_factory=dict)
    dtensors: bool = False


declared: dict[str, Declaration] = {}
"""The declarations by name."""


def declare(declaration: Declaration) -> Declaration:
    """Make a way to reach Q and K known.

    Args:
        declaration: The way.

    Returns:
        The same.

    Raises:
        ValueError: Its name, or the name of a function that it handles, is taken.
    """
    taken = {name for other in declared.values() for name in other.handlers}
    clash = sorted(taken & set(declaration.handlers))
    if declaration.name in declared or clash:
        raise ValueError(
            f"the tap {declaration.name!r} can't be declared: "
            f"{f'functions named {clash} are handled' if clash else 'its name is taken'} already"
        )
    declared[declaration.name] = declaration
    return declaration


def withdraw(name: str) -> None:
    """Take a declaration back.

    Args:
        name: Its name; one that is not declared is passed over.
    """
    declared.pop(name, None)


def names() -> list[str]:
    """Return the names of all attention functions that are declared."""
    return [name for one in declared.values() for name in one.functions]
