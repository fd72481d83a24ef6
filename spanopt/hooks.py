"""Installing taps on a model's attention layers and taking them off again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spanopt.compiling import run_eagerly
from spanopt.errors import no_attention_called, not_scaled_since_step, unclear_mask
from spanopt.groups import SpanGroup, scales_of
from spanopt.node import Method
from spanopt.patterns import check_same_layers
from spanopt.plan import LayerPlan, claim, release
from spanopt.probing import run_once
from spanopt.scale import SpanScale
from spanopt.sites import AttentionSite, named_modules
from spanopt.table import table
from spanopt.taps import HANDLERS
from spanopt.taps.account import projection_of
from spanopt.taps.module_hooks import (
    Enter,
    Leave,
    NoteMasks,
    Output,
    Projected,
    drop_inert,
    no_hook,
)
from spanopt.taps.projection import ProjectionTap
from spanopt.taps.tap import Tap, remove_stale, thread
from spanopt.taps.watcher import Watcher, Watchers

__all__ = ["SpanHooks"]


class SpanHooks:
    """The taps installed on one model; what :func:`spanopt.attach` returns.

    A context manager: on leaving, the model is as it was before.

    Attributes:
        sites: The attention layers of the model, scaled or not.
        groups: One editable :class:`~spanopt.groups.SpanGroup` per scaled layer.

    Example:
        >>> from torch import nn
        >>> from spanopt import attach
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
        self._watchers: list[tuple[Watcher, Callable[[], None]]] = []
        self._root = root
        self._noted: dict[nn.Module, NoteMasks] = {}
        if root is not None and on_missing == "error":
            drop_inert(root)
            self._handles[None].append(root.register_forward_hook(_CheckCalled(self._taps)))

    def add(self, layers: Sequence[LayerPlan]) -> None:
        """Install the taps of further layers.

        Args:
            layers: What to install, from :func:`spanopt.plan.plan`.

        Raises:
            ValueError: The number of per-head values is not a layer's number of heads. Nothing is
                installed then.

        Example:
            >>> from torch import nn
            >>> from spanopt.plan import Request, plan
            >>> hooks = SpanHooks(on_missing="error")
            >>> hooks.add(plan(nn.TransformerEncoderLayer(8, nhead=2), Request({"*": (2.0, 1.0)})))
            >>> hooks.unseen()
            ['self_attn']
        """
        taps: list[Tap] = []
        groups: list[SpanGroup] = []
        shields: list[Tap] = []
        scaled = (layer.site.module for layer in layers if layer.scale is not None)
        inside = {inner for outer in scaled for inner in outer.modules()}
        for layer in layers:
            site, scale, method = layer.site, layer.scale, layer.method
            if scale is not None:
                if layer.outputs is not None:
                    tap: Tap = ProjectionTap(site, scale, method, layer.outputs)
                else:
                    tap = Tap(site, scale, method, HANDLERS)
                taps.append(tap)
                groups.append(SpanGroup(site.name, scale, tap.set_scale))
            elif site.module in inside:
                # The layer is left alone inside one that is scaled: an idle tap shields it.
                shields.append(Tap(site, SpanScale(1.0, 1.0), Method(), HANDLERS))
        for tap in (*taps, *shields):
            self._install(tap)
        self._note_masks(taps)
        self.groups += groups
        self._groups += groups
        self.sites += [layer.site for layer in layers]
        self._taps += taps
        self._shields += shields
        self._tell_taps()

    def _install(self, tap: Tap) -> None:
        """Put the module hooks of a tap on its layer."""
        module = tap.site.module
        drop_inert(module)
        # Prepended, and the forward hook is called always: an exception leaves no mode entered.
        handles = self._handles[tap] = [
            module.register_forward_pre_hook(Enter(tap), prepend=True, with_kwargs=True),
            module.register_forward_hook(Leave(tap), always_call=True),
        ]
        projection_module = projection_of(module, tap.site.query_key_parameters())
        if projection_module is not None:
            drop_inert(projection_module)
            handles.append(projection_module.register_forward_hook(Projected(tap)))
        if isinstance(tap, ProjectionTap):
            for projection in tap.projections:
                drop_inert(projection.module)
                hook = Output(tap, projection)
                handles.append(projection.module.register_forward_hook(hook))
        claim(module)

    def _note_masks(self, taps: Sequence[Tap]) -> None:
        """Have the padding masks noted that the layers and the modules around them are given."""
        around: dict[str, list[Tap]] = {}
        for tap in taps:
            parts = tap.site.name.split(".") if tap.site.name else []
            for count in range(len(parts) + 1):
                around.setdefault(".".join(parts[:count]), []).append(tap)
        for name, module in () if self._root is None else named_modules(self._root):
            if name not in around:
                continue
            note = self._noted.get(module) or NoteMasks(module)
            if not note.is_needed:
                continue
            if module not in self._noted:
                self._noted[module] = note
                drop_inert(module)
                hook = module.register_forward_pre_hook(note, with_kwargs=True)
                self._handles[None].append(hook)
            for tap in around[name]:
                tap.noted = (*tap.noted, note)

    def drop(self, modules: Iterable[nn.Module]) -> None:
        """Take the taps off layers, as off those that are no longer in the model.

        Args:
            modules: The layers; others are passed over.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
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
        """Return the scaled layers of which a part is not scaled since :meth:`forget`.

        Those are layers whose Q and K were not seen in a forward pass with gradients, and layers
        that a backward pass went through past the hooks, as far as that is noticed: through a call
        in which no attention was seen, or through a forward that was called directly.

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
        missing = [
            tap for tap in self._taps if tap.is_attention() and not tap.account.is_complete()
        ]
        if not missing and not any(tap.account.seen for tap in self._taps):
            missing = self._taps  # nothing at all was scaled, though layers may be attention
        return [tap.site.name for tap in missing]

    def forget(self) -> None:
        """Forget which layers were seen, as after an optimizer step.

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

    def check(self) -> None:
        """Complain, as ``on_missing`` says, of every scaled layer that was not seen.

        Raises:
            UnscaledLayerError: There is one, and ``on_missing`` is ``"error"``.
            ValueError: An entry of ``groups`` was replaced rather than edited, or an attention
                mask does not tell which tokens are real, see :meth:`check_masks`.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).check()
            Traceback (most recent call last):
            ...
            spanopt.errors.UnscaledLayerError: not scaled since the last step: ...
        """
        self.check_masks()
        missing = self.unseen()
        if not missing or self._on_missing == "ignore":
            return
        error = not_scaled_since_step(
            [tap.site for tap in self._taps if tap.site.name in missing],
            [tap.site for tap in self._taps if tap.account.is_complete()],
            [(tap.site.name, way) for tap in self._taps for way in tap.account.ways_past()],
        )
        if self._on_missing == "error":
            self.forget()
            raise error
        warnings.warn(str(error), stacklevel=3)

    def compare(self, has_come: Callable[[nn.Parameter], bool]) -> None:
        """Note the layers that got gradients by a way around the calls that were seen.

        Args:
            has_come: Tells whether a parameter has got a gradient since the last step. It is asked
                only about layers whose calls no backward pass went through.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.compare(lambda parameter: False)
        """
        waiting = [tap for tap in self._taps if tap.account.waiting and not tap.account.passed]
        if not waiting:
            return
        owners = Counter(p for tap in self._taps for p in set(tap.site.module.parameters()))
        for tap in waiting:
            parameters = tap.site.query_key_parameters()
            tap.account.around = any(owners[p] == 1 and has_come(p) for p in parameters)

    def check_masks(self) -> None:
        """Refuse attention masks that did not tell which tokens are real.

        In eager code on the CPU the forward pass raises that error. On an accelerator and in
        compiled code it would have to wait for the device, so it is raised here, and this waits.

        Raises:
            ValueError: There was such a mask since :meth:`forget`.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).check_masks()
        """
        taps = [tap for tap in self._taps if tap.deferred]
        if not taps:
            return
        device = taps[0].unclear.device
        unclear = torch.cat([tap.unclear.to(device) for tap in taps]).tolist()
        names = [tap.site.name for tap, count in zip(taps, unclear, strict=True) if count]
        if names:
            self.forget()
            raise unclear_mask(names)

    def probe(self, model: nn.Module, example_inputs: Any) -> None:
        """Run one forward pass, to learn what only that can tell.

        Args:
            model: The model.
            example_inputs: A tuple of positional arguments, a dict of keyword arguments, or one
                argument.

        Raises:
            UnscaledLayerError: A scaled layer calls no attention, and ``on_missing`` is
                ``"error"``.

        Example:
            >>> import torch
            >>> from spanopt import attach
            >>> model = torch.nn.TransformerEncoderLayer(8, nhead=2)
            >>> hooks = attach(model, SpanScale(2.0))
            >>> hooks.probe(model, torch.randn(5, 1, 8))
            >>> hooks.sites[0].query_length
            5
        """
        try:
            thread.probing = True
            run_once(model, example_inputs)
            if self._on_missing == "error":
                _check_called(self._taps, only_entered=False)
            self.check_masks()
        finally:
            thread.probing = False
            self.forget()

    def has_run(self, site: AttentionSite) -> bool:
        """Return whether a layer has run while it was hooked.

        Args:
            site: One of ``sites`` that is scaled.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.has_run(hooks.sites[0])
            False
        """
        return any(tap.entered for tap in self._taps if tap.site is site)

    def is_attention(self, site: AttentionSite) -> bool:
        """Return whether a layer is attention, as far as its code and its forward passes tell.

        Args:
            site: One of ``sites`` that is scaled.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.is_attention(hooks.sites[0])
            True
        """
        return any(tap.is_attention() for tap in self._taps if tap.site is site)

    def hold(self, names: Iterable[str]) -> None:
        """Compute the projection in these layers whatever the scales are, as under a schedule.

        Equal factors need none, and without it compiled code would be compiled anew when they
        come to differ.

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
        """Have somebody told of Q, K and their gradients, from the next forward pass on.

        Until it is stopped, what ``torch.compile`` has compiled runs eagerly in this process:
        compiled code has no Python in it that could tell anything.

        Args:
            watcher: Who is told.

        Returns:
            A function without arguments that stops it. :meth:`remove` stops it too.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> from spanopt.measures import Sample
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
        """Have the taps tell those who watch now."""
        watchers = [watcher for watcher, _ in self._watchers]
        of_all: Watcher | None = Watchers(watchers) if watchers else None
        for tap in self._taps:
            tap.watcher = of_all

    def state_dict(self) -> dict[str, Any]:
        """Return the scales, as numbers, strings, lists, dicts and ``None``.

        With :meth:`load_state_dict` this makes the hooks an entry of what
        ``torch.distributed.checkpoint`` saves and loads.

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
            state_dict: From :meth:`state_dict`.

        Raises:
            ValueError: It names other layers, or holds what is no scale. The scales are then as
                they were.

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
            scales: By name of layer; others keep theirs.

        Raises:
            ValueError: A number of per-head values that is not a layer's. All scales are then as
                they were.

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

    def remove(self) -> None:
        """Take everything off the model. Doing it twice is harmless.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.remove()
        """
        while self._watchers:
            self._watchers.pop()[1]()
        self._tell_taps()
        for tap in (None, *self._taps, *self._shields):
            self._take_off(tap)
        remove_stale()

    def _take_off(self, tap: Tap | None) -> None:
        """Take a tap off its layer, or what is on the whole model off that; once."""
        for handle in self._handles.pop(tap, ()):
            handle.remove()
        if tap is not None and not tap.removed:  # another attachment may have the layer by now
            tap.removed = True
            release(tap.site.module)

    def __enter__(self) -> SpanHooks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return table(self.sites, self._groups)


class _CheckCalled:
    """A forward hook on the whole model: complain of layers that have run without attention."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = taps

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.is_grad_enabled() or thread.probing:
            _check_called(self.taps)

    def __reduce__(self) -> tuple[Any, ...]:
        return no_hook, ()


def _check_called(taps: Sequence[Tap], only_entered: bool = True) -> None:
    missing = [
        tap.site
        for tap in taps
        if not tap.called and tap.is_attention() and (tap.entered or not only_entered)
    ]
    if missing:
        raise no_attention_called(missing, [tap.site for tap in taps if tap.called])
