"""The scaled layers of one model: their scales, what was seen of them, and their watchers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from spanopt.compiling import run_eagerly
from spanopt.groups import SpanGroup, scales_of
from spanopt.patterns import check_same_layers
from spanopt.scale import SpanScale
from spanopt.sites import AttentionSite
from spanopt.taps.tap import Tap
from spanopt.taps.telling import Watcher, Watchers
from spanopt.unscaled import unscaled

__all__ = ["ScaledLayers"]


class ScaledLayers:
    """The scaled layers of a hooked model. This is the base class of :class:`spanopt.SpanHooks`.

    Attributes:
        groups: One editable :class:`~spanopt.groups.SpanGroup` per scaled layer.
    """

    def __init__(self) -> None:
        self.groups: list[SpanGroup] = []
        self._groups: list[SpanGroup] = []
        self._taps: list[Tap] = []
        self._watchers: list[tuple[Watcher, Callable[[], None]]] = []

    def unseen(self) -> list[str]:
        """Return the scaled layers that were not, or not wholly, scaled since :meth:`forget`.

        These are layers whose Q and K were not seen in a forward pass with gradients. They are also
        layers that a backward pass went through past the hooks, as far as that is noticed. Such a
        pass goes through a call without visible attention, or a forward that was called directly.

        Returns:
            Their names.

        Raises:
            ValueError: An entry of ``groups`` was replaced, added or removed.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).unseen()
            ['self_attn']
        """
        if [*map(id, self.groups)] != [*map(id, self._groups)]:
            raise ValueError(
                "an entry of span_groups was replaced, added or removed, which scales nothing: "
                "set the fields of the entries that are there"
            )
        return [tap.site.name for tap in unscaled(self._taps)]

    def forget(self) -> None:
        """Forget which layers were seen, for example after an optimizer step.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).forget()
        """
        for tap in self._taps:
            if tap.account.seen and tap.watcher is not None:
                tap.watcher.ran(tap.site.name)
            tap.account.forget()
            tap.forget_tokens()

    def has_run(self, site: AttentionSite) -> bool:
        """Return whether a layer has run while it was hooked.

        Args:
            site: The site of a scaled layer.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.has_run(hooks.sites[0])
            False
        """
        return any(tap.account.entered for tap in self._taps if tap.site is site)

    def is_attention(self, site: AttentionSite) -> bool:
        """Return whether a layer is attention, as far as its code and its forward passes tell.

        Args:
            site: The site of a scaled layer.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.is_attention(hooks.sites[0])
            True
        """
        return any(tap.account.is_attention() for tap in self._taps if tap.site is site)

    def hold(self, names: Iterable[str]) -> None:
        """Hold layers: compute their projection whatever their factors are, as a schedule needs.

        Equal factors need no projection. But if it were left out, compiled code would be recompiled
        when the factors come to differ.

        Args:
            names: Names of layers.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).hold(["self_attn"])
        """
        names = set(names)
        for tap, group in zip(self._taps, self._groups, strict=True):
            if tap.site.name in names:
                tap.held = True
                tap.set_scale(group.scale)

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Tell a watcher of Q, K and their gradients, from the next forward pass on.

        Until this is stopped, code that ``torch.compile`` has compiled runs eagerly in this
        process, since no Python runs in compiled code that could tell the watcher.

        Args:
            watcher: The watcher.

        Returns:
            A function without arguments that stops this. :meth:`remove` stops it too.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> from spanopt.sample import Sample
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> stop = hooks.watch(Sample())
            >>> stop()
        """
        entry = watcher, run_eagerly()
        self._watchers.append(entry)
        self._tell_taps()

        def stop() -> None:
            if entry in self._watchers:
                self._watchers.remove(entry)
                self._tell_taps()
                entry[1]()

        return stop

    def _tell_taps(self) -> None:
        """Give each tap the present watchers."""
        watchers = [watcher for watcher, _ in self._watchers]
        of_all: Watcher | None = Watchers(watchers) if watchers else None
        for tap in self._taps:
            tap.watcher = of_all

    def state_dict(self) -> dict[str, Any]:
        """Return the scales, as numbers, strings, lists, dicts and ``None``.

        Since there is also :meth:`load_state_dict`, ``torch.distributed.checkpoint`` can save and
        load the hooks as one entry.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> list(attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).state_dict())
            ['span_groups']
        """
        return {"span_groups": [group.plain() for group in self.groups]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the scales.

        Args:
            state_dict: A result of :meth:`state_dict`.

        Raises:
            ValueError: It names other layers, or contains something that is not a scale. The
                scales are then left unchanged.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.load_state_dict(hooks.state_dict())
        """
        scales = scales_of(state_dict.get("span_groups"))
        check_same_layers(scales, [group["name"] for group in self.groups])
        self.set_scales(scales)

    def set_scales(self, scales: Mapping[str, SpanScale]) -> None:
        """Set the scales of layers by name.

        Args:
            scales: The scales by name of layer. Layers that are not named keep theirs.

        Raises:
            ValueError: The number of per-head values is not a layer's number of heads. All scales
                are then left unchanged.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
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
