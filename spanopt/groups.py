"""Span groups: the editable scales of each attention layer, and how a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spanopt.scale import SpanScale

__all__ = ["SpanGroup", "entries_of", "scales_of"]


class SpanGroup(dict[str, Any]):
    """The scales of one attention layer, as an editable dict: an entry of ``span_groups``.

    Its fields are ``name``, which is fixed, and ``parallel``, ``violation``, ``query`` and ``key``
    with the meaning that they have in :class:`~spanopt.SpanScale`. An assignment is checked at once
    and takes effect at the next forward pass. A bad one raises an error and changes nothing.

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
        """Change several fields at once: either all of them change or none.

        Args:
            *args: A mapping of fields, as for ``dict.update``.
            **kwargs: Fields.

        Raises:
            TypeError: An unknown field, or a value that is not a scale.
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
        """Refuse to add or remove a field.

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

    __delitem__: Any = _fixed
    pop: Any = _fixed
    popitem: Any = _fixed
    clear: Any = _fixed
    setdefault: Any = _fixed

    def plain(self) -> dict[str, Any]:
        """Return the fields for a checkpoint: only numbers, strings, lists and ``None``.

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
    """Read the ``"span_groups"`` of a checkpoint, where a layer may have several entries.

    Args:
        groups: A list of dicts such as :meth:`SpanGroup.plain` returns.

    Returns:
        Layer names with their scales, in the same order.

    Raises:
        ValueError: ``groups`` is something else.

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
        ValueError: ``groups`` is something else, or a layer has several entries.

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
