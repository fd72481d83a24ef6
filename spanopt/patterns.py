"""Names of layers, and patterns that match them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["check_same_layers", "matching", "pattern_for"]


def matching(values: Mapping[str, Any], names: Sequence[str], what: str) -> dict[str, Any]:
    """Give layers the values of the keys that match their names.

    Keys are exact layer names, shell-style patterns (``*``, ``?``, ``[...]``; ``*`` also matches
    dots) or ``"*"`` for all. An exact name beats a pattern. Among patterns, the last match in the
    dict wins.

    Args:
        values: Any values, by layer name or pattern.
        names: The names of the layers.
        what: What the values are called, for errors.

    Returns:
        The value of each layer that a key matches.

    Raises:
        TypeError: A key that is not a string.
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


def pattern_for(names: Sequence[str], others: Sequence[str]) -> str:
    """Return a pattern for some layers that matches none of the others.

    Args:
        names: The names of the layers to match, at least one.
        others: The names of the layers not to match.

    Returns:
        A pattern, or the first name if there is no simple pattern.

    Example:
        >>> pattern_for(["0.linear_attn", "2.linear_attn"], ["1.attn"])
        '*.linear_attn'
        >>> pattern_for(["blocks.0.self", "blocks.1.self"], ["cross.self"])
        'blocks.*.self'
    """
    if len(names) == 1:
        return names[0]
    last = {name.rpartition(".")[2] for name in names}
    numbered = {re.sub(r"\d+", "*", name) for name in names}
    candidates = [f"*.{part}" for part in last if not part.isdigit()] if len(last) == 1 else []
    for pattern in candidates + (list(numbered) if len(numbered) == 1 else []):
        if len(fnmatch.filter(names, pattern)) == len(names) and not fnmatch.filter(
            others, pattern
        ):
            return pattern
    return names[0]


def check_same_layers(saved: Iterable[str], names: Iterable[str], advice: str = "") -> None:
    """Refuse a checkpoint whose attention layers are not those of the model.

    Args:
        saved: The names of the layers in the checkpoint.
        names: The names of the layers of the model.
        advice: A sentence for the error that says what to do; by default there is none.

    Raises:
        ValueError: A name is in only one of the two lists.

    Example:
        >>> check_same_layers(["a"], ["b"])
        Traceback (most recent call last):
        ...
        ValueError: the checkpoint's attention layers are not this model's: only in the ...
    """
    saved, names = list(saved), list(names)
    others = sorted(set(saved) - set(names))
    absent = [name for name in names if name not in saved]
    if others or absent:
        raise ValueError(
            "the checkpoint's attention layers are not this model's: only in the checkpoint: "
            f"{others}; only in the model: {absent}{advice and f'. {advice}'}"
        )


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
