"""How Q and K lie in the outputs of the modules that the user names in ``qk_modules``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["OutputLayout", "owns_modules", "read_layouts"]

_PARTS = {
    "query": ("query",),
    "key": ("key",),
    "qkv": ("query", "key", "value"),
    "qk": ("query", "key"),
    "kv": ("key", "value"),
}
_OPTIONS: dict[str, Any] = {
    "num_heads": None,
    "num_kv_heads": None,
    "layout": "concatenated",
    "batch_first": True,
    "in_place": False,
}
_LAYOUTS = ("concatenated", "interleaved")


@dataclass(frozen=True)
class OutputLayout:
    """How Q or K or both lie in the output of one module, shape ``(..., N, blocks * width * d)``.

    Attributes:
        name: The module, relative to its layer.
        module: The module.
        blocks: Number of blocks of heads. It is 1 where queries and keys are concatenated, and the
            number of key heads where they are interleaved.
        width: Number of heads in a block.
        sides: For each side, ``"query"`` or ``"key"``: its name, the index of its first head in a
            block, and the number of its heads in a block.
        batch_first: Whether the output is (B, N, features) rather than (N, B, features).
        in_place: Whether the layer changes the output in place. It then gets a copy.
    """

    name: str
    module: nn.Module
    blocks: int
    width: int
    sides: tuple[tuple[str, int, int], ...]
    batch_first: bool = True
    in_place: bool = False

    def check(self, layer: str, features: int) -> None:
        """Refuse a number of output features that is not a multiple of the number of heads.

        Args:
            layer: Name of the layer.
            features: Size of the last dimension of the output.

        Raises:
            ValueError: It is not a multiple.
        """
        if features % (self.blocks * self.width):
            raise ValueError(
                f"layer {layer!r}: {self.name!r} has {features} output features, which do not "
                f"divide into the {self.blocks * self.width} heads that qk_modules={{...}} says"
            )


def read_layouts(layer: str, module: nn.Module, spec: Mapping[str, Any]) -> list[OutputLayout]:
    """Read one entry of ``qk_modules``.

    Args:
        layer: Name of the layer, for errors.
        module: The layer.
        spec: Names of modules in the layer, and how Q and K lie in their outputs:

            - ``"query"`` and ``"key"`` for two modules, or ``"qkv"``, ``"qk"`` or ``"kv"`` (with
              ``"query"``) for several in one output;
            - ``"num_heads"``, the number of query heads, and ``"num_kv_heads"``, the number of key
              heads; the default is ``"num_heads"``;
            - ``"layout"`` of fused outputs: ``"concatenated"`` (all of Q, then all of K, then all
              of V; the default) or ``"interleaved"`` (for each key head its query heads, then the
              key head, then its value head);
            - ``"batch_first"``: ``False`` where outputs have the shape (N, B, features); default
              ``True``;
            - ``"in_place"``: ``True`` where the layer changes the outputs in place, which costs a
              copy of each; default ``False``.

    Returns:
        The layout of each output.

    Raises:
        TypeError: ``spec`` is not a mapping.
        ValueError: Fields are unknown, missing or contradictory, a module does not exist, or sizes
            do not divide.

    Example:
        >>> layer = nn.Module()
        >>> layer.c_attn = nn.Linear(16, 48)
        >>> (output,) = read_layouts("attn", layer, {"qkv": "c_attn", "num_heads": 4})
        >>> output.sides
        (('query', 0, 4), ('key', 4, 4))
    """
    given, options = _checked(layer, spec)
    heads, kv_heads = options["num_heads"], options["num_kv_heads"]
    interleaved = options["layout"] == "interleaved"
    result = []
    for part in given:
        owner = _module(layer, module, part, spec[part])
        blocks = kv_heads if interleaved and len(_PARTS[part]) > 1 else 1
        sides, first = [], 0
        for side in _PARTS[part]:
            count = (heads if side == "query" else kv_heads) // blocks
            if side != "value":
                sides.append((side, first, count))
            first += count
        output = OutputLayout(
            spec[part],
            owner,
            blocks,
            first,
            tuple(sides),
            options["batch_first"],
            options["in_place"],
        )
        features = getattr(owner, "out_features", getattr(owner, "nf", None))
        if isinstance(features, int):
            output.check(layer, features)
        result.append(output)
    return result


def _checked(layer: str, spec: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the parts that an entry names, and its options with their defaults."""
    if not isinstance(spec, Mapping):
        raise TypeError(
            f"qk_modules[{layer!r}] must be a dict such as "
            f'{{"query": "wq", "key": "wk", "num_heads": 8}}, got {type(spec).__name__}'
        )
    unknown = set(spec) - {*_PARTS, *_OPTIONS}
    given = [part for part in _PARTS if part in spec]
    if unknown or set(given) not in ({"query", "key"}, {"qkv"}, {"qk"}, {"query", "kv"}):
        raise ValueError(
            f"qk_modules[{layer!r}] must name 'query' and 'key', or 'qkv', or 'qk', or 'query' "
            f"and 'kv', and 'num_heads', and may have "
            f"{', '.join(map(repr, [*_OPTIONS][1:]))}; got {sorted(map(str, spec))}"
        )
    options = {name: spec.get(name, default) for name, default in _OPTIONS.items()}
    if "num_kv_heads" not in spec:
        options["num_kv_heads"] = options["num_heads"]
    _check_heads(layer, options["num_heads"], options["num_kv_heads"])
    if options["layout"] not in _LAYOUTS:
        raise ValueError(
            f"qk_modules[{layer!r}]: layout must be one of {_LAYOUTS}, got {options['layout']!r}"
        )
    for name in ("batch_first", "in_place"):
        if not isinstance(options[name], bool):
            raise ValueError(
                f"qk_modules[{layer!r}]: {name} must be True or False, got {options[name]!r}"
            )
    if "key" in spec and spec["key"] == spec["query"]:
        raise ValueError(
            f"qk_modules[{layer!r}]: {spec['key']!r} is named as 'query' and as 'key': one tensor "
            "for both has one gradient, of which nothing tells the sides apart; write "
            "q = spanopt.span_node(q, parallel, violation) and the same for k in the layer instead"
        )
    return given, options


def _check_heads(layer: str, heads: Any, kv_heads: Any) -> None:
    for count in (heads, kv_heads):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"qk_modules[{layer!r}]: num_heads and num_kv_heads must be whole numbers of at "
                f"least 1, got {heads!r} and {kv_heads!r}"
            )
    if heads % kv_heads:
        raise ValueError(
            f"qk_modules[{layer!r}]: {heads} query heads do not divide into groups for "
            f"{kv_heads} key heads"
        )


def _module(layer: str, module: nn.Module, part: str, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        children = [child for child, _ in module.named_children()]
        raise ValueError(
            f"qk_modules[{layer!r}]: {part!r} names {name!r}, which the layer does not have; "
            f"it has {children}"
        ) from error


def owns_modules(module: nn.Module, spec: Mapping[str, Any]) -> bool:
    """Return whether a module contains the modules that one entry of ``qk_modules`` names.

    Args:
        module: Any module.
        spec: The entry, such as ``{"query": "wq", "key": "wk", "num_heads": 8}``.

    Example:
        >>> owns_modules(nn.MultiheadAttention(8, 2), {"query": "wq", "key": "wk"})
        False
    """
    names = {name for name, _ in module.named_modules()}
    return all(spec[part] in names for part in _PARTS if part in spec)
