"""Putting module hooks on the layers of one model, and taking them off again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from spanopt.compiling import hold, let_go
from spanopt.plan import claim, release
from spanopt.sites import named_modules
from spanopt.taps.module_hooks import Enter, Leave, NoteMasks, Output, Projected, drop_inert
from spanopt.taps.outputs import ProjectionTap
from spanopt.taps.tap import Tap
from spanopt.taps.weights import OwnWeights

__all__ = ["Placement"]


class Placement:
    """The module hooks on one model. Each belongs to a tap, or to the model as a whole.

    Args:
        root: The model; ``None`` if it is not known. Then no padding masks are noted.
    """

    def __init__(self, root: nn.Module | None) -> None:
        self._root = root
        self._handles: dict[Tap | None, list[Any]] = {None: []}
        self._noted: dict[nn.Module, NoteMasks] = {}

    def put_on_root(self, hook: Any) -> None:
        """Put a forward hook on the whole model.

        Args:
            hook: A function that is called like any forward hook of a module.
        """
        if self._root is not None:
            drop_inert(self._root)
            self._handles[None].append(self._root.register_forward_hook(hook))

    def put(self, tap: Tap) -> None:
        """Put the module hooks of a tap on its layer."""
        module = tap.site.module
        drop_inert(module)
        # The pre-hook is the first to run, and the forward hook is always called. So the tap is
        # left even after an exception.
        handles = self._handles[tap] = [
            module.register_forward_pre_hook(Enter(tap), prepend=True, with_kwargs=True),
            module.register_forward_hook(Leave(tap), always_call=True),
        ]
        projection_module = _projection_of(module, tap.site.query_key_parameters())
        if projection_module is not None:
            drop_inert(projection_module)
            handles.append(projection_module.register_forward_hook(Projected(tap)))
        if isinstance(tap, ProjectionTap):
            for projection in tap.projections:
                drop_inert(projection.module)
                hook = Output(tap, projection)
                handles.append(projection.module.register_forward_hook(hook))
        claim(module)
        hold(tap)

    def note_masks(self, taps: Sequence[Tap]) -> None:
        """Put hooks on the layers and the modules around them that note their padding masks."""
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
                tap.verdicts.noted = (*tap.verdicts.noted, note)

    def watch_weights(self, taps: Sequence[Tap]) -> None:
        """Watch the layers' weights, whose gradients show that a layer was used past its hooks."""
        placed = [tap for tap in self._handles if tap is not None]
        hooked = {module for tap in placed for module in tap.site.module.modules()}
        modules = () if self._root is None else self._root.modules()
        # A parameter that unhooked modules have too may rightly be used past the hooks.
        elsewhere = {
            parameter
            for module in modules
            if module not in hooked
            for parameter in module.parameters(recurse=False)
        }
        for tap in taps:
            inside = set(tap.site.module.modules()) - {tap.site.module}
            apart = [other.site.module for other in placed if other.site.module in inside]
            others = elsewhere.union(*(module.parameters() for module in apart))
            own = [p for p in tap.site.query_key_parameters() if p not in others]
            needed = _projection_of(tap.site.module, tap.site.query_key_parameters()) is None
            weights = tap.account.weights = OwnWeights(own, needed)
            weights.watch()
            self._handles[tap].append(weights)

    def take_off(self, tap: Tap | None) -> None:
        """Take off a tap's hooks, or for ``None`` the model's. A second call does nothing."""
        for handle in self._handles.pop(tap, ()):
            handle.remove()
        if tap is not None and not tap.removed:  # else another attachment may have the layer
            tap.removed = True
            release(tap.site.module)
            let_go(tap)


def _projection_of(layer: nn.Module, parameters: Iterable[nn.Parameter]) -> nn.Module | None:
    """Return the first module inside a layer that owns one of the parameters."""
    wanted = set(parameters)
    for module in layer.modules():
        if module is not layer and not wanted.isdisjoint(module.parameters(recurse=False)):
            return module
    return None
