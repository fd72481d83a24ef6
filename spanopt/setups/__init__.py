"""Projection setups: rules for what counts as the parallel part of a gradient, one file for each.

To write your own setup, write a function. The decorator :func:`setup` gives it a name::

    from spanopt.setups import setup

    @setup("first half", needs_other=False)
    def first_half(grad, basis, other, *, ridge=None, mask=None):
        first = torch.arange(grad.shape[-2]) < grad.shape[-2] // 2
        return grad * first[:, None]

    SpanScaledOptimizer(adamw, model, {"*": (2.0, 1.0)}, projection="first half")
"""

# The order of these imports is the order in which errors list the setups.
from spanopt.setups import span, cross, oblique, radial, feature, pooled  # isort: skip  # noqa: F401
from spanopt.setups.registry import SETUPS, Setup, SetupFunction, setup

__all__ = ["SETUPS", "SPAN", "Setup", "SetupFunction", "setup"]

SPAN = SETUPS["span"]
"""The default setup."""
