"""Module hooks that enter and leave a tap. They are not part of a model's deep copy or pickle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spanopt.taps.calls import thread
from spanopt.taps.layouts import OutputLayout
from spanopt.taps.outputs import ProjectionTap
from spanopt.taps.padding import NotedMasks, is_padding_name, padding_masks
from spanopt.taps.tap import Tap

__all__ = ["Enter", "Hook", "Leave", "NoteMasks", "Output", "Projected", "drop_inert", "no_hook"]


class Hook:
    """A hook that is left out of a deep copy and of a pickle of the model."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __reduce__(self) -> tuple[Any, ...]:
        return no_hook, ()


class Enter(Hook):
    """A layer's forward pre-hook: its tap starts to watch."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Enter the tap if the call has to be watched, as when gradients are on.

        Raises:
            RuntimeError: The model is being exported, and the program would lose the hooks.
        """
        if torch.compiler.is_exporting():
            raise RuntimeError(
                f"layer {self.tap.site.name!r} is hooked by spanopt, which an exported program "
                "would silently lose: detach() the optimizer or remove() the hooks first"
            )
        focus = self.tap.focus
        acts = focus is not None and focus.acts(self.tap, args, kwargs)
        if torch.is_grad_enabled() or thread.probing or acts:
            self.tap.enter((args, kwargs))
        elif not torch.compiler.is_compiling():
            self.tap.pass_by()


class Leave(Hook):
    """A layer's forward hook: its tap stops watching."""

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        """Leave the tap, also after an exception."""
        tap = self.tap
        call = tap.current_call()
        # In eager code the tap is left in any case. The grad mode may have changed, and the tap may
        # not have been entered, since another pre-hook may have raised an exception before ours.
        focused = tap.focus is not None and call is not None
        watched = torch.is_grad_enabled() or thread.probing or focused
        left = watched or not torch.compiler.is_compiling()
        if left:
            tap.leave()  # first, as the tap would see each attribute of a tensor that is read
        if torch.is_grad_enabled():
            tap.account.note_result(call, result, tap.is_idle())
        if left:
            tap.forget_call()


class Projected(Hook):
    """A forward hook on a module in a layer. It notices direct calls of the layer's forward."""

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        """Note the module's result where it runs outside of a call of the layer."""
        tap = self.tap
        if torch.is_grad_enabled() and not tap.removed:
            tap.account.note_projected(tap.current_call(), result, tap.unique_name)


class Output(Hook):
    """A forward hook on a module whose output holds Q or K: the tap puts nodes on them."""

    def __init__(self, tap: ProjectionTap, projection: OutputLayout) -> None:
        super().__init__(tap)
        self.projection = projection

    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        """Return the output with nodes on Q and K."""
        assert isinstance(self.tap, ProjectionTap)
        return self.tap.on_output(self.projection, result)


class NoteMasks(NotedMasks):
    """A forward pre-hook on a layer or a module around it. It notes the module's padding masks.

    Attributes:
        masks: The padding masks of the last call with gradients.
        is_needed: Whether the module takes arguments that may be padding masks.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        try:
            parameters = dict(inspect.signature(module.forward).parameters)
        except (TypeError, ValueError):  # the forward is not written in Python
            parameters = {}
        self._names = tuple(parameters)
        self.is_needed: bool = any(
            is_padding_name(name) or parameter.kind is parameter.VAR_KEYWORD
            for name, parameter in parameters.items()
        )

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the masks."""
        if torch.is_grad_enabled() or thread.probing:
            self.masks: list[Tensor] = padding_masks([*zip(self._names, args), *kwargs.items()])  # noqa: B905

    def __reduce__(self) -> tuple[Any, ...]:
        return no_hook, ()


def drop_inert(module: nn.Module) -> None:
    """Drop the stand-ins that hooks leave in a copy of a model."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook is _inert]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _inert(*args: Any) -> None:
    """Stand in for a hook in a copy of a model."""


def no_hook() -> Callable[..., None]:
    """Return what a hook becomes in a copy of a model: a function that does nothing."""
    return _inert
