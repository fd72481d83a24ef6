"""What is known of a layer's calls: whether attention was seen, and where a backward pass went."""

from __future__ import annotations

from typing import Any

import torch

from spanopt.sites import AttentionSite
from spanopt.taps.calls import Call
from spanopt.taps.results import may_carry_gradient, may_train, nodes_of
from spanopt.taps.running import calls_forward_directly
from spanopt.taps.stack import is_traced_directly
from spanopt.taps.weights import OwnWeights

__all__ = ["Account"]

_SINCE_STEP = ("seen", "waiting", "passed", "lost", "missed", "direct", "around")


class Account:
    """What is known of the calls of one layer, with gradients.

    Attributes:
        site: The layer.
        weights: Notices a use past the hooks that no call of a module shows. It is empty until
            :meth:`spanopt.placement.Placement.watch_weights`.
        entered: The layer has run while its tap watched.
        called: An attention call was made.
        connected: The layer returned something that gradients flow back through.
        detached: The layer has trained parameters, and returned only tensors without gradients.
        ever_lost: A product of what may be Q and K was not followed to a softmax.

    The other attributes are reset after each optimizer step:

    Attributes:
        seen: Attention was seen in a call.
        waiting: Attention was seen in a call. A backward pass through that call will be noted.
        passed: A backward pass went through such a call.
        lost: A product was lost on its way to a softmax. Other products may have been seen.
        missed: A backward pass went through a call in which no attention was seen.
        direct: A backward pass went through the layer's forward, which was called directly.
        around: The layer got gradients, and no backward pass went through the calls that wait.
    """

    def __init__(self, site: AttentionSite) -> None:
        self.site = site
        self.weights: OwnWeights = OwnWeights()
        self.entered: bool = False
        self.called: bool = False
        self.connected: bool = False
        self.detached: bool = False
        self.ever_lost: bool = False
        self.seen: bool = False
        self.waiting: bool = False
        self.passed: bool = False
        self.lost: bool = False
        self.missed: bool = False
        self.direct: bool = False
        self.around: bool = False

    def is_attention(self) -> bool:
        """Return whether the layer is attention: for certain, or judged by what it did.

        A layer that no gradient flows back through has no gradient to rescale, so it does not
        count. An example is an indexer, which chooses the keys for the layer that contains it.
        """
        if self.called or self.site.asked:
            return True
        return (self.site.certain or self.ever_lost) and (self.connected or not self.detached)

    def is_complete(self) -> bool:
        """Return whether attention was seen, and nothing is known to have gone past the hooks."""
        return self.seen and not self.ways_past()

    def ways_past(self) -> list[str]:
        """Return how gradients went past the hooks of a layer that was seen, as field names."""
        if not self.seen:
            return []
        ways = {
            "lost": self.lost,
            "missed": self.missed,
            "direct": self.direct or self.weights.found,
            "around": self.around,
        }
        return [way for way, is_so in ways.items() if is_so]

    def forget(self) -> None:
        """Reset what is noted for one step, for example after an optimizer step."""
        for name in _SINCE_STEP:
            setattr(self, name, False)
        self.weights.forget()

    def note_result(self, call: Call | None, result: Any, is_idle: bool) -> None:
        """Note what the layer returned, and arrange for a backward pass through it to be noted.

        Args:
            call: The call that returned it; ``None`` if it was not watched.
            result: What the layer's forward returned, with gradients on.
            is_idle: Whether the layer needs no node.
        """
        carries_gradient = may_carry_gradient(result)
        if call is not None:
            if torch.compiler.is_compiling():
                # Compiled code has no hooks on tensors, so a call counts without its backward
                # pass. The account is not read here, or Dynamo would recompile when it changes.
                if call.seen:
                    self.passed = True
                elif carries_gradient:
                    self.missed = True
            elif call.seen:
                self._note_seen(call, result, is_idle)
            else:
                nodes, inputs = nodes_of(result), call.streams.input_nodes()
                if nodes and may_train(nodes, inputs, [*self.site.query_key_parameters()]):
                    self._report(nodes, "missed")
        if carries_gradient:
            self.connected = True
        elif any(parameter.requires_grad for parameter in self.site.module.parameters()):
            self.detached = True

    def _note_seen(self, call: Call, result: Any, is_idle: bool) -> None:
        if is_idle:
            self.weights.unsure = True
            return
        nodes = nodes_of(result)
        if call.projected:
            self.weights.let_go()
        else:
            self.weights.note_call(nodes or [], call.streams.input_nodes())
        if nodes:
            self._report(nodes, "passed")
            self.waiting = True

    def note_projected(self, call: Call | None, result: Any, unique_name: str) -> None:
        """Note what a module in the layer returned. It may run outside of the layer's calls.

        Args:
            call: The layer's call that the module runs in, if any.
            result: What the module returned, with gradients on.
            unique_name: The unique name of the layer's tap.
        """
        if torch.compiler.is_compiling():
            if is_traced_directly(unique_name):
                self.direct = True
        elif call is not None and not call.is_over():
            call.projected = True
        elif calls_forward_directly(self.site.module):
            self._report(nodes_of(result) or [], "direct")

    def _report(self, nodes: list[Any], what: str) -> None:
        """Set a field as soon as a backward pass goes through one of these autograd nodes."""
        for node in nodes:
            node.register_prehook(_Report(self, what))


class _Report:
    """A hook on a node of the autograd graph that sets a field of an account."""

    def __init__(self, account: Account, what: str) -> None:
        self.account = account
        self.what = what

    def __call__(self, gradients: Any) -> None:
        setattr(self.account, self.what, True)
