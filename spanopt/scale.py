"""Scales: the factors that a user gives for each layer, and the checks of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from spanopt.patterns import matching

__all__ = ["Factor", "ScaleLike", "SpanScale", "resolve_scales"]

Factor: TypeAlias = float | tuple[float, ...]
"""One factor for all heads, or one per head."""

_SIDES = ("query", "key")


@dataclass(frozen=True)
class SpanScale:
    """Factors for the parallel part and the violation of one attention layer's gradients.

    The gradient g of Q becomes ``parallel * P g + violation * (g - P g)``. Here P is the projector
    onto the column space of Q. For the gradient of K, it is the projector onto the column space
    of K.

    Args:
        parallel: Factor of the parallel part: a finite number, or a sequence with one number per
            head. The query side has the query heads. Under grouped-query attention the key side
            has the key/value heads.
        violation: Factor of the violation: a finite number, or a sequence with one per head.
        query: ``(parallel, violation)`` for the query side, in place of the two above.
        key: ``(parallel, violation)`` for the key side, in place of the two above.

    Raises:
        TypeError: A factor that is not a number or a sequence of numbers, or a side that is not a
            pair.
        ValueError: A factor that is not finite, an empty sequence, or two sequences on one side
            that differ in length.

    Note:
        The defaults are 1, which leaves the gradient as it is. The reason is this project's own
        study, ``docs/evidence.md``: it found no scales that train better than none. With (2, 1),
        the scale that the source describes, it trained a small language model at tuned learning
        rates. The validation loss changed by +1.00 % (95 % interval +0.35 to +1.65) against plain
        training.

    Example:
        >>> SpanScale(parallel=2.0, violation=1.0)
        SpanScale(parallel=2.0, violation=1.0, query=None, key=None)
        >>> SpanScale(2.0, 1.0, key=(1.0, 1.0)).side("key")  # scales queries only
        (1.0, 1.0)
    """

    parallel: float | Sequence[float] = 1.0
    violation: float | Sequence[float] = 1.0
    query: tuple[float | Sequence[float], float | Sequence[float]] | None = None
    key: tuple[float | Sequence[float], float | Sequence[float]] | None = None

    def __post_init__(self) -> None:
        for name in ("parallel", "violation"):
            object.__setattr__(self, name, _factor(name, getattr(self, name)))
        for name in _SIDES:
            object.__setattr__(self, name, _pair(name, getattr(self, name)))
        for side in _SIDES:
            counts = [len(factor) for factor in self.side(side) if isinstance(factor, tuple)]
            if len(set(counts)) > 1:
                raise ValueError(
                    f"{side} side: parallel has {counts[0]} per-head values and violation has "
                    f"{counts[1]}; give one number, or as many as there are heads"
                )

    def side(self, side: str) -> tuple[Factor, Factor]:
        """Return ``(parallel, violation)`` for one side.

        Args:
            side: ``"query"`` or ``"key"``.

        Returns:
            The factors that apply to that side.

        Example:
            >>> SpanScale(3.0, query=(2.0, 0.5)).side("query")
            (2.0, 0.5)
        """
        if side not in _SIDES:
            raise ValueError(f"a side is 'query' or 'key', got {side!r}")
        pair: Any = getattr(self, side) or (self.parallel, self.violation)
        return pair

    @classmethod
    def of(cls, value: ScaleLike) -> SpanScale:
        """Return the scale that a value of the scales dict stands for.

        Args:
            value: A ``SpanScale``, a mapping of its fields, or a ``(parallel, violation)`` pair.

        Returns:
            The scale.

        Raises:
            TypeError: Anything else, or a mapping with an unknown field.
            ValueError: A factor that is not finite, or an empty sequence.

        Example:
            >>> SpanScale.of((2.0, 0.5)) == SpanScale.of({"parallel": 2.0, "violation": 0.5})
            True
        """
        if isinstance(value, SpanScale):
            return value
        if isinstance(value, Mapping):
            unknown = [str(field) for field in value if field not in cls.__dataclass_fields__]
            if unknown:
                raise TypeError(
                    f"unknown field {', '.join(unknown)} in a scale; "
                    f"the fields are {', '.join(cls.__dataclass_fields__)}"
                )
            return cls(**value)
        if _is_sequence(value) and len(value) == 2:
            return cls(*value)
        raise TypeError(
            "a scale is a SpanScale, a dict of its fields, a (parallel, violation) pair or None, "
            f"got {value!r}"
        )

    def fields(self) -> dict[str, Any]:
        """Return the four fields as a dict of numbers, tuples and ``None``.

        Returns:
            A dict from which :meth:`of` makes an equal scale.

        Example:
            >>> SpanScale([2.0, 3.0]).fields()
            {'parallel': (2.0, 3.0), 'violation': 1.0, 'query': None, 'key': None}
        """
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


ScaleLike: TypeAlias = (
    SpanScale | Mapping[str, Any] | tuple[float | Sequence[float], float | Sequence[float]]
)
"""What a value of the scales dict may be, besides ``None``."""


def resolve_scales(
    scales: Mapping[str, ScaleLike | None] | ScaleLike | None, names: Sequence[str]
) -> dict[str, SpanScale | None]:
    """Give each attention layer its scale.

    Keys are exact layer names, shell-style patterns (``*``, ``?``, ``[...]``; ``*`` also matches
    dots) or ``"*"`` for all. An exact name beats a pattern. Among patterns, the last match in the
    dict wins. A layer is left alone if no key matches it or if its value is ``None``.

    Args:
        scales: A dict by layer name or pattern, or one :class:`SpanScale` or
            ``(parallel, violation)`` pair for all layers. ``None`` gives all layers the default
            scale, which changes nothing.
        names: The names of the model's attention layers.

    Returns:
        The scale of each layer by name; ``None`` for a layer that is left alone.

    Raises:
        TypeError: A value or key of another type.
        ValueError: An empty dict, a key that matches no layer, or a scale that is not finite.

    Example:
        >>> resolved = resolve_scales({"*": (2.0, 1.0), "dec.*": None}, ["enc.0", "dec.0"])
        >>> resolved["enc.0"], resolved["dec.0"]
        (SpanScale(parallel=2.0, violation=1.0, query=None, key=None), None)
    """
    if scales is None:
        scales = SpanScale()
    if isinstance(scales, SpanScale) or (_is_sequence(scales) and len(scales) == 2):
        scales = {"*": SpanScale.of(scales)}
    if not isinstance(scales, Mapping):
        raise TypeError(
            "scales must be a dict from layer names to scales, or one scale or (parallel, "
            f"violation) pair for all layers, got {scales!r}"
        )
    if not scales:
        raise ValueError("scales is empty: it would scale no layer; use {'*': SpanScale()} for all")
    resolved: dict[Any, SpanScale | None] = {}
    for key, value in scales.items():
        try:
            resolved[key] = None if value is None else SpanScale.of(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"scales[{key!r}]: {error}") from error
    chosen = matching(resolved, names, "scales")
    return {name: chosen.get(name) for name in names}


def _factor(name: str, value: Any) -> Factor:
    if hasattr(value, "tolist"):  # a NumPy or torch scalar or vector
        value = value.tolist()
    if _is_sequence(value):
        if len(value) == 0:
            raise ValueError(f"{name} is an empty sequence; give one number, or one per head")
        return tuple(_number(name, item) for item in value)
    return _number(name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {value!r}")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be finite, got a number that no float holds") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _pair(name: str, value: Any) -> tuple[Factor, Factor] | None:
    if value is None:
        return None
    if not _is_sequence(value) or len(value) != 2:
        raise TypeError(f"{name} must be a (parallel, violation) pair or None, got {value!r}")
    return (_factor(f"{name} parallel", value[0]), _factor(f"{name} violation", value[1]))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
