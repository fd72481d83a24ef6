"""The function mode of one layer: the torch functions that the layer calls while it runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from spanopt.compiling import not_compiled_alone
from spanopt.sites import AttentionSite
from spanopt.taps.account import Account
from spanopt.taps.calls import Call, Repeats, live_taps, taps_by_name, thread
from spanopt.taps.running import Place, is_checkpointed, place_in
from spanopt.taps.stack import (
    INSIDE,
    INSIDE_PERHAPS,
    OUTSIDE_PERHAPS,
    remove_stale,
    take_out,
    traced_place,
)
from spanopt.taps.streams import Streams

__all__ = ["Handler", "LayerMode", "keeping"]

Handler: TypeAlias = Callable[..., Any]
"""``handler(tap, func, *args, **kwargs)`` makes a call of ``func`` for the layer.

A handler is looked up by the name of the function, such as ``matmul`` or ``__add__``.
"""

_numbers = itertools.count()


@not_compiled_alone
class LayerMode(TorchFunctionMode):
    """Hands each torch function that one layer calls in its forward to the handler of its name.

    Attributes:
        site: The layer.
        unique_name: A name that no other tap of the process has, for compiled code.
        account: What is known of the layer's calls. The optimizer clears it after each step.
        removed: Whether the tap was taken off its layer. It then does nothing.
    """

    def __init__(self, site: AttentionSite, handlers: Mapping[str, Handler]) -> None:
        super().__init__()
        self.site = site
        self.unique_name: str = f"tap {next(_numbers)}"
        self.account: Account = Account(site)
        self.removed = False
        self._handlers = handlers
        self._repeats = Repeats(site.name)
        live_taps.add(self)
        taps_by_name[self.unique_name] = self

    def enter(self, arguments: Any = ()) -> None:
        """Start watching this thread's calls.

        Args:
            arguments: What the layer was called with.

        Raises:
            RuntimeError: Activation checkpointing runs the layer again for its backward pass, and
                it could be repeating any of several forward passes with different tokens.
        """
        given = (thread.tokens or {}).get(self.site.name)
        if torch.compiler.is_compiling():
            traced_place(self.unique_name)
        else:
            remove_stale(self)
            if torch._C._current_graph_task_id() != -1:  # a backward pass is under way
                given = self._repeats.recall(given)
            elif torch.is_grad_enabled() or is_checkpointed():
                self._repeats.remember(given)
        self.account.entered = True
        self.site.takes_softmax = False
        thread.calls.innermost = Call(self, thread.calls.innermost, arguments, given)
        _push_mode(self)

    def pass_by(self) -> None:
        """Note that the layer runs without gradients; a checkpoint may run it again with them."""
        if is_checkpointed():
            self._repeats.remember((thread.tokens or {}).get(self.site.name))

    def forget_tokens(self) -> None:
        """Forget the tokens of past forward passes, for example after an optimizer step."""
        self._repeats.forget()

    def leave(self) -> None:
        """Stop watching: take the tap off the stack of function modes, wherever it lies there.

        What is known of the call is kept until :meth:`forget_call`.
        """
        if torch.compiler.is_compiling():
            _pop_mode()
        else:
            take_out(self)

    def current_call(self) -> Call | None:
        """Return the innermost call of the layer that is watched in this thread."""
        call = thread.calls.innermost
        # Names are compared, since Dynamo does not always recognise that two taps are one object.
        while call is not None and call.name != self.unique_name:
            call = call.outer
        return call

    def forget_call(self) -> None:
        """Forget the innermost call of the layer in this thread."""
        call = self.current_call()
        if call is None:
            return
        call.close()
        if thread.calls.innermost is call:
            thread.calls.innermost = call.outer
            return
        inner = thread.calls.innermost
        while inner is not None and inner.outer is not call:
            inner = inner.outer
        if inner is not None:
            inner.outer = call.outer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is Tensor.unflatten:
            func = _unflatten
        call = self.current_call()
        if thread.busy or call is None or call.is_over():
            return func(*args, **kwargs)
        handler = self._handlers.get(name)
        # Such a handler would do nothing. In eager code even its call takes time.
        if (
            handler is not None
            and not torch.compiler.is_dynamo_compiling()
            and getattr(handler, "follows_scores", False)
            and call.scores.is_empty()
        ):
            handler = None
        thread.busy = True
        try:
            result = handler(self, func, *args, **kwargs) if handler else func(*args, **kwargs)
        finally:
            thread.busy = False
        if func is Tensor.__iter__:
            result = list(result)
            call.streams.follow(name, result, args, kwargs)
            return iter(result)
        call.streams.follow(name, result, args, kwargs)
        return result

    def place(self) -> Place:
        """Return where the caller runs in relation to the layer."""
        call = self.current_call()
        if self.removed or call is None or call.is_over():
            return Place(False)
        if torch.compiler.is_compiling():
            place = traced_place(self.unique_name)
            if place >= OUTSIDE_PERHAPS and call.frame is None:
                torch._dynamo.graph_break()  # the code may run in other places too: look each time
            return Place(place in (INSIDE, INSIDE_PERHAPS))
        return place_in(self.site.module, call.frame)

    def is_live(self) -> bool:
        """Return whether the layer is running and the caller is part of its computation."""
        return self.place().inside

    def streams(self) -> Streams:
        """Return the record of what tensors in the layer's innermost call were computed from."""
        call = self.current_call()
        assert call is not None
        return call.streams

    def is_self_attention(self, query: Tensor, key: Tensor) -> bool:
        """Return whether Q and K were computed from the same inputs of the layer."""
        call = self.current_call()
        return call is not None and call.streams.are_one(query, key)


def keeping(place: Place) -> AbstractContextManager[Any]:
    """Return a context for making nodes. Where it is needed, nodes in it keep what they save.

    It is needed where the layer checkpoints a part of itself. For the backward pass that part runs
    again without the layer, and so without nodes. What its first nodes saved would be lost.

    Args:
        place: Where the nodes are made.
    """
    if not place.repeated:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(x: Tensor) -> Tensor:
    return x


def _unflatten(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Dynamo cannot trace the super() call in Tensor.unflatten from inside a function mode.
    return x.unflatten(*args, **kwargs)
