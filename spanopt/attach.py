"""Installing taps on a model's attention layers and taking them off again."""

from __future__ import annotations

import fnmatch
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch._dynamo
from torch import Tensor, nn

from spanopt.node import Method
from spanopt.projection import check_ridge
from spanopt.scale import (
    ScaleLike,
    SpanGroup,
    SpanScale,
    matching,
    resolve_scales,
    scales_of,
)
from spanopt.setups import Setup, setup_name
from spanopt.sites import AttentionSite, find_attention, is_inside, named_modules, unwrap
from spanopt.taps import HANDLERS
from spanopt.taps.projection import Projection, ProjectionTap, owns_projections, projections_of
from spanopt.taps.tap import Tap, remove_stale, thread
from spanopt.taps.watcher import Watcher

__all__ = ["SpanHooks", "UnscaledLayerError", "attach"]

_ON_MISSING = ("error", "warn", "ignore")

# The layers that carry a tap just now.
_claimed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class UnscaledLayerError(RuntimeError):
    """A layer that was asked for was not scaled: its Q and K were not seen.

    Example:
        >>> import torch
        >>> class Linear(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv = torch.nn.Linear(4, 12)
        ...     def forward(self, x):
        ...         q, k, v = self.qkv(x).chunk(3, -1)
        ...         return q @ (k.mT @ v)
        >>> with attach(Linear(), SpanScale(2.0), example_inputs=torch.randn(2, 3, 4)):
        ...     pass
        Traceback (most recent call last):
        ...
        spanopt.attach.UnscaledLayerError: not scaled: layer '' (Linear); scaled: none. ...
    """


class SpanHooks:
    """The taps installed on one model; what :func:`attach` returns.

    A context manager: on leaving, the model is as it was before.

    Attributes:
        sites: The attention layers of the model, scaled or not.
        groups: One editable :class:`~spanopt.scale.SpanGroup` per scaled layer.

    Example:
        >>> from torch import nn
        >>> model = nn.TransformerEncoderLayer(8, nhead=2)
        >>> with attach(model, SpanScale(2.0)) as hooks:
        ...     hooks.groups
        [{'name': 'self_attn', 'parallel': 2.0, 'violation': 1.0, 'query': None, 'key': None}]
        >>> len(model.self_attn._forward_hooks)
        0
    """

    def __init__(self, on_missing: str, root: nn.Module | None = None) -> None:
        self.sites: list[AttentionSite] = []
        self.groups: list[SpanGroup] = []
        self._groups: list[SpanGroup] = []
        self._taps: list[Tap] = []
        self._shields: list[Tap] = []
        self._handles: dict[Tap | None, list[Any]] = {None: []}
        self._on_missing = on_missing
        if root is not None and on_missing == "error":
            _drop_inert(root)
            self._handles[None].append(root.register_forward_hook(_CheckCalled(self._taps)))

    def add(self, plan: Plan) -> None:
        """Install the taps of further layers.

        Args:
            plan: What to scale, see :func:`plan`.

        Raises:
            ValueError: The number of per-head values is not a layer's number of heads. Nothing is
                installed then.

        Example:
            >>> from torch import nn
            >>> hooks = SpanHooks(on_missing="error")
            >>> hooks.add(plan(nn.TransformerEncoderLayer(8, nhead=2), {"*": (2.0, 1.0)}))
            >>> hooks.unseen()
            ['self_attn']
        """
        taps: list[Tap] = []
        shields: list[Tap] = []
        scaled = (site.module for site in plan.sites if plan.scales[site.name] is not None)
        inside = {inner for outer in scaled for inner in outer.modules()}
        for site in plan.sites:
            scale = plan.scales[site.name]
            if scale is not None:
                method = plan.methods[site.name]
                if site.name in plan.projections:
                    projections = plan.projections[site.name]
                    taps.append(ProjectionTap(site, scale, method, projections))
                else:
                    taps.append(Tap(site, scale, method, HANDLERS))
            elif site.module in inside:
                # Left alone, inside a layer that is scaled: a tap that does nothing shields it.
                shields.append(Tap(site, SpanScale(1.0, 1.0), Method(), HANDLERS))
        for tap in (*taps, *shields):
            self._install(tap)
        for tap in taps:
            scale = plan.scales[tap.site.name]
            assert scale is not None
            group = SpanGroup(tap.site.name, scale, tap.set_scale)
            self.groups.append(group)
            self._groups.append(group)
        self.sites += plan.sites
        self._taps += taps
        self._shields += shields

    def _install(self, tap: Tap) -> None:
        module = tap.site.module
        _drop_inert(module)
        # Prepended, and the forward hook is called always: an exception leaves no mode entered.
        handles = self._handles[tap] = [
            module.register_forward_pre_hook(_Enter(tap), prepend=True, with_kwargs=True),
            module.register_forward_hook(_Leave(tap), always_call=True),
        ]
        if isinstance(tap, ProjectionTap):
            for projection in tap.projections:
                _drop_inert(projection.module)
                hook = _Output(tap, projection)
                handles.append(projection.module.register_forward_hook(hook))
        _claimed.add(module)

    def drop(self, modules: Iterable[nn.Module]) -> None:
        """Take the taps off layers, as off those that are no longer in the model.

        Args:
            modules: The layers; others are passed over.

        Example:
            >>> from torch import nn
            >>> model = nn.TransformerEncoderLayer(8, nhead=2)
            >>> hooks = attach(model, SpanScale(2.0))
            >>> hooks.drop([model.self_attn])
            >>> hooks.unseen()
            []
        """
        gone = set(modules)
        for tap in [*self._taps, *self._shields]:
            if tap.site.module not in gone:
                continue
            self._take_off(tap)
            if tap in self._shields:
                self._shields.remove(tap)
                continue
            index = self._taps.index(tap)
            for of_each in (self._taps, self.groups, self._groups):
                del of_each[index]
        self.sites = [site for site in self.sites if site.module not in gone]
        remove_stale()

    def unseen(self) -> list[str]:
        """Return the scaled layers whose Q and K were not seen since :meth:`forget`.

        Returns:
            Their names.

        Raises:
            ValueError: An entry of ``groups`` was replaced, added or removed.

        Example:
            >>> from torch import nn
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).unseen()
            ['self_attn']
        """
        if [*map(id, self.groups)] != [*map(id, self._groups)]:
            raise ValueError(
                "an entry of span_groups was replaced, added or removed, which scales nothing: "
                "set the fields of the entries that are there"
            )
        missing = [tap for tap in self._taps if tap.is_attention() and not tap.seen]
        if not missing and not any(tap.seen for tap in self._taps):
            missing = self._taps  # nothing at all was scaled, though layers may be attention
        return [tap.site.name for tap in missing]

    def forget(self) -> None:
        """Forget which layers were seen, as after an optimizer step.

        Example:
            >>> from torch import nn
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).forget()
        """
        for tap in self._taps:
            tap.seen = False
            tap.forget_tokens()

    def check(self) -> None:
        """Complain, as ``on_missing`` says, of every scaled layer that was not seen.

        Raises:
            UnscaledLayerError: There is one, and ``on_missing`` is ``"error"``.
            ValueError: An entry of ``groups`` was replaced rather than edited.

        Example:
            >>> from torch import nn
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).check()
            Traceback (most recent call last):
            ...
            spanopt.attach.UnscaledLayerError: not scaled since the last step: ...
        """
        missing = self.unseen()
        if not missing or self._on_missing == "ignore":
            return
        scaled = [tap for tap in self._taps if tap.seen]
        message = (
            f"not scaled since the last step: layer{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(repr, missing))} (scaled: {_listed(scaled)}). Q and K were not seen "
            "in a forward pass with gradients. If a layer was skipped or is frozen on purpose, "
            "pass on_missing='warn' or 'ignore', or scale it with None; if its forward was called "
            "directly, call the module instead; if it checkpoints its attention with "
            "use_reentrant=True, use False, or checkpoint the layer as a whole; if its attention "
            f"is in a function with a backward of its own, it can't be seen there. {_BY_HAND}"
        )
        if self._on_missing == "error":
            self.forget()
            raise UnscaledLayerError(message)
        warnings.warn(message, stacklevel=3)

    def probe(self, model: nn.Module, example_inputs: Any) -> None:
        """Run one forward pass, to learn what only that can tell.

        Args:
            model: The model.
            example_inputs: As in :func:`attach`.

        Raises:
            UnscaledLayerError: A scaled layer calls no attention, and ``on_missing`` is
                ``"error"``.

        Example:
            >>> import torch
            >>> model = torch.nn.TransformerEncoderLayer(8, nhead=2)
            >>> hooks = attach(model, SpanScale(2.0))
            >>> hooks.probe(model, torch.randn(5, 1, 8))
            >>> hooks.sites[0].query_length
            5
        """
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        args: tuple[Any, ...] = (example_inputs,)
        kwargs: dict[str, Any] = {}
        if isinstance(example_inputs, tuple):
            args = example_inputs
        elif isinstance(example_inputs, Mapping):
            args, kwargs = (), dict(example_inputs)
        try:
            thread.probing = True
            with torch.random.fork_rng(), torch.enable_grad():
                model(*args, **kwargs)
            if self._on_missing == "error":
                _check_called(self._taps, only_entered=False)
        finally:
            thread.probing = False
            self.forget()
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)

    def has_run(self, site: AttentionSite) -> bool:
        """Return whether a layer has run while it was hooked.

        Args:
            site: One of ``sites`` that is scaled.

        Example:
            >>> from torch import nn
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.has_run(hooks.sites[0])
            False
        """
        return any(tap.entered for tap in self._taps if tap.site is site)

    def hold(self, names: Iterable[str]) -> None:
        """Compute the projection in these layers whatever the scales are, as under a schedule.

        Equal factors need none, and without it compiled code would be compiled anew when they
        come to differ.

        Args:
            names: Names of layers.

        Example:
            >>> from torch import nn
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).hold(["self_attn"])
        """
        names = set(names)
        for tap, group in zip(self._taps, self._groups, strict=True):
            if tap.site.name in names:
                tap.held = True
                tap.set_scale(group.scale)

    def watch(self, watcher: Watcher | None) -> None:
        """Have somebody told of Q, K and their gradients, from the next forward pass on.

        Args:
            watcher: Who is told; ``None`` for nobody.

        Example:
            >>> from torch import nn
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).watch(None)
        """
        for tap in self._taps:
            tap.watcher = watcher

    def state_dict(self) -> dict[str, Any]:
        """Return the scales, as numbers, strings, lists, dicts and ``None``.

        With :meth:`load_state_dict` this makes the hooks an entry of what
        ``torch.distributed.checkpoint`` saves and loads.

        Example:
            >>> from torch import nn
            >>> list(attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).state_dict())
            ['span_groups']
        """
        return {"span_groups": [group.plain() for group in self.groups]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the scales.

        Args:
            state_dict: From :meth:`state_dict`.

        Raises:
            ValueError: It names other layers, or holds what is no scale. The scales are then as
                they were.

        Example:
            >>> from torch import nn
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.load_state_dict(hooks.state_dict())
        """
        scales = scales_of(state_dict.get("span_groups"))
        names = {group["name"] for group in self.groups}
        if set(scales) != names:
            raise ValueError(
                "the checkpoint's attention layers are not this model's: only in the checkpoint: "
                f"{sorted(set(scales) - names)}; only in the model: {sorted(names - set(scales))}"
            )
        self.set_scales(scales)

    def set_scales(self, scales: Mapping[str, SpanScale]) -> None:
        """Set the scales of layers by name.

        Args:
            scales: By name of layer; others keep theirs.

        Raises:
            ValueError: A number of per-head values that is not a layer's. All scales are then as
                they were.

        Example:
            >>> from torch import nn
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.set_scales({"self_attn": SpanScale(3.0, 1.0)})
        """
        before = [(group, group.scale) for group in self.groups]
        try:
            for group in self.groups:
                if group["name"] in scales:
                    group.update(scales[group["name"]].fields())
        except BaseException:
            for group, scale in before:
                group.update(scale.fields())
            raise

    def remove(self) -> None:
        """Take everything off the model. Doing it twice is harmless.

        Example:
            >>> from torch import nn
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.remove()
        """
        for tap in (None, *self._taps, *self._shields):
            self._take_off(tap)
        remove_stale()

    def _take_off(self, tap: Tap | None) -> None:
        """Take a tap off its layer, or what is on the whole model off that; once."""
        for handle in self._handles.pop(tap, ()):
            handle.remove()
        if tap is not None and not tap.removed:  # another attachment may have the layer by now
            tap.removed = True
            _claimed.discard(tap.site.module)

    def __enter__(self) -> SpanHooks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return table(self)


def attach(
    model: nn.Module,
    scales: Mapping[str, ScaleLike | None] | SpanScale | None = None,
    *,
    ridge: float | None = None,
    on_missing: str = "error",
    projections: Mapping[str, Mapping[str, Any]] | None = None,
    example_inputs: Any = None,
    parameters: Iterable[Tensor] | None = None,
    projection: ProjectionLike = "span",
    preserve_norm: bool | Mapping[str, bool] = False,
) -> SpanHooks:
    """Rescale the attention gradients of a model by span, without an optimizer.

    For frameworks that build their own optimizer; otherwise use
    :class:`~spanopt.SpanScaledOptimizer`. Forward values do not change. The hooks stay on the model
    until :meth:`SpanHooks.remove`, whether or not the returned object is kept. The first call in a
    process sets ``torch._dynamo.config.skip_nnmodule_hook_guards`` to false and drops code compiled
    until then, so that compiled code and hooks never pass each other by.

    Args:
        model: Any module with attention layers that :func:`~spanopt.find_attention` finds.
        scales: Scales by layer name or pattern, see :func:`~spanopt.scale.resolve_scales`; one
            :class:`~spanopt.SpanScale` for all. Left out it is ``{"*": SpanScale()}``, which
            changes nothing until the scales are edited, and says so in a warning.
        ridge: As in :func:`~spanopt.project`.
        on_missing: What to do about a layer that was asked for and turns out not to be scaled:
            ``"error"``, ``"warn"`` or ``"ignore"``.
        projections: Where Q and K are in layers whose attention can't be seen, such as one in a
            kernel of its own, by layer name or pattern:
            ``{"blocks.0.attn": {"query": "wq", "key": "wk", "num_heads": 8}}``. See
            :func:`~spanopt.taps.projection.projections_of` for fused outputs.
        example_inputs: Inputs for one forward pass that checks now what only a forward pass can
            tell: a tuple of positional arguments, a dict of keyword arguments, or one argument.
            Random state and the values of buffers are restored after it.
        parameters: What will be trained. When given, a scaled layer that has trainable parameters
            and none of them here is an error.
        projection: What counts as the parallel part: the name of a setup of :mod:`spanopt.setups`
            or a function of that kind, for all layers or by layer name or pattern.
        preserve_norm: Whether a rescaled gradient gets the norm of the given one, for each sequence
            and head; likewise.

    Returns:
        The hooks.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No attention layer, a key that matches none, a bad scale or ridge, or a layer
            that another attachment scales already.
        UnscaledLayerError: With ``example_inputs``, a layer that calls no attention.

    Example:
        >>> import torch
        >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
        >>> x = torch.randn(5, 1, 8)
        >>> with attach(model, {"*": SpanScale(parallel=2.0, violation=1.0)}):
        ...     model(x, x, x)[0].sum().backward()
    """
    if on_missing not in _ON_MISSING:
        raise ValueError(f"on_missing must be one of {_ON_MISSING}, got {on_missing!r}")
    rules = Rules(ridge, projection, preserve_norm)
    planned = plan(model, scales, projections, rules=rules, parameters=parameters)
    hooks = SpanHooks(on_missing, unwrap(model))
    try:
        hooks.add(planned)
        _let_compiled_code_notice_hooks()
        _keep_eager_taps_eager()
        if example_inputs is not None:
            hooks.probe(model, example_inputs)
    except BaseException:
        hooks.remove()
        raise
    return hooks


ProjectionLike: TypeAlias = "str | Setup | Mapping[str, str | Setup]"


@dataclass(frozen=True)
class Rules:
    """How gradients are rescaled, beside the scales: arguments of :func:`attach`.

    Attributes:
        ridge: As in :func:`attach`.
        projection: Likewise.
        preserve_norm: Likewise.
    """

    ridge: float | None = None
    projection: ProjectionLike = "span"
    preserve_norm: bool | Mapping[str, bool] = False

    def of(self, names: Sequence[str]) -> dict[str, Method]:
        """Give each layer its method.

        Args:
            names: Of the attention layers.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: A key that matches no layer, or no such projection.

        Example:
            >>> Rules(projection={"a": "cross"}).of(["a", "b"])["a"].setup
            'cross'
        """
        check_ridge(self.ridge)
        setups = _per_layer(self.projection, names, "projection", setup_name, "span")
        keep = _per_layer(self.preserve_norm, names, "preserve_norm", _flag, False)
        return {name: Method(self.ridge, setups[name], keep[name]) for name in names}


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


@dataclass(frozen=True)
class Plan:
    """Which layers of a model to scale and how: from :func:`plan`, for :meth:`SpanHooks.add`.

    Attributes:
        sites: The attention layers.
        scales: The scale of each by name, ``None`` to leave it alone.
        methods: How the gradients of each are rescaled otherwise.
        projections: Where Q and K are, for the layers whose attention can't be seen.
    """

    sites: list[AttentionSite]
    scales: dict[str, SpanScale | None]
    methods: dict[str, Method]
    projections: dict[str, list[Projection]]


def plan(
    model: nn.Module,
    scales: Mapping[str, ScaleLike | None] | SpanScale | None = None,
    projections: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    rules: Rules = Rules(),
    parameters: Iterable[Tensor] | None = None,
    hooks: SpanHooks | None = None,
) -> Plan:
    """Find what to scale, and check all that can be before anything is installed.

    Args:
        model: As in :func:`attach`.
        scales: Likewise.
        projections: Likewise.
        rules: Likewise.
        parameters: Likewise.
        hooks: Hooks whose layers are left out, and with them those that are not trained yet, for
            layers that came to the model later.

    Returns:
        The plan.

    Raises:
        TypeError: As in :func:`attach`.
        ValueError: As in :func:`attach`.

    Example:
        >>> plan(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).scales
        {'self_attn': SpanScale(parallel=2.0, violation=1.0, query=None, key=None)}
    """
    sites, projected = _project_sites(model, find_attention(model), projections or {})
    if not sites and hooks is None:
        raise ValueError(
            f"no attention layer found in {type(model).__name__}. Looked for "
            "nn.MultiheadAttention, for code that calls torch.nn.functional."
            "scaled_dot_product_attention or multiplies matrices and takes a softmax, and for "
            f"modules that own a query and a key projection (q_proj and k_proj, to_q and to_kv, "
            f"qkv, ...). {_BY_HAND}"
        )
    before = [] if hooks is None else hooks.sites  # by their keys too, when they are gone by now
    names = {site.name: None for site in (*sites, *before)}
    if scales is None and hooks is None:
        warnings.warn(
            "no scales were given, and by default gradients stay as they are: pass, say, "
            "scales={'*': SpanScale(parallel=2.0, violation=1.0)}, or scales=SpanScale() to edit "
            "them later",
            stacklevel=3,
        )
    resolved = resolve_scales(scales, list(names))
    methods = rules.of(list(names))
    for site in sites:  # a layer that is asked for by name is attention
        site.certain = site.certain or (isinstance(scales, Mapping) and site.name in scales)
    if hooks is not None:
        sites = _new_sites(model, sites, before, parameters)
    scaled = [site for site in sites if resolved[site.name] is not None]
    _check_unclaimed(scaled)
    if parameters is not None:
        _check_trained([site for site in scaled if site.certain], parameters)
    return Plan(sites, resolved, methods, projected)


def _new_sites(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    hooked: Sequence[AttentionSite],
    parameters: Iterable[Tensor] | None,
) -> list[AttentionSite]:
    """Return the sites that are not hooked yet and whose parameters are trained by now."""
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


def table(hooks: SpanHooks) -> str:
    """Describe what is installed, a line per attention layer.

    Args:
        hooks: The installed hooks.

    Returns:
        A text table: layer, class, tap, heads, head dimension, scales.

    Example:
        >>> from torch import nn
        >>> print(table(attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))))
        layer      class               tap     heads  head dim  query (par, vio)  key (par, vio)
        self_attn  MultiheadAttention  packed  2      4         2.0, 1.0          2.0, 1.0
    """
    groups = {group["name"]: group for group in hooks.groups}
    rows: list[Sequence[str]] = [
        ("layer", "class", "tap", "heads", "head dim", "query (par, vio)", "key (par, vio)")
    ]
    for site in hooks.sites:
        scales = ["left alone", "left alone"]
        if site.name in groups:
            scale = groups[site.name].scale
            scales = [", ".join(map(str, scale.side(side))) for side in ("query", "key")]
        rows.append((*described(site), *scales))
    return aligned(rows)


def described(layer: Any) -> tuple[str, ...]:
    """Return name, class, tap, heads and head dimension of a layer, as cells of a table.

    Args:
        layer: An :class:`~spanopt.sites.AttentionSite`, or what has its fields.

    Example:
        >>> from torch import nn
        >>> described(find_attention(nn.TransformerEncoderLayer(8, nhead=2))[0])
        ('self_attn', 'MultiheadAttention', 'packed', '2', '4')
    """
    heads = "?" if layer.heads is None else str(layer.heads)
    if layer.kv_heads != layer.heads:
        heads += f"/{layer.kv_heads}"
    head_dim = "?" if layer.head_dim is None else str(layer.head_dim)
    return layer.name or '""', layer.class_name, layer.tap or "?", heads, head_dim


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text with their columns aligned.

    Example:
        >>> print(aligned([("a", "b"), ("long", "c")]))
        a     b
        long  c
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


class _Hook:
    """A hook that neither a deep copy nor a pickle of the model carries along."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if _is_exporting():
            raise RuntimeError(
                f"layer {self.tap.site.name!r} is hooked by spanopt, which an exported program "
                "would silently lose: detach() the optimizer or remove() the hooks first"
            )
        if torch.is_grad_enabled() or thread.probing:
            self.tap.enter((args, kwargs))
        elif not torch.compiler.is_compiling():
            self.tap.pass_by()


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        # Eagerly whatever the grad mode is by now, and whether or not the tap was entered: another
        # pre-hook, put before ours, may have raised an exception.
        if torch.is_grad_enabled() or thread.probing or not torch.compiler.is_compiling():
            self.tap.leave()


class _Output(_Hook):
    """On a projection of a layer with the projection tap."""

    def __init__(self, tap: ProjectionTap, projection: Projection) -> None:
        super().__init__(tap)
        self.projection = projection

    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        assert isinstance(self.tap, ProjectionTap)
        return self.tap.on_output(self.projection, result)


class _CheckCalled:
    """On the whole model: complains at once of all layers that have run without attention."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = taps

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.is_grad_enabled() or thread.probing:
            _check_called(self.taps)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


_BY_HAND = (
    "To say where Q and K are, pass projections={layer: {'query': ..., 'key': ..., 'num_heads': "
    "...}} with the names of the modules whose outputs they are; or write "
    "q = spanopt.span_node(q, parallel, violation), and the same for k, in the layer's forward, "
    "which then needs no scale here"
)


def _check_called(taps: Sequence[Tap], only_entered: bool = True) -> None:
    missing = [
        tap
        for tap in taps
        if not tap.called and tap.is_attention() and (tap.entered or not only_entered)
    ]
    if not missing:
        return
    scaled = [tap for tap in taps if tap.called]
    raise UnscaledLayerError(
        f"not scaled: layer{'s' if len(missing) > 1 else ''} {_listed(missing)}; scaled: "
        f"{_listed(scaled)}. A layer that is not scaled called no attention that can be seen: "
        "neither torch.nn.functional.scaled_dot_product_attention nor "
        "multi_head_attention_forward, nor a product of Q and K that a softmax is taken of. "
        "flex_attention and other kernels can't be seen into. "
        f"{_BY_HAND}. If a layer is to be left alone, give it the scale None; if it skips "
        "attention on purpose, pass on_missing='warn' or 'ignore'"
    )


def _listed(taps: Sequence[Tap]) -> str:
    return ", ".join(f"{tap.site.name!r} ({tap.site.class_name})" for tap in taps) or "none"


def _drop_inert(module: nn.Module) -> None:
    """Drop what is left of hooks in a copy of a model."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook is _inert]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _project_sites(
    model: nn.Module,
    sites: list[AttentionSite],
    projections: Mapping[str, Mapping[str, Any]],
) -> tuple[list[AttentionSite], dict[str, list[Projection]]]:
    """Return the sites with those that the user says where Q and K are in, and where."""
    if not isinstance(projections, Mapping):
        raise TypeError(
            "projections must be a dict from layer names or patterns to dicts such as "
            f'{{"query": "wq", "key": "wk", "num_heads": 8}}, got {type(projections).__name__}'
        )
    if not projections:
        return sites, {}
    modules = dict(named_modules(model))
    projected: dict[str, list[Projection]] = {}
    for pattern, spec in projections.items():
        matched = [pattern]
        if pattern not in modules:
            matched = [
                name
                for name in fnmatch.filter(modules, pattern)
                if owns_projections(modules[name], spec)
            ]
        if not matched:
            raise ValueError(
                f"projections: {pattern!r} matches no module of {type(model).__name__} that has "
                f"the modules named in {dict(spec)}; attention layers are "
                f"{[site.name for site in sites]}"
            )
        for name in matched:
            if name in projected:
                raise ValueError(f"projections: layer {name!r} is matched more than once")
            projected[name] = projections_of(name, modules[name], spec)
    by_name = {site.name: site for site in sites}
    for name in projected:
        by_name = {other: site for other, site in by_name.items() if not is_inside(other, name)}
        by_name[name] = AttentionSite(name, modules[name], "projection")
    return [by_name[name] for name in modules if name in by_name], projected


def _is_exporting() -> bool:
    return getattr(torch.compiler, "is_exporting", bool)()


def _inert(*args: Any) -> None:
    """Stand in for a hook in a copy of a model."""


def _no_hook() -> Callable[..., None]:
    return _inert


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
    """Whether a layer has trainable parameters, and none of them is among those trained, by id."""
    trainable = {id(p) for p in site.module.parameters() if p.requires_grad}
    return bool(trainable) and not trainable & trained


def _check_trained(sites: Sequence[AttentionSite], parameters: Iterable[Tensor]) -> None:
    trained = set(map(id, parameters))
    for site in sites:
        if _is_left_out(site, trained):
            raise ValueError(
                f"layer {site.name!r} is to be scaled, but none of its trainable parameters is "
                "in the optimizer: add them to it, or leave the layer alone with the scale None"
            )


def _let_compiled_code_notice_hooks() -> None:
    """Have torch.compile guard on hooks, so that compiled code is never run in their place.

    By default it takes a module without hooks to stay so (pytorch#117758): a model that was
    compiled and run before it was hooked, or one of the same class as a model that was, would be
    silently unscaled. What was compiled under the default is compiled anew.
    """
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def _keep_eager_taps_eager() -> None:
    """Have torch.compile leave a tap alone that is called by code that it does not compile.

    That is so after a graph break. Compiled by itself, the tap could be given the result of another
    function: Dynamo tells functions by their address, and that of ``Tensor.is_nested.__get__`` and
    its like is free for another one after the call. In compiled code the tap is traced as ever.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    for tap in (Tap, ProjectionTap):
        code = tap.__torch_function__.__code__
        if hasattr(dynamo, "set_code_exec_strategy"):
            skip = dynamo._FrameAction.SKIP  # this frame, and those that it calls
            dynamo.set_code_exec_strategy(code, dynamo._FrameExecStrategy(skip, skip))
        else:  # torch 2.6
            dynamo.skip_code(code)
