"""An optimizer around another one: it passes attributes on and runs hooks in PyTorch's order."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OptimizerProxy"]

_INTERFACE = ("param_groups", "state", "step", "zero_grad", "state_dict", "load_state_dict")
_HOOK_TABLES = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def _passed_on(name: str) -> Any:
    """Return a property that reads, sets and deletes an attribute of the wrapped optimizer."""

    def get(self: OptimizerProxy) -> Any:
        return getattr(self.optimizer, name)

    def set_(self: OptimizerProxy, value: Any) -> None:
        setattr(self.optimizer, name, value)

    def delete(self: OptimizerProxy) -> None:
        delattr(self.optimizer, name)

    return property(get, set_, delete, f"The wrapped optimizer's ``{name}``.")


def _runs_step_hooks(optimizer: Any) -> bool:
    """Return whether ``step`` of an optimizer runs its step hooks, as PyTorch's own do."""
    return (
        isinstance(optimizer, Optimizer)
        and all(name in vars(optimizer) for name in _HOOK_TABLES)
        and getattr(type(optimizer).step, "hooked", False)
        # A learning rate scheduler replaces ``step`` of the one optimizer that it has.
        and ("step" not in vars(optimizer) or hasattr(optimizer.step, "_wrapped_by_lr_sched"))
    )


class OptimizerProxy(Optimizer):
    """An optimizer that stands for another one and steps with it.

    It has hooks of its own, for steps and for state dicts. ``param_groups``, ``state`` and
    ``defaults`` are the other optimizer's own objects. Any attribute that this class lacks is read
    from the other optimizer and set on it. A subclass sets the attribute ``hooks`` last.

    Attributes:
        optimizer: The other optimizer.
    """

    def _stand_for(self, optimizer: Optimizer) -> None:
        """Set the other optimizer, without ``Optimizer.__init__``, which would make new groups."""
        missing = [name for name in _INTERFACE if not hasattr(optimizer, name)]
        if missing:
            raise TypeError(
                f"the optimizer must have the interface of torch.optim.Optimizer, got "
                f"{type(optimizer).__name__} without {', '.join(missing)}"
            )
        self.optimizer = optimizer
        for hooks in _HOOK_TABLES:
            setattr(self, hooks, OrderedDict())

    @property
    def _is_front(self) -> bool:
        """Return whether this object only stands for a wrapper.

        Its class was then made from the wrapper's class, and its ``optimizer`` is the wrapper.
        """
        return "hooks" not in self.__dict__

    param_groups: list[dict[str, Any]] = _passed_on("param_groups")
    state: defaultdict[Tensor, Any] = _passed_on("state")
    defaults: dict[str, Any] = _passed_on("defaults")
    # torch.amp.GradScaler hands these two to a fused optimizer.
    grad_scale: Any = _passed_on("grad_scale")
    found_inf: Any = _passed_on("found_inf")

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _arguments_of_step(
        self, args: Iterable[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of a step, with a closure that checks the gradients at its end.

        Without a closure, check the gradients at once.
        """
        args = list(args)
        if args and callable(args[0]):
            args[0] = self._checked(args[0])
        elif callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": self._checked(kwargs["closure"])}
        else:
            self._check_step()
        return args, kwargs

    def _checked(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def checked() -> Any:
            loss = closure()
            self._check_step()
            return loss

        return checked

    def _check_step(self) -> None:
        """Check the gradients that a step will use."""

    def _note_step(self) -> None:
        """Note that a step was taken. This is called before the step post-hooks run."""

    def _step_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step, and run the step hooks in PyTorch's order."""
        if not _runs_step_hooks(self.optimizer):
            (_, *args), kwargs = self._before_step(self, (self, *args), kwargs)  # type: ignore[assignment]
            result = self.optimizer.step(*args, **kwargs)
            self._after_step(self, (self, *args), kwargs)
            return result
        # These run within the wrapped step. Global hooks run first before it and last after it.
        before = self.optimizer._optimizer_step_pre_hooks
        after = self.optimizer._optimizer_step_post_hooks
        key: Any = ("SpanScaledOptimizer", id(self))
        before[key], after[key] = self._before_step, self._after_step
        before.move_to_end(key, last=False)  # type: ignore[attr-defined]
        try:
            return self.optimizer.step(*args, **kwargs)
        finally:
            before.pop(key, None)
            after.pop(key, None)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Run this object's step pre-hooks, as a pre-hook of the wrapped optimizer."""
        _, *rest = args
        for pre_hook in self._optimizer_step_pre_hooks.values():
            changed = pre_hook(self, (self, *rest), kwargs)
            if changed is not None:
                (_, *rest), kwargs = changed
        rest, kwargs = self._arguments_of_step(rest, kwargs)
        return (optimizer, *rest), kwargs

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run this object's step post-hooks, as a post-hook of the wrapped optimizer."""
        self._note_step()
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, (self, *args[1:]), kwargs)

    def _save_with_hooks(self, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a state dict. Run the state-dict pre-hooks before, and the post-hooks after."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = save()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def _load_with_hooks(
        self, state_dict: Mapping[str, Any], load: Callable[[dict[str, Any]], None]
    ) -> None:
        """Load a state dict. Run the loading pre-hooks before, and the post-hooks after."""
        if not isinstance(state_dict, Mapping):
            raise ValueError(
                f"not a state dict of {type(self.optimizer).__name__}, which is a dict, but "
                f"{type(state_dict).__name__}"
            )
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else dict(changed)
        load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self.__dict__ or hasattr(type(self), name) or "hooks" not in self.__dict__
        if own or not hasattr(self.optimizer, name):
            super().__setattr__(name, value)
        else:
            setattr(self.optimizer, name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # it is not set yet while the object is unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)
