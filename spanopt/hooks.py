"""Installing taps on a model's attention layers and taking them off again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from spanopt.groups import SpanGroup
from spanopt.placement import Placement
from spanopt.plan import LayerPlan, Request, plan
from spanopt.probing import run_once
from spanopt.rescaling import Rescaling
from spanopt.scale import SpanScale
from spanopt.scaled_layers import ScaledLayers
from spanopt.sites import AttentionSite
from spanopt.table import table
from spanopt.taps import handlers
from spanopt.taps.calls import thread
from spanopt.taps.outputs import ProjectionTap
from spanopt.taps.stack import remove_stale
from spanopt.taps.tap import Tap
from spanopt.unscaled import (
    CheckCalled,
    check_called,
    note_ways_around,
    unclear_masks,
    unscaled,
    unscaled_error,
)

__all__ = ["SpanHooks"]


class SpanHooks(ScaledLayers):
    """The taps installed on one model. :func:`spanopt.attach` returns this object.

    It is also a context manager. On leaving, the model is as it was before.

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
        super().__init__()
        self.sites: list[AttentionSite] = []
        self._shields: list[Tap] = []
        self._on_missing = on_missing
        self._placement = Placement(root)
        if on_missing == "error":
            self._placement.put_on_root(CheckCalled(self._taps))

    def add(self, layers: Sequence[LayerPlan]) -> None:
        """Install the taps of further layers.

        Args:
            layers: What to install, from :func:`spanopt.plan.plan`.

        Raises:
            ValueError: The number of per-head values is not a layer's number of heads. Then
                nothing is installed.

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
            site, scale, rescaling = layer.site, layer.scale, layer.rescaling
            if scale is not None:
                if layer.outputs is not None:
                    tap: Tap = ProjectionTap(site, scale, rescaling, layer.outputs)
                else:
                    tap = Tap(site, scale, rescaling, handlers())
                taps.append(tap)
                groups.append(SpanGroup(site.name, scale, tap.set_scale))
            elif site.module in inside:
                # The layer is left alone, inside a layer that is scaled. An idle tap shields it.
                shields.append(Tap(site, SpanScale(1.0, 1.0), Rescaling(), handlers()))
        for tap in (*taps, *shields):
            self._placement.put(tap)
        self._placement.note_masks(taps)
        self._placement.watch_weights(taps)
        self.groups.extend(groups)
        self._groups += groups
        self.sites += [layer.site for layer in layers]
        self._taps += taps
        self._shields += shields
        self._tell_taps()

    @contextlib.contextmanager
    def following(
        self, model: nn.Module, request: Request, parameters: Iterable[Tensor]
    ) -> Iterator[None]:
        """Hook the model's new layers, and unhook layers that are no longer in the model.

        Args:
            model: The model.
            request: What the user asks for.
            parameters: The parameters that will be trained.

        Raises:
            ValueError: A new layer cannot be scaled. Then nothing is installed. Nothing stays
                installed either if the code in the context fails.

        Example:
            >>> from spanopt import attach
            >>> model = nn.Sequential(nn.MultiheadAttention(8, 2))
            >>> hooks = attach(model, SpanScale(2.0))
            >>> model.append(nn.MultiheadAttention(8, 2))[1] is model[1]
            True
            >>> with hooks.following(model, Request(SpanScale(2.0)), model.parameters()):
            ...     pass
            >>> hooks.unseen()
            ['0', '1']
        """
        planned = plan(model, request, parameters=parameters, hooked=self.sites)
        self.add(planned)
        try:
            yield
        except BaseException:
            self.drop(layer.site.module for layer in planned)
            raise
        present = set(model.modules())
        self.drop(site.module for site in [*self.sites] if site.module not in present)

    def drop(self, modules: Iterable[nn.Module]) -> None:
        """Take the taps off layers, for example off layers that are no longer in the model.

        Args:
            modules: The layers. Modules without a tap are ignored.

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
            self._placement.take_off(tap)
            if tap in self._shields:
                self._shields.remove(tap)
                continue
            index = self._taps.index(tap)
            for of_each in (self._taps, self.groups, self._groups):
                del of_each[index]
        self.sites = [site for site in self.sites if site.module not in gone]
        remove_stale()

    def check(self) -> None:
        """Report every scaled layer that was not seen, in the way that ``on_missing`` says.

        Raises:
            UnscaledLayerError: There is such a layer, and ``on_missing`` is ``"error"``.
            ValueError: An entry of ``groups`` was replaced rather than edited, or an attention
                mask does not tell which tokens are real; see :meth:`check_masks`.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).check()
            Traceback (most recent call last):
            ...
            spanopt.errors.UnscaledLayerError: not scaled since the last step: ...
        """
        self.check_masks()
        if not self.unseen() or self._on_missing == "ignore":
            return
        error = unscaled_error(self._taps, unscaled(self._taps))
        if self._on_missing == "error":
            self.forget()
            raise error
        warnings.warn(str(error), stacklevel=3)

    def check_step(self, parameters: Iterable[Tensor], has_come: Callable[[Tensor], bool]) -> None:
        """Report, before an optimizer step, the layers that got gradients which were not scaled.

        Args:
            parameters: The parameters that the optimizer trains.
            has_come: Returns whether a parameter has got a gradient since the last step.

        Raises:
            UnscaledLayerError: There is such a layer, and ``on_missing`` is ``"error"``.
            ValueError: An entry of ``groups`` was replaced rather than edited, or an attention
                mask does not tell which tokens are real.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> hooks = attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0))
            >>> hooks.check_step([], lambda parameter: False)
        """
        remove_stale()
        self.check_masks()
        if self._on_missing == "ignore":
            return
        note_ways_around(self._taps, has_come)
        if self.unseen() and any(map(has_come, parameters)):
            self.check()

    def drop_stale(self) -> None:
        """Take taps off this thread's stack if an interrupt has ended their layer's call.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).drop_stale()
        """
        remove_stale()

    def check_masks(self) -> None:
        """Refuse attention masks that did not tell which tokens are real.

        In eager code on the CPU the forward pass raises this error. On an accelerator and in
        compiled code the forward pass would have to wait for the device. There the error is raised
        here, and this method waits.

        Raises:
            ValueError: There was such a mask since :meth:`forget`.

        Example:
            >>> from torch import nn
            >>> from spanopt import attach
            >>> attach(nn.TransformerEncoderLayer(8, nhead=2), SpanScale(2.0)).check_masks()
        """
        error = unclear_masks(self._taps)
        if error is not None:
            self.forget()
            raise error

    def probe(self, model: nn.Module, example_inputs: Any) -> None:
        """Run one forward pass, to learn what only a forward pass shows.

        Args:
            model: The model.
            example_inputs: A tuple of positional arguments, a dict of keyword arguments, or one
                argument.

        Raises:
            UnscaledLayerError: A scaled layer calls no attention that can be seen, and
                ``on_missing`` is ``"error"``.

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
                check_called(self._taps, only_entered=False)
            self.check_masks()
        finally:
            thread.probing = False
            self.forget()

    def remove(self) -> None:
        """Take everything off the model. Calling this twice is harmless.

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
            self._placement.take_off(tap)
        remove_stale()

    def __enter__(self) -> SpanHooks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return table(self.sites, self._groups)
