"""Optimizers by name, of torch.optim and torch_optimizer."""

from __future__ import annotations

import difflib
import importlib
import inspect

import torch

from text_demo.errors import UserError

__all__ = ["find_optimizer", "needs_closure", "needs_second_order"]

NEEDS_SECOND_ORDER = {"Adahessian"}


def optimizer_classes() -> dict[str, type[torch.optim.Optimizer]]:
    """Return every optimizer class by its lower-case name, plain and with its package."""
    found: dict[str, type[torch.optim.Optimizer]] = {}
    for package in ("torch_optimizer", "torch.optim"):  # torch's own class wins a shared name
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue  # torch_optimizer is an optional extra
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
                found[name.lower()] = found[f"{package}.{name}".lower()] = value
    return {name: cls for name, cls in found.items() if cls is not torch.optim.Optimizer}


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """Look an optimizer up by name, upper or lower case."""
    classes = optimizer_classes()
    if name.lower() in classes:
        return classes[name.lower()]
    plain_names = [key for key in classes if "." not in key]
    near = difflib.get_close_matches(name.lower(), plain_names, n=3, cutoff=0.5)
    names = " or ".join(classes[key].__name__ for key in near) or "AdamW"
    missing = "" if "ranger" in classes else " (torch_optimizer is not installed)"
    raise UserError(f"no optimizer is named {name}{missing}: did you mean {names}?")


def needs_closure(cls: type[torch.optim.Optimizer]) -> bool:
    """Return whether a step of the optimizer takes a closure always, as LBFGS does."""
    closure = inspect.signature(cls.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def needs_second_order(cls: type[torch.optim.Optimizer]) -> bool:
    """Return whether the optimizer differentiates the gradients once more."""
    return cls.__name__ in NEEDS_SECOND_ORDER
