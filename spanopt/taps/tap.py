"""The tap of one attention layer: a function mode that puts nodes on Q and K."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from spanopt.node import span_node, uniform_node
from spanopt.scale import Factor, SpanScale
from spanopt.sites import AttentionSite

__all__ = ["Handler", "SideScale", "Tap", "remove_stale", "thread"]


class SideScale(NamedTuple):
    """Scales of one side of one layer, as the nodes read them.

    Attributes:
        mode: ``"identity"`` (both factors 1: no node), ``"uniform"`` (equal factors: a
            multiplication) or ``"general"``.
        parallel: Shape ``()`` or ``(H,)``.
        violation: Shape ``()`` or ``(H,)``.
        ridge: As in :func:`spanopt.project`.
    """

    mode: str
    parallel: Tensor
    violation: Tensor
    ridge: float | None

    @classmethod
    def of(
        cls, factors: tuple[Factor, Factor], ridge: float | None, device: torch.device
    ) -> SideScale:
        """Build it from numbers.

        Args:
            factors: ``(parallel, violation)``.
            ridge: As in :func:`spanopt.project`.
            device: Where the layer's gradients will be.

        Returns:
            The scales, as new tensors.
        """
        parallel, violation = factors
        mode = "general"
        if parallel == violation:
            mode = "identity" if parallel == 1 else "uniform"
        dtype = torch.float32 if device.type == "mps" else torch.float64
        with torch.inference_mode(False):  # these tensors outlive such a block
            return cls(
                mode,
                torch.tensor(parallel, dtype=dtype, device=device),
                torch.tensor(violation, dtype=dtype, device=device),
                ridge,
            )

    def on(self, x: Tensor) -> Tensor:
        """Put the node on Q or K.

        Args:
            x: Shape ``(..., H, N, d)``.

        Returns:
            A view of ``x``, or ``x`` itself where there is nothing to do.
        """
        if self.mode == "identity" or not x.requires_grad:
            return x
        if self.mode == "uniform":
            return uniform_node(x, self.parallel)
        return span_node(x, self.parallel, self.violation, ridge=self.ridge)


class _Thread(threading.local):
    """What the taps of one thread share.

    Attributes:
        busy: An attention call is being handled. It goes on to the tap of an enclosing layer, of
            this attachment or another, which must leave it alone.
        probing: Calls are looked for even where gradients are off.
    """

    def __init__(self) -> None:  # once in every thread; Dynamo guards on class attributes badly
        self.busy = False
        self.probing = False


thread = _Thread()


class Tap(TorchFunctionMode):
    """Watches the torch functions that one attention layer calls, while its forward runs.

    Attributes:
        site: The layer.
        query: Scales of the query side. Replaced, never changed in place, when the user edits them:
            a backward pass under way keeps those of its forward pass.
        key: Scales of the key side.
        seen: Set when an attention call had a Q or K that takes part in differentiation; the
            optimizer clears it after each step.
        called: Set when any attention call was made.
        removed: Set when the tap was taken off its layer: it then does nothing.
    """

    def __init__(
        self,
        site: AttentionSite,
        scale: SpanScale,
        ridge: float | None,
        handlers: Sequence[tuple[Callable[..., Any], Handler]],
    ) -> None:
        super().__init__()
        self.site = site
        self.ridge = ridge
        self.seen = False
        self.called = False
        self.removed = False
        self._handlers = handlers
        self.set_scale(scale)

    def set_scale(self, scale: SpanScale) -> None:
        """Take other scales, from the next forward pass on.

        Args:
            scale: The scales.

        Raises:
            ValueError: The number of per-head values is not the layer's number of heads. The scales
                are then as they were.
        """
        first = next(self.site.module.parameters(), None)
        device = torch.device("cpu") if first is None or first.is_meta else first.device
        query, key = (
            SideScale.of(scale.side(side), self.ridge, device) for side in ("query", "key")
        )
        if self.site.heads is not None:
            self._check_heads("query", query, self.site.heads)
            self._check_heads("key", key, self.site.kv_heads)
        self.query, self.key = query, key

    def enter(self) -> None:
        """Start watching this thread's calls."""
        remove_stale()
        _push_mode(self)

    def leave(self) -> None:
        """Stop watching, wherever on the stack of function modes the tap is by now."""
        if torch.compiler.is_compiling():
            _pop_mode()
        else:
            _take_out(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not thread.busy:
            # By identity: Dynamo does not find every function again in a dict.
            for function, handler in self._handlers:
                if func is function:
                    return self._handle(handler, func, args, kwargs)
        if func is Tensor.unflatten:  # Dynamo cannot trace its super() from a function mode
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _handle(self, handler: Handler, func: Any, args: Any, kwargs: Any) -> Any:
        if self.removed or not (torch.compiler.is_compiling() or _is_running(self.site.module)):
            return func(*args, **kwargs)
        self.called = True
        thread.busy = True
        try:
            return handler(self, func, *args, **kwargs)
        finally:
            thread.busy = False

    def observe(self, query: Tensor, key: Tensor) -> None:
        """Note the Q and K of an attention call, before the nodes are put on them.

        Args:
            query: Shape ``(..., H, N, d)``.
            key: Shape ``(..., H', M, d)``.

        Raises:
            TypeError: A nested, sparse or complex tensor, or one of ``torch.vmap``.
            ValueError: The number of per-head values is not the number of heads.
        """
        for side, x in (("query", query), ("key", key)):
            if x.is_nested or x.layout != torch.strided or not x.is_floating_point():
                raise TypeError(
                    f"layer {self.site.name!r}: the {side} tensor must be dense, strided and "
                    f"real floating point, got {x.layout} {x.dtype}"
                )
        self.refuse_vmap(query, key)
        # Without a dimension for them, heads are merged into the batch and can't be told apart.
        heads, kv_heads = (x.shape[-3] if x.ndim > 3 else 0 for x in (query, key))
        trains = query.requires_grad or key.requires_grad
        self.mark(heads, kv_heads, query.shape[-1], trains)

    def refuse_vmap(self, *tensors: Tensor | None) -> None:
        """Refuse tensors that don't tell whether they take part in differentiation.

        Args:
            *tensors: Any tensors.

        Raises:
            TypeError: One of them is batched by ``torch.vmap``.
        """
        if torch.compiler.is_compiling():
            return
        for x in tensors:
            if x is not None and torch._C._functorch.is_batchedtensor(x):
                raise TypeError(
                    f"layer {self.site.name!r}: its gradient can't be rescaled under torch.vmap; "
                    "call the model on a batch, or take the hooks off"
                )

    def mark(self, heads: int, kv_heads: int, head_dim: int, trains: bool) -> None:
        """Note that an attention call was made.

        Args:
            heads: Number of query heads.
            kv_heads: Number of key heads.
            head_dim: Size d of a head.
            trains: Whether Q or K takes part in differentiation.

        Raises:
            ValueError: The number of per-head values is not the number of heads.
        """
        self._check_heads("query", self.query, heads)
        self._check_heads("key", self.key, kv_heads)
        site = self.site
        site.heads, site.kv_heads, site.head_dim = heads or 1, kv_heads or 1, head_dim
        if trains and torch.is_grad_enabled():
            self.seen = True

    def _check_heads(self, side: str, scale: SideScale, heads: int | None) -> None:
        for factor in (scale.parallel, scale.violation):
            if factor.ndim and factor.shape[0] != heads:
                raise ValueError(
                    f"layer {self.site.name!r}: {factor.shape[0]} per-head values on the {side} "
                    f"side, which has {heads or 'no dimension for its'} heads; "
                    f"give one number{f', or {heads} values' if heads else ''}"
                )


def remove_stale() -> None:
    """Take taps off this thread's stack whose layer is not running any more.

    Module hooks are not called when a forward pass ends in a KeyboardInterrupt, as that of a
    notebook cell, so the tap stays on the stack. Until it is taken off it passes calls through.
    """
    if not torch.compiler.is_compiling():
        for mode in _get_current_function_mode_stack():
            if isinstance(mode, Tap) and (mode.removed or not _is_running(mode.site.module)):
                _take_out(mode)


def _take_out(tap: Tap) -> None:
    above = []
    while tap in _get_current_function_mode_stack():
        mode = _pop_mode()
        if mode is tap:
            break
        above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)


def _is_running(module: nn.Module) -> bool:
    """Whether this thread is inside a call of the module."""
    frame = sys._getframe(1)
    while frame is not None:
        # By name: torch.compile replaces the code, and the name then only contains the old one.
        name = frame.f_code.co_name
        if ("_call_impl" in name or "forward" in name) and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


Handler: TypeAlias = Callable[..., Any]
"""``handler(tap, func, *args, **kwargs)``: makes the call with nodes on its Q and K."""
