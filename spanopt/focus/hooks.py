"""The hooks that put focus on a model's attention layers and take it off."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spanopt.compiling import constant_when_traced, hold, let_go
from spanopt.errors import what_was_seen
from spanopt.focus.focusing import LayerFocus, UnfocusedLayerError
from spanopt.focus.spec import Focus
from spanopt.patterns import matching
from spanopt.rescaling import Rescaling
from spanopt.scale import SpanScale
from spanopt.sites import AttentionSite, find_attention
from spanopt.taps import handlers
from spanopt.taps.calls import live_taps, taps_by_name
from spanopt.taps.focusing import focusing_of
from spanopt.taps.module_hooks import Enter, Hook, Leave, drop_inert
from spanopt.taps.stack import remove_stale
from spanopt.taps.tap import Tap

__all__ = ["FocusHooks", "UnfocusedLayerError", "focus"]


def focus(
    model: nn.Module,
    layers: Mapping[str, Focus | None] | Focus,
    *,
    optimizer: Any = None,
) -> FocusHooks:
    """Let the queries of attention layers attend to chosen keys only, in a changed forward pass.

    The same layers can also be span-scaled, before or after. Spans are still those of all real
    tokens.

    Args:
        model: Any module with attention layers that :func:`~spanopt.find_attention` finds.
        layers: A dict of :class:`Focus` by layer name or pattern, as for scales, or one
            :class:`Focus` for all layers. ``None`` leaves a layer as it is.
        optimizer: The optimizer whose steps are counted, if ``k`` is a schedule. By default no
            steps are counted, and you must call :meth:`FocusHooks.step` after each optimizer step.

    Returns:
        The hooks. They stay until :meth:`FocusHooks.remove`, or to the end of a ``with`` block.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No attention layer, a key that matches no layer, or a layer that has focus
            already.

    Example:
        >>> import torch
        >>> from spanopt.focus import Focus, focus
        >>> model = torch.nn.TransformerEncoderLayer(8, nhead=2, batch_first=True, dropout=0.0)
        >>> x = torch.randn(1, 5, 8)
        >>> plain = model(x)
        >>> with focus(model, {"*": Focus(k=2)}):
        ...     focused = model(x)
        >>> torch.equal(focused, plain), torch.equal(model(x), plain)
        (False, True)
    """
    given = layers if isinstance(layers, Mapping) else {"*": layers}
    for name, one in given.items():
        if one is not None and not isinstance(one, Focus):
            raise TypeError(
                f"focus[{name!r}] must be a Focus or None, got {one!r}: write Focus(k=8)"
            )
    sites = find_attention(model)
    if not sites:
        raise ValueError(
            f"no attention layer found in {type(model).__name__}; see spanopt.find_attention"
        )
    chosen = matching(given, [site.name for site in sites], "focus")
    for site in sites:
        site.asked = site.name in given
        if chosen.get(site.name) is not None and site.module in focusing_of:
            raise ValueError(
                f"layer {site.name!r} has focus already: call its remove() first, or give the "
                "layer to one of them only"
            )
    return FocusHooks(sites, chosen, optimizer)


class FocusHooks:
    """The focus on the layers of one model, as :func:`focus` returns it.

    It is a context manager. When its block ends, the model is as it was before.

    Attributes:
        layers: The focus of each layer, by name.
        steps: The number of optimizer steps taken, for schedules.

    Example:
        >>> from torch import nn
        >>> from spanopt.focus import Focus, focus
        >>> hooks = focus(nn.TransformerEncoderLayer(8, nhead=2), Focus(4, "window"))
        >>> hooks
        FocusHooks(self_attn: Focus(k=4, kind='window', always=(), training_only=False))
        >>> hooks.remove()
    """

    def __init__(
        self, sites: list[AttentionSite], layers: Mapping[str, Focus | None], optimizer: Any
    ) -> None:
        chosen = {name: one for name, one in layers.items() if one is not None}
        self.layers: dict[str, Focus] = chosen
        self.steps: int = 0
        self._of_module: dict[nn.Module, LayerFocus] = {}
        self._taps: list[Tap] = []
        self._handles: list[Any] = []
        focused = [site for site in sites if site.name in self.layers]
        inside = {inner for site in focused for inner in site.module.modules()}
        for site in focused:
            layer = LayerFocus(self.layers[site.name])
            self._of_module[site.module] = focusing_of[site.module] = layer
        for site in sites:
            # A layer that is left alone inside one with focus is shielded by its own tap.
            if site.module in inside and site.module not in focusing_of:
                self._of_module[site.module] = focusing_of[site.module] = LayerFocus(Focus(None))
        for tap in live_taps:
            tap.focus = self._of_module.get(tap.site.module, tap.focus)
        for site in sites:
            if site.module in self._of_module:
                self._put(site)
        if optimizer is not None:
            after = optimizer.register_step_post_hook(lambda *_: self.step())
            self._handles.append(after)

    def _put(self, site: AttentionSite) -> None:
        tap = Tap(site, SpanScale(1.0, 1.0), Rescaling(), handlers())
        self._taps.append(tap)
        module = site.module
        drop_inert(module)
        self._handles += [
            module.register_forward_pre_hook(_Enter(tap), prepend=True, with_kwargs=True),
            module.register_forward_hook(_Leave(tap), always_call=True),
        ]
        if site.name in self.layers:
            begin = module.register_forward_pre_hook(_Begin(tap), prepend=True, with_kwargs=True)
            self._handles += [begin, module.register_forward_hook(_Check(tap), with_kwargs=True)]
        hold(tap)

    def step(self) -> None:
        """Count an optimizer step. Schedules of ``k`` move on for the next forward pass.

        Raises:
            TypeError: A schedule returned something that is not a number.
            ValueError: A schedule returned a number that rounds to less than 1.

        Example:
            >>> import spanopt
            >>> from torch import nn
            >>> from spanopt.focus import Focus, focus
            >>> model = nn.TransformerEncoderLayer(8, nhead=2)
            >>> with focus(model, Focus(spanopt.linear(2, 9, 5))) as hooks:
            ...     hooks.step()
            ...     hooks.keys("self_attn")
            7
        """
        self.steps += 1
        for layer in self._of_module.values():
            layer.keeping = layer.focus.at(self.steps)

    def keys(self, name: str) -> int | None:
        """Return how many keys a layer's queries keep now; ``None`` means all.

        Args:
            name: Name of the layer.

        Raises:
            KeyError: The layer has no focus.
        """
        keeping = self.layers[name].at(self.steps)
        return None if keeping is None else keeping.k

    def remove(self) -> None:
        """Take everything off the model. Calling it twice is harmless.

        Example:
            >>> from torch import nn
            >>> from spanopt.focus import Focus, focus
            >>> focus(nn.TransformerEncoderLayer(8, nhead=2), Focus(4)).remove()
        """
        if not self._taps:
            return
        while self._handles:
            self._handles.pop().remove()
        for module, layer in self._of_module.items():
            if focusing_of.get(module) is layer:
                del focusing_of[module]
        for tap in live_taps:
            if self._of_module.get(tap.site.module) is tap.focus:
                tap.focus = None
        for tap in self._taps:
            tap.removed = True
            let_go(tap)
        remove_stale()
        scheduled = [name for name, one in self.layers.items() if callable(one.k)]
        if scheduled and not self.steps:
            warnings.warn(
                f"focus on layer {scheduled[0]!r} has a schedule of k, and no step was counted: "
                "pass optimizer= to focus(), or call step() of what it returns",
                stacklevel=2,
            )
        self._of_module, self._taps = {}, []

    def __enter__(self) -> FocusHooks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        layers = ", ".join(f"{name or repr('')}: {one}" for name, one in self.layers.items())
        return f"FocusHooks({layers})"


@constant_when_traced
def _stands_aside(unique_name: str) -> bool:
    """Return whether a tap stays idle since another tap scales or shields its layer."""
    own = taps_by_name.get(unique_name)
    return own is None or any(
        tap is not own and tap.site.module is own.site.module and not tap.removed
        for tap in live_taps
    )


class _Enter(Enter):
    """A forward pre-hook that enters a tap of focus, unless the layer's other tap does the work."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not _stands_aside(self.tap.unique_name):
            super().__call__(module, args, kwargs)


class _Leave(Leave):
    """A forward hook that leaves the tap which :class:`_Enter` entered."""

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        if not _stands_aside(self.tap.unique_name):
            super().__call__(module, args, result)


class _Begin(Hook):
    """A forward pre-hook, which notes that the layer's attention is not seen yet."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if any(isinstance(x, Tensor) and x.is_nested for x in (*args, *kwargs.values())):
            raise TypeError(
                f"layer {self.tap.site.name!r} is called on a nested tensor, in which focus can't "
                "choose keys: pad it to a dense tensor, as enable_nested_tensor=False has "
                "nn.TransformerEncoder do, or leave the layer out"
            )
        assert isinstance(self.tap.focus, LayerFocus)
        self.tap.focus.reached = False


class _Check(Hook):
    """A forward hook, which raises an error if the layer's attention was not seen."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        tap, focus = self.tap, self.tap.focus
        assert isinstance(focus, LayerFocus)
        if focus.reached or not focus.acts(tap, args, kwargs):
            return
        if tap.site.certain or tap.site.asked or tap.account.ever_lost:
            raise focus.unseen(tap, what_was_seen(tap.site))
