"""The tap of one attention layer: a function mode that puts nodes on Q and K."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import (
    TorchFunctionMode,
    _pop_mode,
    _push_mode,
)

from spanopt.compiling import not_compiled_alone
from spanopt.errors import unclear_mask
from spanopt.rescaling import Rescaling
from spanopt.scale import SpanScale
from spanopt.setups import SPAN
from spanopt.shards import is_spread
from spanopt.sites import AttentionSite
from spanopt.taps.account import Account, may_train, nodes_of
from spanopt.taps.calls import Call, GivenTokens, Repeats, live_taps, taps_by_name, thread
from spanopt.taps.focusing import Focusing, focusing_of
from spanopt.taps.masks import Read, Verdict, can_be_read
from spanopt.taps.once import judge_once
from spanopt.taps.padding import NotedMasks
from spanopt.taps.real import Tokens, real_tokens
from spanopt.taps.refusals import check_heads, refuse, refuse_vmap
from spanopt.taps.running import calls_forward_directly, is_checkpointed, place_in
from spanopt.taps.stack import (
    INSIDE,
    INSIDE_PERHAPS,
    OUTSIDE_PERHAPS,
    is_traced_directly,
    remove_stale,
    take_out,
    traced_place,
)
from spanopt.taps.streams import Streams
from spanopt.taps.watcher import Watcher
from spanopt.taps.weights import OwnWeights

__all__ = ["Handler", "Tap"]

_numbers = itertools.count()


@not_compiled_alone
class Tap(TorchFunctionMode):
    """Watches the torch functions that one attention layer calls, while its forward runs.

    Attributes:
        site: The layer.
        unique_name: A name that no other tap of the process has, for compiled code.
        rescaling: How gradients are rescaled, beside the factors.
        query: How those of the query side are. It is replaced, never changed, when the user edits
            scales: a backward pass under way keeps what its forward pass had.
        key: How those of the key side are.
        account: What came of the layer's calls; the optimizer clears it after each step.
        weights: The weights by which a use past the hooks is noticed; none before
            :meth:`spanopt.placement.Placement.watch_weights`.
        entered: Set when the layer has run while taps watched.
        called: Set when any attention call was made.
        multiplied: Set in a call when activations were multiplied as queries and keys may be.
        lost: Set when, after that, a softmax was taken of something else.
        connected: Set when the layer returned something that gradients flow back through.
        detached: Set when it could have, and returned only tensors that none flow back through.
        watcher: Who is told of Q, K and their gradients: see :meth:`watching`.
        focus: Which keys the layer's queries keep; ``None`` if all of them.
        held: Set when the scales are moved by a schedule: see :meth:`spanopt.SpanHooks.hold`.
        checkpoints: Set while the layer runs a part of itself under activation checkpointing.
        removed: Set when the tap was taken off its layer: it then does nothing.
        noted: The padding masks that the layer and the modules around it were last called with.
        deferred: Set when a mask was judged where its values could not be read at once.
        unclear: Above 0 if such a mask has to be refused: an integer, shape ``(1,)``, changed in
            place. A tensor, as only the device knows.
    """

    query: Rescaling
    key: Rescaling

    def __init__(
        self,
        site: AttentionSite,
        scale: SpanScale,
        rescaling: Rescaling,
        handlers: Mapping[str, Handler],
    ) -> None:
        super().__init__()
        self.site = site
        self.unique_name: str = f"tap {next(_numbers)}"
        self.rescaling = rescaling
        self.account: Account = Account()
        self.weights: OwnWeights = OwnWeights(self.account, [])
        self.entered: bool = False
        self.called: bool = False
        self.multiplied: bool = False
        self.lost = False
        self.connected: bool = False
        self.detached: bool = False
        self.watcher: Watcher | None = None
        self.focus: Focusing | None = focusing_of.get(site.module)
        self.held = False
        self.removed = False
        self.noted: tuple[NotedMasks, ...] = ()
        self.deferred: bool = False
        self.unclear: Tensor = _counter(torch.device("cpu"))
        self._handlers = handlers
        self._repeats = Repeats(site.name)
        self.checkpoints: bool = False
        self.set_scale(scale)
        live_taps.add(self)
        taps_by_name[self.unique_name] = self

    def set_scale(self, scale: SpanScale) -> None:
        """Take other scales, from the next forward pass on.

        Args:
            scale: The scales.

        Raises:
            ValueError: The number of per-head values is not the layer's number of heads, or a
                factor is not finite in the dtype of its parameters. The scales are then as they
                were.
        """
        first = next(self.site.module.parameters(), None)
        dtype = None if first is None else first.dtype
        device = torch.device("cpu") if first is None or first.is_meta else first.device
        if self.unclear.device != device:
            self.unclear = _counter(device)
        query, key = (
            self.rescaling.with_numbers(scale.side(side), device, held=self.held)
            for side in ("query", "key")
        )
        if self.site.heads is not None:
            check_heads(self.site.name, "query", query.factors, self.site.heads)
            check_heads(self.site.name, "key", key.factors, self.site.kv_heads)
        for side, rescaling in (("query", query), ("key", key)):
            rescaling.check_range(dtype, f"layer {self.site.name!r}, {side} side")
        self.query, self.key = query, key

    def watching(self) -> Watcher | None:
        """Return who is told of Q, K and their gradients, just now.

        In compiled code it is nobody, as no Python is left there that could tell. There the
        attribute is not read, so that nothing is compiled anew when somebody comes or goes.
        """
        if torch.compiler.is_compiling() or self.watcher is None:
            return None
        call = self.current_call()
        return None if call is not None and call.unmeasured else self.watcher

    def enter(self, arguments: Any = ()) -> None:
        """Start watching this thread's calls.

        Args:
            arguments: What the layer was called with.

        Raises:
            RuntimeError: Activation checkpointing runs the layer once more, for its backward pass,
                and there were several forward passes of which it could be the one.
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
        self.entered = True
        self.multiplied = False
        self.site.takes_softmax = False
        thread.calls.innermost = Call(self, thread.calls.innermost, arguments, given)
        _push_mode(self)

    def pass_by(self) -> None:
        """Note that the layer runs without gradients, perhaps for the first of two times."""
        if is_checkpointed():
            self._repeats.remember((thread.tokens or {}).get(self.site.name))

    def forget_tokens(self) -> None:
        """Forget the tokens of past forward passes, as after an optimizer step."""
        self._repeats.forget()
        self.weights.forget()
        for noted in self.noted:
            noted.masks = []
        if self.deferred:
            self.deferred = False
            self.unclear.zero_()

    def leave(self) -> None:
        """Stop watching, wherever on the stack of function modes the tap is by now."""
        self.forget_call()
        if torch.compiler.is_compiling():
            _pop_mode()
        else:
            take_out(self)

    def current_call(self) -> Call | None:
        """Return the innermost call of the layer that is watched in this thread."""
        call = thread.calls.innermost
        # By name: Dynamo does not always know a tap for itself again.
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
        handler = self._handlers.get(name)
        if func is Tensor.unflatten:
            func = _unflatten
        call = self.current_call()
        if thread.busy or call is None or call.is_over():
            return func(*args, **kwargs)
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

    def is_live(self) -> bool:
        """Return whether the caller's computation is that of the layer, which is running."""
        self.checkpoints = False
        call = self.current_call()
        if self.removed or call is None or call.is_over():
            return False
        if torch.compiler.is_compiling():
            place = traced_place(self.unique_name)
            if place >= OUTSIDE_PERHAPS and call.frame is None:
                torch._dynamo.graph_break()  # the code may be run elsewhere: each time look anew
            return place in (INSIDE, INSIDE_PERHAPS)
        inside, self.checkpoints = place_in(self.site.module, call.frame)
        return inside

    def keeping(self) -> AbstractContextManager[Any]:
        """Return a context for making nodes, in which they keep themselves what they save.

        That is where the layer checkpoints a part of itself: the part runs again for the backward
        pass when the layer does not, without nodes, so that what they save would not come back.
        """
        if not self.checkpoints:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)

    def observe(self, query: Tensor, key: Tensor, tap: str) -> None:
        """Note the Q and K of an attention call, before the nodes are put on them.

        Args:
            query: Shape ``(..., H, N, d)``.
            key: Shape ``(..., H', M, d)``.
            tap: Name of the tap that reached them.

        Raises:
            TypeError: A nested, sparse or complex tensor, or one of ``torch.vmap``.
            ValueError: The number of per-head values is not the number of heads.
        """
        self.site.tap = tap
        refuse(self.site, query=query, key=key)
        refuse_vmap(self.site.name, query, key)
        # Without a dimension for them, heads are merged into the batch and can't be told apart.
        heads, kv_heads = (math.prod(x.shape[1:-2]) if x.ndim > 3 else 0 for x in (query, key))
        self.mark(
            tap,
            heads,
            kv_heads,
            query.shape[-1],
            (query.shape[-2], key.shape[-2]),
        )

    def tokens(
        self, query: Tensor, key: Tensor, read: Read, self_attention: bool
    ) -> tuple[Tokens, Tokens]:
        """Return the real tokens of Q and K, as their nodes take them.

        Args:
            query: Shape ``(..., N, d)``.
            key: Shape ``(..., M, d)``.
            read: What the attention masks show.
            self_attention: Whether queries and keys are the same tokens.

        Returns:
            For the query and the key node. What :func:`spanopt.token_mask` says goes before what
            the attention masks tell.

        Raises:
            ValueError: ``token_mask`` was given a mask of another shape, or the attention mask
                does not tell which tokens are real.
        """
        given = self.given()
        verdict = None
        if given is None or None in given:
            sizes = query.shape[-2], key.shape[-2]
            verdict = self.judged(read, *sizes, self_attention)
        return real_tokens(query, key, verdict, given, self.site.name)

    def judged(self, read: Read, n: int, m: int, self_attention: bool) -> Verdict | None:
        """Tell real tokens by the attention masks, see :func:`~spanopt.taps.masks.judge`.

        Args:
            read: What the masks show.
            n: Number of queries.
            m: Number of keys.
            self_attention: Whether queries and keys are the same tokens.

        Raises:
            ValueError: The masks do not tell. Where their values can't be read without waiting
                for a device, ``unclear`` is raised instead.
        """
        if not read:
            return None
        masks: dict[int, Tensor] = {}  # by identity, as modules hand a mask on
        for noted in self.noted:
            for mask in noted.masks:
                masks[id(mask)] = mask
        verdict = judge_once(read, n, m, self_attention, list(masks.values()))
        if verdict is None:
            return None
        if not self.query.projects() and not self.key.projects():
            self._leave_unmeasured(verdict)
            return verdict
        if can_be_read(verdict.refused):
            if bool(verdict.refused):
                raise unclear_mask([self.site.name], verdict.keys, verdict.queries)
            return verdict
        refused: Any = verdict.refused
        if is_spread(refused):
            refused = refused.full_tensor()
        if not torch.compiler.is_compiling() and (type(refused) is not Tensor or refused.is_meta):
            return verdict  # it has no values
        if self.unclear.device != refused.device:  # the layer was moved after it was hooked
            self.unclear = _counter(refused.device)
        self.unclear.add_(refused)
        self.deferred = True
        return verdict

    def _leave_unmeasured(self, verdict: Verdict) -> None:
        """Have nothing measured in a layer that is only measured, if its masks are unclear."""
        call, watcher, refused = self.current_call(), self.watching(), verdict.refused
        if call is None or watcher is None or type(refused) is not Tensor or refused.is_meta:
            return
        if bool(refused):
            call.unmeasured = True
            reason = str(unclear_mask([self.site.name], verdict.keys, verdict.queries))
            for side in ("query", "key"):
                watcher.failed(self.site.name, side, reason)

    def given(self) -> GivenTokens:
        """Return the tokens of queries and keys that :func:`spanopt.token_mask` gives.

        Raises:
            ValueError: They are of several documents, and the projection is not the span's.
        """
        call = self.current_call()
        given = None if call is None else call.given
        if given is None or self.rescaling.setup is SPAN:
            return given
        if any(tokens is not None and tokens.documents is not None for tokens in given):
            raise ValueError(
                f"layer {self.site.name!r}: token_mask gives several documents, which only "
                f"projection='span' takes apart, not {self.rescaling.setup.name!r}"
            )
        return given

    def projects(self, *tensors: Tensor) -> bool:
        """Whether a node on one of these will project, which is when real tokens matter."""
        project = self.query.projects() or self.key.projects() or self.watching() is not None
        return project and any(x.requires_grad for x in tensors) and torch.is_grad_enabled()

    def is_idle(self) -> bool:
        """Whether no node is needed."""
        return self.query.mode == self.key.mode == "identity" and self.watching() is None

    def is_self_attention(self, query: Tensor, key: Tensor) -> bool:
        """Whether Q and K were computed from the same of the layer's inputs."""
        call = self.current_call()
        return call is not None and call.streams.are_one(query, key)

    def streams(self) -> Streams:
        """Return what tensors in the layer's innermost call were computed from."""
        call = self.current_call()
        assert call is not None
        return call.streams

    def note_result(self, result: Any) -> None:
        """Note what the layer returned, and have the backward pass through it noted.

        Args:
            result: What its forward returned, with gradients on.
        """
        call = self.current_call()
        if call is not None:
            self._report(call, result)
        if _may_carry_gradient(result):
            self.connected = True
        elif any(parameter.requires_grad for parameter in self.site.module.parameters()):
            self.detached = True

    def _report(self, call: Call, result: Any) -> None:
        if torch.compiler.is_compiling():
            # No hooks on tensors: every call counts, without a backward pass.
            if call.seen:
                self.account.passed = True
            elif _may_carry_gradient(result):
                self.account.missed = True
        elif not call.seen:
            nodes = nodes_of(result)
            parameters = list(self.site.query_key_parameters())
            if nodes and may_train(nodes, call.streams.input_nodes(), parameters):
                self.account.report(result, "missed")
        elif self.is_idle():
            self.account.unsure = True
        else:
            if call.projected:
                self.weights.let_go()
            else:
                self.weights.note_call(nodes_of(result) or [], call.streams.input_nodes())
            if self.account.report(result, "passed"):
                self.account.waiting = True

    def note_projected(self, result: Any) -> None:
        """Note what a module of the layer returned, which may run outside of the layer's calls.

        Args:
            result: What it returned, with gradients on.
        """
        if torch.compiler.is_compiling():
            if is_traced_directly(self.unique_name):
                self.account.direct = True
            return
        call = self.current_call()
        if call is not None and not call.is_over():
            call.projected = True
        elif not self.removed and calls_forward_directly(self.site.module):
            self.account.report(result, "direct")

    def is_attention(self) -> bool:
        """Return whether the layer is attention: beyond doubt, or by what it did when it ran.

        What no gradient flows back through has none to rescale, whatever it multiplies. An example
        is an indexer, which chooses the keys for the attention layer that it is a part of.
        """
        if self.called or self.site.asked:
            return True
        return (self.site.certain or self.lost) and (self.connected or not self.detached)

    def mark(
        self,
        tap: str,
        heads: int,
        kv_heads: int,
        head_dim: int,
        lengths: tuple[int, int],
    ) -> None:
        """Note that an attention call was made.

        Args:
            tap: Name of the tap that saw it.
            heads: Number of query heads.
            kv_heads: Number of key heads.
            head_dim: Size d of a head.
            lengths: Number of queries and of keys.

        Raises:
            ValueError: The number of per-head values is not the number of heads.
        """
        check_heads(self.site.name, "query", self.query.factors, heads)
        check_heads(self.site.name, "key", self.key.factors, kv_heads)
        self.called = True
        site = self.site
        site.tap = tap
        site.heads, site.kv_heads, site.head_dim = heads or 1, kv_heads or 1, head_dim
        site.query_length, site.key_length = lengths
        if torch.is_grad_enabled():
            self.account.seen = True
            call = self.current_call()
            if call is not None:
                call.seen = True


def _counter(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives such a block
        counter: Any = torch.zeros(1, dtype=torch.int64, device=device)
    # As of torch._dynamo.mark_static_address, whose import takes seconds: CUDA graphs take inputs
    # that change in place only at addresses that do not.
    counter._dynamo_static_input_type = "unguarded"
    result: Tensor = counter
    return result


def _unflatten(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Dynamo cannot trace the super() of Tensor.unflatten from inside a function mode.
    return x.unflatten(*args, **kwargs)


def _may_carry_gradient(value: Any) -> bool:
    """Return whether a result has a tensor with a gradient, or what cannot be looked into."""
    pending, tensors = [value], 0
    while pending:
        one = pending.pop()
        if isinstance(one, Tensor):
            if one.requires_grad:
                return True
            tensors += 1
        elif isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, (tuple, list)):
            pending += one
        elif not (one is None or isinstance(one, (bool, int, float, str))):
            return True
    return not tensors


def _itself(x: Tensor) -> Tensor:
    return x


Handler: TypeAlias = Callable[..., Any]
"""``handler(tap, func, *args, **kwargs)``: makes the call for the layer.

Handlers go by the name of the function, such as ``matmul`` or ``__add__``.
"""
