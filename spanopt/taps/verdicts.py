"""What one layer's attention masks tell about padding, and the refusal of unclear masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spanopt.errors import unclear_mask
from spanopt.shards import is_spread
from spanopt.taps.calls import Call
from spanopt.taps.judging import Verdict
from spanopt.taps.masks import Read, can_be_read
from spanopt.taps.once import judge_once
from spanopt.taps.padding import NotedMasks
from spanopt.taps.telling import Watcher

__all__ = ["Verdicts"]


class Verdicts:
    """Judges the masks of one layer, and remembers the verdicts that could not be read at once.

    Args:
        layer: Name of the layer.

    Attributes:
        noted: The padding masks that the layer and the modules around it were last called with.
        deferred: Whether a mask was judged whose values could not be read at once.
        unclear: How many such masks have to be refused: an integer tensor, shape ``(1,)``, changed
            in place. It is on the device, so that counting does not wait for the device.
    """

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self.noted: tuple[NotedMasks, ...] = ()
        self.deferred: bool = False
        self.unclear: Tensor = _counter(torch.device("cpu"))

    def has_padding(self) -> bool:
        """Return whether the layer, or a module around it, was called with a padding mask."""
        return any(bool(noted.masks) for noted in self.noted)

    def count_on(self, device: torch.device) -> None:
        """From now on, count unclear masks on this device."""
        if self.unclear.device != device:
            self.unclear = _counter(device)

    def forget(self) -> None:
        """Forget the masks of past forward passes, for example after an optimizer step."""
        for noted in self.noted:
            noted.masks = []
        if self.deferred:
            self.deferred = False
            self.unclear.zero_()

    def judged(self, read: Read, n: int, m: int, self_attention: bool) -> Verdict | None:
        """Find the real tokens from the masks; see :func:`~spanopt.taps.judging.judge`.

        Args:
            read: What the masks show.
            n: Number of queries.
            m: Number of keys.
            self_attention: Whether queries and keys are the same tokens.
        """
        if not read:
            return None
        masks: dict[int, Tensor] = {}  # by identity, since modules pass the same mask on
        for noted in self.noted:
            for mask in noted.masks:
                masks[id(mask)] = mask
        return judge_once(read, n, m, self_attention, list(masks.values()))

    def refuse_unclear(self, verdict: Verdict) -> None:
        """Refuse masks that do not tell which tokens are real.

        Args:
            verdict: What the masks tell.

        Raises:
            ValueError: The masks do not tell. If reading this would wait for a device, nothing is
                raised and ``unclear`` is increased instead.
        """
        if can_be_read(verdict.refused):
            if bool(verdict.refused):
                raise unclear_mask([self._layer], verdict.keys, verdict.queries)
            return
        refused: Any = verdict.refused
        if is_spread(refused):
            refused = refused.full_tensor()
        if not torch.compiler.is_compiling() and (type(refused) is not Tensor or refused.is_meta):
            return  # the tensor has no values
        self.count_on(refused.device)  # the layer may have been moved after it was hooked
        self.unclear.add_(refused)
        self.deferred = True

    def leave_unmeasured(self, verdict: Verdict, call: Call | None, watcher: Watcher) -> None:
        """Stop measuring in a call whose masks do not tell which tokens are real.

        This waits for the device of the verdict.

        Args:
            verdict: What the masks tell.
            call: The call of the layer.
            watcher: The watcher to tell that nothing is measured, and why.
        """
        refused = verdict.refused
        if call is None or type(refused) is not Tensor or refused.is_meta or not bool(refused):
            return
        call.unmeasured = True
        reason = str(unclear_mask([self._layer], verdict.keys, verdict.queries))
        for side in ("query", "key"):
            watcher.failed(self._layer, side, reason)


def _counter(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the tensor outlives such a block
        counter: Any = torch.zeros(1, dtype=torch.int64, device=device)
    # This is what torch._dynamo.mark_static_address does, but importing that takes seconds. CUDA
    # graphs accept an input that changes in place only if its address is fixed.
    counter._dynamo_static_input_type = "unguarded"
    result: Tensor = counter
    return result
