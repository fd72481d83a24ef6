"""Scales: what a user asks for, per layer, and how it is checked. No tensors, no modules."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = [
    "Factor",
    "ScaleLike",
    "SpanGroup",
    "SpanScale",
    "entries_of",
    "matching",
    "resolve_scales",
    "scales_of",
]

Factor: TypeAlias = float | tuple[float, ...]
"""One factor for all heads, or one per head."""

_SIDES = ("query", "key")


@dataclass(frozen=True)
class SpanScale:
    """Factors for the parallel span and the span violation of one attention layer's gradients.

    The gradient g of Q becomes ``parallel * P g + violation * (g - P g)``, P the projector onto the
    column space of Q; likewise for K.

    Args:
        parallel: Factor of the parallel span: a finite number, or a sequence of one per head
            (query heads on the query side; under grouped-query attention the key side takes one
            per key/value head).
        violation: Factor of the violation, likewise.
        query: ``(parallel, violation)`` for the query side, in place of the two above.
        key: ``(parallel, violation)`` for the key side, likewise.

    Raises:
        TypeError: A factor that is not a number or a sequence of numbers, or a side that is not a
            pair.
        ValueError: A factor that is not finite, or an empty sequence.

    Note:
        The defaults are 1, which leaves the gradient as it is, because this project's own study,
        ``docs/evidence.md``, found no scales that train better than none: with (2, 1), as the
        source describes it, the validation loss of a small language model at tuned learning rates
        changes by +1.00 % (95 % interval +0.35 to +1.65) against plain training.

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

    def side(self, side: str) -> tuple[Factor, Factor]:
        """Return ``(parallel, violation)`` for one side.

        Args:
            side: ``"query"`` or ``"key"``.

        Returns:
            The factors that apply there.

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
        """Return the scale that a dict value stands for.

        Args:
            value: A ``SpanScale``, a mapping of its fields, or a ``(parallel, violation)`` pair.

        Returns:
            The scale.

        Raises:
            TypeError: Anything else, or a mapping with an unknown field.
            ValueError: As in :class:`SpanScale`.

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
            What :meth:`of` turns back into an equal scale.

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
    scales: Mapping[str, ScaleLike | None] | SpanScale | None, names: Sequence[str]
) -> dict[str, SpanScale | None]:
    """Give each attention layer its scale.

    Keys are exact layer names, shell-style patterns (``*``, ``?``, ``[...]``; ``*`` also matches
    dots) or ``"*"`` for all. An exact name beats a pattern; among patterns the last match in the
    dict wins. A layer that no key matches is left alone, as is one whose value is ``None``.

    Args:
        scales: The dict; one :class:`SpanScale` for all layers; ``None`` for the default scale,
            which changes nothing, on all layers.
        names: The names of the model's attention layers.

    Returns:
        For each name its scale, or ``None`` to leave the layer alone.

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
    if isinstance(scales, SpanScale):
        scales = {"*": scales}
    if not isinstance(scales, Mapping):
        raise TypeError(f"scales must be a dict from layer names to scales, got {scales!r}")
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


def matching(values: Mapping[str, Any], names: Sequence[str], what: str) -> dict[str, Any]:
    """Give layers their values by the rules of :func:`resolve_scales`.

    Args:
        values: By layer name or pattern.
        names: The names of the layers.
        what: What the values are called, for errors.

    Returns:
        The value of each layer that a key matches.

    Raises:
        TypeError: A key that is no string.
        ValueError: A key that matches no layer.

    Example:
        >>> matching({"enc.0": 1, "enc.*": 2}, ["enc.0", "enc.1", "dec.0"], "values")
        {'enc.0': 1, 'enc.1': 2}
    """
    chosen: dict[str, Any] = {}
    exact: set[str] = set()
    for key, value in values.items():
        matches = _matches(key, names, what)
        chosen.update({name: value for name in matches if key == name or name not in exact})
        exact.update(name for name in matches if key == name)
    return chosen


class SpanGroup(dict[str, Any]):
    """The scales of one attention layer, as an editable dict: an entry of ``span_groups``.

    Fields ``name`` (fixed), ``parallel``, ``violation``, ``query`` and ``key``, as in
    :class:`SpanScale`. An assignment is checked at once and takes effect from the next forward pass
    on; a bad one raises and changes nothing.

    Example:
        >>> group = SpanGroup("blocks.0.attn", SpanScale(2.0, 1.0))
        >>> group["parallel"] = 1.5
        >>> group
        {'name': 'blocks.0.attn', 'parallel': 1.5, 'violation': 1.0, 'query': None, 'key': None}
        >>> group["parallel"] = float("nan")
        Traceback (most recent call last):
        ...
        ValueError: blocks.0.attn: parallel must be finite, got nan
    """

    def __init__(
        self, name: str, scale: SpanScale, on_change: Callable[[SpanScale], None] | None = None
    ) -> None:
        super().__init__(name=name, **scale.fields())
        self._on_change = on_change

    @property
    def scale(self) -> SpanScale:
        """The group's fields as a :class:`SpanScale`."""
        return SpanScale.of({field: value for field, value in self.items() if field != "name"})

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Change several fields at once; either all of them change or none.

        Args:
            *args: A mapping of fields, as for ``dict.update``.
            **kwargs: Fields.

        Raises:
            TypeError: An unknown field, or a value that is no scale.
            ValueError: A value that is not finite, another name, or a wrong number of per-head
                values.

        Example:
            >>> group = SpanGroup("attn", SpanScale())
            >>> group.update(parallel=3.0, key=(1.0, 1.0))
            >>> group.scale.side("key")
            (1.0, 1.0)
        """
        changes = dict(*args, **kwargs)
        name = self["name"]
        if changes.pop("name", name) != name:
            raise ValueError(f"{name}: the name of a span group is fixed")
        try:
            scale = SpanScale.of({**self.scale.fields(), **changes})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        if self._on_change is not None:
            self._on_change(scale)
        super().update(scale.fields())

    def __setitem__(self, field: str, value: Any) -> None:
        self.update({field: value})

    def __ior__(self, other: Any) -> SpanGroup:  # type: ignore[override, misc]
        self.update(other)
        return self

    def _fixed(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: every field is always there.

        Raises:
            TypeError: Always.

        Example:
            >>> SpanGroup("attn", SpanScale()).pop("key")
            Traceback (most recent call last):
            ...
            TypeError: attn: the fields of a span group can be set, not added or removed
        """
        raise TypeError(
            f"{self['name']}: the fields of a span group can be set, not added or removed"
        )

    __delitem__ = pop = popitem = clear = setdefault = _fixed

    def plain(self) -> dict[str, Any]:
        """Return a dict of numbers, strings, lists and ``None`` only, as for a checkpoint.

        Returns:
            The fields, with lists in place of tuples.

        Example:
            >>> SpanGroup("attn", SpanScale([2.0, 3.0])).plain()["parallel"]
            [2.0, 3.0]
        """
        return {field: _plain(value) for field, value in self.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def entries_of(groups: Any) -> list[tuple[str, SpanScale]]:
    """Read the ``"span_groups"`` of a checkpoint.

    Args:
        groups: A list of dicts such as :meth:`SpanGroup.plain` returns.

    Returns:
        Layer names with their scales, in the same order.

    Raises:
        ValueError: It is something else.

    Example:
        >>> [(name, scale)] = entries_of([SpanGroup("attn", SpanScale(3.0, 1.0)).plain()])
        >>> name, scale.parallel
        ('attn', 3.0)
    """
    try:
        return [
            (group["name"], SpanScale.of({f: x for f, x in group.items() if f != "name"}))
            for group in groups
        ]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the scales in the checkpoint are not what state_dict() returns: {error}"
        ) from error


def scales_of(groups: Any) -> dict[str, SpanScale]:
    """Read the ``"span_groups"`` of a checkpoint, where each layer has one entry.

    Args:
        groups: A list of dicts such as :meth:`SpanGroup.plain` returns.

    Returns:
        The scales by layer name.

    Raises:
        ValueError: It is something else, or a layer has several entries.

    Example:
        >>> scales_of([SpanGroup("attn", SpanScale(3.0, 1.0)).plain()])["attn"].parallel
        3.0
    """
    scales: dict[str, SpanScale] = {}
    for name, scale in entries_of(groups):
        if name in scales:
            raise ValueError(f"the checkpoint has the scales of layer {name!r} more than once")
        scales[name] = scale
    return scales


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _matches(key: str, names: Sequence[str], what: str) -> list[str]:
    if not isinstance(key, str):
        raise TypeError(f"a key of {what} is a layer name or a pattern, got {key!r}")
    matches = [key] if key in names else [name for name in names if fnmatch.fnmatchcase(name, key)]
    if not matches:
        raise ValueError(
            f"{what}[{key!r}] matches no attention layer; {_nearest(key, names)}. "
            "Print spanopt.find_attention(model) for all names"
        )
    return matches


def _nearest(key: str, names: Iterable[str]) -> str:
    names = list(names)
    nearest = difflib.get_close_matches(key, names, n=3, cutoff=0.3) or names[:3]
    return f"the nearest names are {', '.join(map(repr, nearest))}"


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
