"""Taps: how the nodes reach Q and K. Each tap has one file, which ends in its declaration."""

from spanopt.declarations import declared
from spanopt.taps import outputs, packed, score, softmax
from spanopt.taps.kernels import register
from spanopt.taps.tap import Handler

__all__ = ["handlers", "outputs", "packed", "register", "score", "softmax"]


def handlers() -> dict[str, Handler]:
    """Return the handlers of all declared taps, by the name of the function that each handles."""
    return {name: handler for one in declared.values() for name, handler in one.handlers.items()}
