"""Arguments that have another name now: the old name is refused by a message with the new one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["renamed"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def renamed(**names: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Have a function refuse old names of its arguments.

    Args:
        **names: The new name of each old one.

    Returns:
        A decorator. What it decorates raises a ``TypeError`` for an old name.

    Example:
        >>> @renamed(colour="color")
        ... def paint(color): ...
        >>> paint(colour="red")
        Traceback (most recent call last):
        ...
        TypeError: paint() has no argument 'colour'; its name is now color
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            for old, new in names.items():
                if old in kwargs:
                    raise TypeError(
                        f"{function.__qualname__}() has no argument {old!r}; its name is now {new}"
                    )
            return function(*args, **kwargs)

        return call

    return decorate
