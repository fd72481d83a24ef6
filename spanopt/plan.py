"""The plan of which layers to scale and how. All is checked before anything is installed."""

from __future__ import annotations

import fnmatch
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from spanopt.errors import BY_HAND
from spanopt.mathematics.checks import check_ridge
from spanopt.patterns import matching
from spanopt.rescaling import Rescaling
from spanopt.scale import ScaleLike, SpanScale, resolve_scales
from spanopt.setups import SPAN, Setup, SetupFunction
from spanopt.sites import AttentionSite, find_attention, is_inside, named_modules
from spanopt.taps.layouts import OutputLayout, owns_modules, read_layouts

__all__ = [
    "LayerPlan",
    "ProjectionLike",
    "QKModules",
    "Request",
    "Scales",
    "claim",
    "plan",
    "release",
]

Scales: TypeAlias = "Mapping[str, ScaleLike | None] | ScaleLike | None"
"""Scales by layer name or pattern, or one scale for all layers."""

ProjectionLike: TypeAlias = (
    "str | Setup | SetupFunction | Mapping[str, str | Setup | SetupFunction]"
)
"""A setup by name or as a function, for all layers or by layer name or pattern."""

QKModules: TypeAlias = "Mapping[str, Mapping[str, Any]] | None"
"""By layer name or pattern, the modules whose outputs are Q and K."""

_ON_MISSING = ("error", "warn", "ignore")

# The layers that carry a tap of some attachment.
_claimed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Request:
    """What the user asks for: which layers to scale, and how.

    Attributes:
        scales: Scales by layer name or pattern, or one scale for all layers.
        ridge: Relative ridge of every projection; ``None`` means the default of the dtype.
        on_missing: What to do about a layer that was asked for but was not scaled: ``"error"``,
            ``"warn"`` or ``"ignore"``.
        qk_modules: By layer name or pattern, the modules whose outputs are Q and K.
        projection: What counts as the parallel part: a setup by name or as a function, for all
            layers or by layer name or pattern.
        preserve_norm: Whether a rescaled gradient keeps its norm, for all layers or by layer name
            or pattern.

    Raises:
        ValueError: ``on_missing`` is none of the three words.
    """

    scales: Scales = None
    ridge: float | None = None
    on_missing: str = "error"
    qk_modules: QKModules = None
    projection: ProjectionLike = "span"
    preserve_norm: bool | Mapping[str, bool] = False

    def __post_init__(self) -> None:
        if self.on_missing not in _ON_MISSING:
            raise ValueError(f"on_missing must be one of {_ON_MISSING}, got {self.on_missing!r}")

    def with_scales(self, now: Mapping[str, SpanScale]) -> Request:
        """Return the same request with other scales for some layers.

        Args:
            now: Scales by layer name.

        Example:
            >>> Request((2.0, 1.0)).with_scales({"a": SpanScale(3.0)}).scales["a"].parallel
            3.0
        """
        scales: Any = SpanScale() if self.scales is None else self.scales
        scales = scales if isinstance(scales, Mapping) else {"*": scales}
        return replace(self, scales={**scales, **now})

    def rescalings(self, names: Sequence[str]) -> dict[str, Rescaling]:
        """Return the rescaling of each layer, without its factors.

        Args:
            names: The names of the attention layers.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: A key that matches no layer, or an unknown projection.

        Example:
            >>> Request(projection={"a": "cross"}).rescalings(["a", "b"])["a"].setup.name
            'cross'
        """
        check_ridge(self.ridge)
        setups = _per_layer(self.projection, names, "projection", Setup.of, SPAN)
        keep = _per_layer(self.preserve_norm, names, "preserve_norm", _flag, False)
        return {name: Rescaling(setups[name], self.ridge, keep[name]) for name in names}


@dataclass(frozen=True)
class LayerPlan:
    """What to install on one layer.

    Attributes:
        site: The attention layer.
        scale: Its scale; ``None`` leaves the layer alone.
        rescaling: How its gradients are rescaled, without the factors.
        outputs: Where Q and K are, if the user named the modules that return them.
    """

    site: AttentionSite
    scale: SpanScale | None
    rescaling: Rescaling
    outputs: list[OutputLayout] | None = None


def plan(
    model: nn.Module,
    request: Request,
    *,
    parameters: Iterable[Tensor] | None = None,
    hooked: Sequence[AttentionSite] | None = None,
) -> list[LayerPlan]:
    """Find what to scale, and check all that can be checked before anything is installed.

    Args:
        model: The model.
        request: What the user asks for.
        parameters: The parameters that will be trained. If they are given, it is an error that a
            scaled layer has trainable parameters but none of them is among these.
        hooked: Sites that have hooks already, if the model is planned again for new layers. They
            are left out, and so are layers that are not trained yet.

    Returns:
        A plan for each attention layer.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No attention layer, a key that matches no layer, a bad scale or ridge, or a
            layer that another attachment scales already.

    Example:
        >>> plan(nn.TransformerEncoderLayer(8, nhead=2), Request(SpanScale(2.0)))[0].scale
        SpanScale(parallel=2.0, violation=1.0, query=None, key=None)
    """
    parameters = None if parameters is None else list(parameters)
    sites, outputs = _named_by_user(model, find_attention(model), request.qk_modules or {})
    if not sites and hooked is None:
        raise ValueError(
            f"no attention layer found in {type(model).__name__}. Looked for "
            "nn.MultiheadAttention, for code that calls torch.nn.functional."
            "scaled_dot_product_attention or multiplies matrices and takes a softmax, and for "
            f"modules that own a query and a key projection (q_proj and k_proj, to_q and to_kv, "
            f"qkv, ...). {BY_HAND}"
        )
    # Keys of layers that had hooks and are now gone from the model stay valid.
    names = list({site.name: None for site in (*sites, *(hooked or ()))})
    if request.scales is None and hooked is None:
        warnings.warn(
            "no scales were given, and by default gradients stay as they are: pass, say, "
            "scales={'*': SpanScale(parallel=2.0, violation=1.0)}, or scales=SpanScale() to edit "
            "them later",
            stacklevel=3,
        )
    scales = resolve_scales(request.scales, names)
    rescalings = request.rescalings(names)
    for site in sites:  # a layer that the user asks for by name counts as attention
        site.asked = isinstance(request.scales, Mapping) and site.name in request.scales
        site.certain = site.certain or site.asked
    if hooked is not None:
        sites = _new_sites(model, sites, hooked, parameters)
    scaled = [site for site in sites if scales[site.name] is not None]
    _check_unclaimed(scaled)
    if parameters is not None:
        _check_trained(model, [site for site in scaled if site.certain], parameters)
    return [
        LayerPlan(site, scales[site.name], rescalings[site.name], outputs.get(site.name))
        for site in sites
    ]


def claim(module: nn.Module) -> None:
    """Note that a layer carries a tap, so that no other attachment takes it."""
    _claimed.add(module)


def release(module: nn.Module) -> None:
    """Note that a layer no longer carries a tap."""
    _claimed.discard(module)


def _per_layer(
    value: Any, names: Sequence[str], what: str, read: Callable[[Any], Any], default: Any
) -> dict[str, Any]:
    given = value if isinstance(value, Mapping) else {"*": value}
    chosen = matching({key: read(one) for key, one in given.items()}, names, what)
    return {name: chosen.get(name, default) for name in names}


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(
            f"preserve_norm is True or False, for all layers or by layer, got {value!r}"
        )
    return value


def _new_sites(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    hooked: Sequence[AttentionSite],
    parameters: Iterable[Tensor] | None,
) -> list[AttentionSite]:
    """Return the sites that have no hooks yet and whose parameters are now trained."""
    trained = set(map(id, parameters or ()))
    old = {site.module for site in hooked}
    new = []
    for site in sites:
        if site.module not in old and not _is_left_out(site, trained):
            new.append(site)
    present = old & set(model.modules())
    names = {site.name for site in hooked if site.module in present}
    for site in new:
        if site.name in names:
            raise ValueError(
                f"a new layer is named {site.name!r}, as one that is scaled already was: the names "
                "of the model's layers have changed; detach() the optimizer and wrap it again"
            )
    return new


def _named_by_user(
    model: nn.Module,
    sites: list[AttentionSite],
    qk_modules: Mapping[str, Mapping[str, Any]],
) -> tuple[list[AttentionSite], dict[str, list[OutputLayout]]]:
    """Add the layers that ``qk_modules`` names to the sites.

    Return the sites, and for each of these layers the modules that return Q and K.
    """
    if not isinstance(qk_modules, Mapping):
        raise TypeError(
            "qk_modules must be a dict from layer names or patterns to dicts such as "
            f'{{"query": "wq", "key": "wk", "num_heads": 8}}, got {type(qk_modules).__name__}'
        )
    if not qk_modules:
        return sites, {}
    modules = dict(named_modules(model))
    outputs: dict[str, list[OutputLayout]] = {}
    for pattern, spec in qk_modules.items():
        matched = [pattern]
        if pattern not in modules:
            matched = [
                name
                for name in fnmatch.filter(modules, pattern)
                if owns_modules(modules[name], spec)
            ]
        if not matched:
            raise ValueError(
                f"qk_modules: {pattern!r} matches no module of {type(model).__name__} that has "
                f"the modules named in {dict(spec)}; attention layers are "
                f"{[site.name for site in sites]}"
            )
        for name in matched:
            if name in outputs:
                raise ValueError(f"qk_modules: layer {name!r} is matched more than once")
            outputs[name] = read_layouts(name, modules[name], spec)
    by_name = {site.name: site for site in sites}
    for name in outputs:
        by_name = {other: site for other, site in by_name.items() if not is_inside(other, name)}
        by_name[name] = AttentionSite(name, modules[name], "projection")
    return [by_name[name] for name in modules if name in by_name], outputs


def _check_unclaimed(sites: Sequence[AttentionSite]) -> None:
    claimed = set(_claimed)
    inside = {inner for outer in claimed for inner in outer.modules()}
    for site in sites:
        if site.module in inside or not claimed.isdisjoint(site.module.modules()):
            raise ValueError(
                f"layer {site.name!r} is scaled already, by another attachment or optimizer: "
                "call its remove() or detach() first, or give the layer to one of them only"
            )


def _is_left_out(site: AttentionSite, trained: set[int]) -> bool:
    """Return whether a layer has trainable parameters and no id of them is in ``trained``."""
    trainable = {id(p) for p in site.module.parameters() if p.requires_grad}
    return bool(trainable) and not trainable & trained


def _check_trained(
    model: nn.Module, sites: Sequence[AttentionSite], parameters: Iterable[Tensor]
) -> None:
    trained = set(map(id, parameters))
    for site in sites:
        if _is_left_out(site, trained):
            if trained.isdisjoint(map(id, model.parameters())):
                raise ValueError(
                    "the optimizer has none of this model's parameters: it was made of another "
                    "model, or of another copy of this one. Make it of the parameters of the model "
                    f"that you wrap it with, a {type(model).__name__}"
                )
            raise ValueError(
                f"layer {site.name!r} is to be scaled, but none of its trainable parameters is "
                "in the optimizer: add them to it, or leave the layer alone with the scale None"
            )
