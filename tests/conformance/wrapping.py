"""A pytest plugin under which every optimizer that a test makes is a wrapped one.

``pytest -p wrapping`` replaces each optimizer class of torch.optim, torch-optimizer and PyTorch's
own test tables by one that makes the same optimizer and wraps it. An attention layer that has the
optimizer's parameters runs forward and backward before each step, on Q and K of its own, so that
the hooks are at work and none of the test's numbers changes.
"""

import importlib
import inspect

import torch
from torch import nn
from torch.nn import functional as F

from spanopt import SpanScale, SpanScaledOptimizer

MADE = {"wrapped": 0, "steps": 0}


class Around(nn.Module):
    """An attention layer that owns an optimizer's parameters and uses none of them."""

    def __init__(self, optimizer):
        super().__init__()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Not register_parameter: tests optimize tensors that are no nn.Parameter.
        self._parameters = {f"q_proj_{i}": p for i, p in enumerate(parameters)}

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Attending(SpanScaledOptimizer):
    """A wrapped optimizer whose attention layer trains before each step."""

    def __init__(self, optimizer):
        super().__init__(optimizer, Around(optimizer), {"*": SpanScale(2.0, 0.5)})
        MADE["wrapped"] += 1

    def step(self, *args, **kwargs):
        MADE["steps"] += 1
        with torch.enable_grad():
            attend(self.model)
        return super().step(*args, **kwargs)

    # As in the class it extends: the wrapped step runs the hooks of all optimizers.
    step.hooked = True


# From a generator of their own, so that the tests' random numbers stay as they are.
Q, K, V = torch.randn(3, 1, 5, 2, generator=torch.Generator().manual_seed(0))
Q.requires_grad_()
(PLAIN,) = torch.autograd.grad(F.scaled_dot_product_attention(Q, K, V).sum(), Q)


def attend(layer):
    """Run the layer forward and backward, and check that its gradients were rescaled."""
    (grad,) = torch.autograd.grad(layer(Q * 1, K, V).sum(), Q)
    if torch.equal(grad, PLAIN):
        raise AssertionError("the attention around this optimizer was not scaled")


class Wrapping(type):
    """The classes that stand for an optimizer class and make wrapped optimizers."""

    def __call__(cls, *args, **kwargs):
        if "original" not in vars(cls):  # a test's own subclass
            return super().__call__(*args, **kwargs)
        bare = cls.original(*args, **kwargs)
        trainable = any(p.requires_grad for g in bare.param_groups for p in g["params"])
        # An attention layer that trains nothing is refused.
        return Attending(bare) if trainable else bare

    def __instancecheck__(cls, instance):
        if "original" not in vars(cls):
            return super().__instancecheck__(instance)
        if isinstance(instance, SpanScaledOptimizer):
            instance = instance.optimizer
        return isinstance(instance, cls.original)


def wrapping(cls):
    """Return a class that makes wrapped optimizers of ``cls``, with its name and signature."""
    if isinstance(cls, Wrapping):
        return cls
    names = {"original": cls, "__doc__": cls.__doc__, "__module__": cls.__module__}
    made = Wrapping(cls.__name__, (cls,), names)
    made.__signature__ = inspect.signature(cls)
    return made


def classes_of(module):
    for name, value in vars(module).items():
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer):
            yield name, value


def pytest_configure(config):
    for name in ("torch.optim", "torch_optimizer"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for name, cls in list(classes_of(module)):
            if cls is not torch.optim.Optimizer:
                setattr(module, name, wrapping(cls))
    from torch.testing._internal import common_optimizers

    for info in common_optimizers.optim_db:
        info.optim_cls = wrapping(info.optim_cls)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"wrapped: {MADE['wrapped']} optimizers, {MADE['steps']} steps")
