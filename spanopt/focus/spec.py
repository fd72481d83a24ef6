"""How the user says which keys a layer's queries keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["KINDS", "Focus", "KSchedule", "Keeping"]

KINDS = ("top", "window", "block", "strided", "gradient")

KSchedule: TypeAlias = "Callable[[int], float | None]"
"""A function from the number of steps taken to a number of keys, or ``None`` for all."""


@dataclass(frozen=True)
class Keeping:
    """Which keys are kept in one attention call.

    Attributes:
        kind: One of :data:`KINDS`.
        k: How many keys a query keeps beside ``always``, at least 1.
        always: Positions of the keys that every query keeps, in rising order.
    """

    kind: str
    k: int
    always: tuple[int, ...] = ()

    def fitting(self, keys: int) -> Keeping | None:
        """Return what this means for a number of keys; ``None`` if all of them are kept.

        Args:
            keys: The number of keys, including those that are masked.

        Example:
            >>> Keeping("top", 8, (0, 9)).fitting(9)  # 8 and the first one are all
            >>> Keeping("block", 8, (0, 9)).fitting(9)
            Keeping(kind='block', k=8, always=(0,))
        """
        always = self.always
        if always and always[-1] >= keys:
            always = tuple([position for position in always if position < keys])
        beside = 0 if self.kind in ("block", "strided") else len(always)
        return None if self.k >= keys - beside else Keeping(self.kind, self.k, always)


@dataclass(frozen=True)
class Focus:
    """Which keys a layer's queries attend to.

    A query never gets a key that the layer's own masks close. A query attends as it would without
    focus if masks close all keys, or all keys of its window, block or stride.

    Args:
        k: How many keys a query keeps: a whole number of at least 1. ``None`` keeps all, which
            changes nothing. A schedule is a function of the number of optimizer steps taken, such
            as ``spanopt.linear(1000, 64, 8)``. The number that it returns is rounded. See
            :meth:`FocusHooks.step`.
        kind: How the keys are chosen. ``"top"``, the default, keeps the k keys with the largest
            scores, for each query and head. ``"window"`` keeps the k nearest open keys: on both
            sides without a mask, and the last k under a causal mask. ``"block"`` cuts the sequence
            into blocks of k tokens, and a query keeps the keys of its own block. ``"strided"``
            keeps every s-th key, where s is the number of keys divided by k, rounded up. One of
            these keys is at the query's position. ``"gradient"`` does not change the forward pass,
            but only the scores that ``"top"`` would keep get a gradient. Values get their full
            gradient.
        always: Positions of keys that every query keeps beside the k: whole numbers of at least 0,
            none by default. Positions past the end of a sequence are ignored.
        training_only: Whether focus is off while ``layer.training`` is false; false by default.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: ``k`` or a position is too small, or there is no such kind.

    Example:
        >>> Focus(8)
        Focus(k=8, kind='top', always=(), training_only=False)
        >>> Focus(8, "windows")
        Traceback (most recent call last):
        ...
        ValueError: no kind of focus is named 'windows'; the kinds are top, window, block, ...
    """

    k: int | KSchedule | None
    kind: str = "top"
    always: tuple[int, ...] = ()
    training_only: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"no kind of focus is named {self.kind!r}; the kinds are {', '.join(KINDS)}"
            )
        if not callable(self.k):
            _check_k(self.k)
        if not isinstance(self.training_only, bool):
            raise TypeError(f"training_only must be True or False, got {self.training_only!r}")
        try:
            positions: list[Any] = list(self.always)
        except TypeError:
            positions = [None]
        if any(isinstance(x, bool) or not isinstance(x, int) for x in positions):
            raise TypeError(
                "always must be positions of keys, such as always=(0,) or always=range(4), got "
                f"{self.always!r}"
            )
        if any(position < 0 for position in positions):
            raise ValueError(f"always must be positions of at least 0, got {self.always!r}")
        object.__setattr__(self, "always", tuple(sorted({*positions})))

    def at(self, step: int) -> Keeping | None:
        """Return which keys are kept after a number of optimizer steps; ``None`` if all are kept.

        Args:
            step: The number of steps taken.

        Raises:
            TypeError: The schedule returned something that is not a number.
            ValueError: The schedule returned a number that rounds to less than 1.

        Example:
            >>> import spanopt
            >>> focus = Focus(spanopt.linear(10, 64, 8))
            >>> [focus.at(step).k for step in (0, 5, 10, 20)]
            [64, 36, 8, 8]
        """
        k: Any = self.k(step) if callable(self.k) else self.k
        if callable(self.k) and isinstance(k, float):
            k = round(k)
        _check_k(k)
        return None if k is None else Keeping(self.kind, k, self.always)


def _check_k(k: Any) -> None:
    if k is None:
        return
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(
            f"k must be a whole number, None or a function of the step, got {k!r} of type "
            f"{type(k).__name__}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}: a query keeps at least one key")
