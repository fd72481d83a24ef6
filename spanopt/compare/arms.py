"""Arms, which are the ways of training that are compared, and the controls for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from spanopt.scale import Factor, ScaleLike, SpanScale

__all__ = ["CONTROLS", "FROZEN", "NEAR_NULL", "PLAIN", "Arm", "ArmLike", "Arms", "with_controls"]

PLAIN = "plain"
NEAR_NULL = "near-null (1.0001, 1)"
FROZEN = "frozen Q and K"
CONTROLS = ("near-null", "uniform", "frozen")

Layers: TypeAlias = Mapping[str, "ScaleLike | None"]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        scales: Scales by layer name or pattern, as :class:`~spanopt.SpanScaledOptimizer` takes
            them, or one ``SpanScale`` or (parallel, violation) pair for all layers. ``None`` means
            plain training.
        options: Further arguments of :class:`~spanopt.SpanScaledOptimizer` by name, such as
            ``{"projection": "pooled"}``.
        params: Further arguments of the function that trains, by name, such as ``{"lr": 1e-3}``.
        held: Whether weights that get their gradient only through Q and K stay fixed, even with
            weight decay. The factors must then be 0.

    Example:
        >>> Arm((2, 1)).scales
        {'*': SpanScale(parallel=2.0, violation=1.0, query=None, key=None)}
    """

    scales: Layers | SpanScale | tuple[Any, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    held: bool = False

    def __post_init__(self) -> None:
        scales = self.scales
        if scales is None:
            if self.options or self.held:
                raise ValueError("an arm without scales takes no options and holds no weights")
            return
        layers = scales if isinstance(scales, Mapping) else {"*": scales}
        if not layers:
            raise ValueError("an arm with empty scales would scale no layer; give {'*': (2, 1)}")
        resolved = {
            key: None if value is None else SpanScale.of(value) for key, value in layers.items()
        }
        object.__setattr__(self, "scales", resolved)

    @classmethod
    def of(cls, value: ArmLike) -> Arm:
        """Return the arm that a value of ``arms`` stands for."""
        return value if isinstance(value, Arm) else cls(value)

    @property
    def layers(self) -> dict[str, SpanScale | None]:
        """The scales by layer name or pattern; empty for plain training."""
        return dict(self.scales or {})  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        """Return a description that JSON can hold, by which stores tell arms apart."""
        layers = {key: value and value.fields() for key, value in self.layers.items()}
        return {
            "scales": layers or None,
            "options": {name: _described(value) for name, value in self.options.items()},
            "params": {name: _described(value) for name, value in self.params.items()},
            "held": self.held,
        }


ArmLike: TypeAlias = Arm | Layers | SpanScale | tuple[Any, Any] | None
"""What a value of ``arms`` may be."""


def _described(value: Any) -> Any:
    """Return a value of JSON's types as it is, and the name of anything else."""
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else repr(value)


@dataclass(frozen=True)
class Arms:
    """The user's arms and their controls.

    Attributes:
        all: Every arm by name, plain training first.
        asked: The names of the arms that the user asked for.
        uniform: For an arm, the name of its uniform control, which scales everything by one factor.
    """

    all: dict[str, Arm]
    asked: tuple[str, ...]
    uniform: dict[str, str]


def with_controls(arms: Mapping[str, ArmLike], controls: Iterable[str] = CONTROLS) -> Arms:
    """Add the controls to the arms that a user asks for.

    Args:
        arms: The user's arms by name.
        controls: Some of ``"near-null"`` (factors that change next to nothing), ``"uniform"`` (the
            same factor for the parallel part and the violation) and ``"frozen"`` (Q and K are not
            trained). Plain training is always added.

    Raises:
        ValueError: No arms, an unknown control, or an arm that has the name of a control.
    """
    asked = {name: Arm.of(value) for name, value in arms.items()}
    controls = tuple(controls)
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        raise ValueError(f"no control is named {unknown[0]!r}, only {', '.join(CONTROLS)}")
    taken = [name for name in asked if name in (PLAIN, NEAR_NULL, FROZEN)]
    if taken:
        raise ValueError(f"{taken[0]!r} is the name of a control; give the arm another name")
    scaled = [arm for arm in asked.values() if arm.scales is not None]
    if not asked:
        raise ValueError(
            "there are no arms to compare with plain training; give {'(2, 1)': (2, 1)}"
        )
    every = {PLAIN: Arm()} | asked
    uniform = {}
    if "uniform" in controls:
        for name, arm in asked.items():
            control = _uniform(arm)
            if control is not None:
                same = [other for other, known in every.items() if known == control]
                uniform[name] = same[0] if same else _uniform_name(name, control)
                every.setdefault(uniform[name], control)
    if scaled and "near-null" in controls:
        every[NEAR_NULL] = _on_the_same_layers(scaled[0], SpanScale(1.0001, 1.0))
    if scaled and "frozen" in controls:
        every[FROZEN] = _on_the_same_layers(scaled[0], SpanScale(0.0, 0.0), held=True)
    return Arms(every, tuple(asked), uniform)


def _on_the_same_layers(arm: Arm, scale: SpanScale, held: bool = False) -> Arm:
    layers = {key: value and scale for key, value in arm.layers.items()}
    return Arm(layers, _reaching(arm), arm.params, held)


def _reaching(arm: Arm) -> dict[str, Any]:
    """Return the options that say how Q and K are reached, without those of the rescaling."""
    kept = ("qk_modules", "on_missing", "example_inputs")
    return {name: value for name, value in arm.options.items() if name in kept}


def _uniform(arm: Arm) -> Arm | None:
    """Return the uniform control of an arm; ``None`` if it would control for nothing."""
    if arm.scales is None or arm.options.get("preserve_norm"):
        return None
    layers = {key: value and _alike(value) for key, value in arm.layers.items()}
    factors = [
        factor
        for scale in layers.values()
        if scale is not None
        for side in ("query", "key")
        for pair in scale.side(side)
        for factor in (pair if isinstance(pair, tuple) else (pair,))
    ]
    if layers == arm.layers or 0.0 in factors or set(factors) == {1.0}:
        return None
    return Arm(layers, _reaching(arm), arm.params)


def _alike(scale: SpanScale) -> SpanScale:
    query, key = (_factor_of(*scale.side(side)) for side in ("query", "key"))
    return (
        SpanScale(query, query) if query == key else SpanScale(query=(query, query), key=(key, key))
    )


def _factor_of(parallel: Factor, violation: Factor) -> Factor:
    """Return the factor of the part that is scaled: the parallel part if both are."""
    if isinstance(parallel, tuple) or isinstance(violation, tuple):
        heads = len(parallel if isinstance(parallel, tuple) else violation)  # type: ignore[arg-type]
        pairs = [x if isinstance(x, tuple) else (x,) * heads for x in (parallel, violation)]
        return tuple(a if a != 1.0 else b for a, b in zip(*pairs, strict=True))
    return parallel if parallel != 1.0 else violation


def _uniform_name(name: str, control: Arm) -> str:
    scales = [scale for scale in control.layers.values() if scale is not None]
    factor = scales[0].parallel
    simple = len(scales) == 1 and scales[0].query is None and not isinstance(factor, tuple)
    return f"uniform ({factor:g}, {factor:g})" if simple else f"uniform, as {name}"
