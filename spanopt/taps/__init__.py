"""Taps: how the nodes reach Q and K. One file per way, which ends in its declaration."""

from spanopt.declarations import declared
from spanopt.taps import outputs, packed, score, softmax
from spanopt.taps.kernels import register
from spanopt.taps.tap import Handler

__all__ = ["handlers", "outputs", "packed", "register", "score", "softmax"]


def handlers() -> dict[str, Handler]:
    """Return the handlers of all taps that are declared, by the names of functions."""
    return {name: handler for one in declared.values() for name, handler in one.handlers.items()}
