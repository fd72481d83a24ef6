"""One call of a layer, and what the calls of one thread share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any, TypeAlias

import torch

from spanopt.taps.graph import Trail
from spanopt.taps.notes import Notes
from spanopt.taps.real import Tokens
from spanopt.taps.running import calling_frame
from spanopt.taps.streams import Streams

__all__ = ["Call", "GivenTokens", "Repeats", "live_taps", "taps_by_name", "thread"]

GivenTokens: TypeAlias = "tuple[Tokens | None, Tokens | None] | None"
"""Real tokens of queries and keys, as :func:`spanopt.token_mask` gives them."""


class Call:
    """One call of a layer that is watched.

    Attributes:
        tap: The layer's tap.
        name: The tap's ``unique_name``.
        outer: The watched call around this one, if there is one.
        frame: The frame that the call runs in; ``None`` if compiled code entered the tap.
        at: The position in that frame's code; see :func:`~spanopt.taps.running.calling_frame`.
        given: The real tokens of queries and keys, as :func:`spanopt.token_mask` gives them.
        seen: Attention was seen, with gradients on.
        unmeasured: No watcher is told of the rest of the call, since its masks are unclear.
        projected: The module with the :class:`~spanopt.taps.module_hooks.Projected` hook has run.
        multiplied: Two activations were multiplied that may be Q and K.
        streams: Which tensors were computed from which of the layer's inputs.
        scores: What the softmax tap knows about tensors.
        trail: Where the scores are in the autograd graph.
    """

    def __init__(
        self, tap: Any, outer: Call | None, arguments: Any, given: GivenTokens = None
    ) -> None:
        self.tap = tap
        self.name: Any = tap.unique_name
        self.outer = outer
        self.frame: FrameType | None = None
        self.at: int = 0
        if not torch.compiler.is_compiling():
            self.frame, self.at = calling_frame()
        self.given = given
        self.seen = False
        self.multiplied = False
        self.unmeasured = False
        self.projected = False
        self.streams: Streams = Streams(arguments)
        self.scores: Notes[Any] = Notes()
        self.trail: Trail = Trail()

    def is_over(self) -> bool:
        """Return whether an exception has ended the call without its hooks being called."""
        # torch.compile makes a guard of this. So code that it compiled while the layer was running
        # is not used after the layer has ended.
        return self.frame is not None and self.frame.f_lasti != self.at

    def close(self) -> None:
        """Forget what was noted of tensors, and let go of the frame."""
        if not torch.compiler.is_dynamo_compiling():
            self.frame = None
        self.streams.close()
        self.scores.close()
        self.trail.close()


class _Calls:
    def __init__(self) -> None:
        self.innermost: Call | None = None


class _Thread(threading.local):
    """What the taps of one thread share.

    Attributes:
        busy: A tap is handling a torch function. The call then reaches the tap of an enclosing
            layer, of this attachment or another. That tap must leave it alone.
        probing: Calls are watched even where gradients are off.
        calls: Holds the innermost watched call. It is an object of its own, since compiled code
            does not write to a ``threading.local``.
        tokens: Real tokens of queries and keys by layer name, as :func:`spanopt.token_mask` gives
            them, shape ``(B, N)``.
    """

    def __init__(self) -> None:  # runs once per thread; Dynamo guards badly on class attributes
        self.busy = False
        self.probing = False
        self.calls: _Calls = _Calls()
        self.tokens: Mapping[str, GivenTokens] | None = None


thread: _Thread = _Thread()
live_taps: weakref.WeakSet[Any] = weakref.WeakSet()
taps_by_name: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


class Repeats:
    """The tokens of a layer's past forward passes, which activation checkpointing may repeat.

    Args:
        layer: Name of the layer, for the error.
    """

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self._given: list[GivenTokens] = []
        self._ran_again = False

    def remember(self, given: GivenTokens) -> None:
        """Note the tokens of a forward pass."""
        if self._ran_again:
            self._given, self._ran_again = [], False
        if len(self._given) < 2 and not any(_are_same(given, other) for other in self._given):
            self._given.append(given)

    def recall(self, given: GivenTokens) -> GivenTokens:
        """Return the tokens of the forward pass that a backward pass repeats.

        Args:
            given: The result if no forward pass was noted.

        Raises:
            RuntimeError: There were several forward passes with different tokens.
        """
        if not self._given:
            return given
        self._ran_again = True
        if len(self._given) > 1:
            raise RuntimeError(
                f"layer {self._layer!r} runs again in the backward pass, for activation "
                "checkpointing, after forward passes with different token_mask: call backward() "
                "after each of them, and evaluate under torch.no_grad()"
            )
        return self._given[0]

    def forget(self) -> None:
        """Forget past forward passes, for example after an optimizer step."""
        self._given = []


def _are_same(a: GivenTokens, b: GivenTokens) -> bool:
    """Return whether tokens are the same tensors. Their values are not read."""
    if a is None or b is None or a is b:
        return a is b
    pairs = [(one or Tokens(), other or Tokens()) for one, other in zip(a, b, strict=True)]
    return all(x.mask is y.mask and x.documents is y.documents for x, y in pairs)
