"""The tap of one attention layer: a function mode that puts nodes on Q and K."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spanopt.node import span_node, uniform_node
from spanopt.scale import Factor, SpanScale
from spanopt.sites import AttentionSite

__all__ = ["Handler", "SideScale", "Tap"]


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


class Tap(TorchFunctionMode):
    """Watches the torch functions that one attention layer calls, while its forward runs.

    Attributes:
        site: The layer.
        query: Scales of the query side. Replaced, never changed in place, when the user edits them:
            a backward pass under way keeps those of its forward pass.
        key: Scales of the key side.
        seen: Set when nodes were put on Q and K; the optimizer clears it after each step.
        called: Set when any attention call was seen in the forward pass under way.
    """

    def __init__(
        self,
        site: AttentionSite,
        scale: SpanScale,
        ridge: float | None,
        handlers: Sequence[tuple[Callable[..., Any], Handler]],
        nesting: Nesting,
    ) -> None:
        super().__init__()
        self.site = site
        self.ridge = ridge
        self.seen = False
        self.called = False
        self._handlers = handlers
        self._nesting = nesting
        self.set_scale(scale)

    def set_scale(self, scale: SpanScale) -> None:
        """Take other scales, from the next forward pass on.

        Args:
            scale: The scales.

        Raises:
            ValueError: The number of per-head values is not the layer's number of heads.
        """
        first = next(self.site.module.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        self.query, self.key = (
            SideScale.of(scale.side(side), self.ridge, device) for side in ("query", "key")
        )
        if self.site.heads is not None and self.site.kv_heads is not None:
            self._check_heads(self.site.heads, self.site.kv_heads)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._nesting.busy:
            # By identity: Dynamo does not find every function again in a dict.
            for function, handler in self._handlers:
                if func is function:
                    return self._handle(handler, func, args, kwargs)
        if func is Tensor.unflatten:  # Dynamo cannot trace its super() from a function mode
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _handle(self, handler: Handler, func: Any, args: Any, kwargs: Any) -> Any:
        self.called = True
        # The call goes on to the mode of an enclosing layer, which must leave it alone.
        self._nesting.busy = True
        try:
            return handler(self, func, *args, **kwargs)
        finally:
            self._nesting.busy = False

    def observe(self, query: Tensor, key: Tensor) -> None:
        """Note the Q and K of an attention call, before the nodes are put on them.

        Args:
            query: Shape ``(..., H, N, d)``.
            key: Shape ``(..., H', M, d)``.

        Raises:
            TypeError: A nested, sparse or complex tensor.
            ValueError: The number of per-head values is not the number of heads.
        """
        for side, x in (("query", query), ("key", key)):
            if x.is_nested or x.layout != torch.strided or not x.is_floating_point():
                raise TypeError(
                    f"layer {self.site.name!r}: the {side} tensor must be dense, strided and "
                    f"real floating point, got {x.layout} {x.dtype}"
                )
        heads, kv_heads = (x.shape[-3] if x.ndim > 3 else 1 for x in (query, key))
        trains = query.requires_grad or key.requires_grad
        self.mark(heads, kv_heads, query.shape[-1], trains)

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
        self._check_heads(heads, kv_heads)
        site = self.site
        site.heads, site.kv_heads, site.head_dim = heads, kv_heads, head_dim
        if trains and torch.is_grad_enabled():
            self.seen = True

    def _check_heads(self, heads: int, kv_heads: int) -> None:
        for side, scale, expected in (
            ("query", self.query, heads),
            ("key", self.key, kv_heads),
        ):
            for factor in (scale.parallel, scale.violation):
                if factor.ndim and factor.shape[0] != expected:
                    raise ValueError(
                        f"layer {self.site.name!r}: {factor.shape[0]} per-head values on the "
                        f"{side} side, which has {expected} heads; "
                        f"give one number, or {expected} values"
                    )


class Nesting:
    """Shared by the taps of one attachment: is a call being handled just now?"""

    def __init__(self) -> None:
        self.busy = False


Handler: TypeAlias = Callable[..., Any]
"""``handler(tap, func, *args, **kwargs)``: makes the call with nodes on its Q and K."""
