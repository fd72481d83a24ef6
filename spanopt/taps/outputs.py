"""Projection tap: Q and K as the outputs of modules that the user names.

This tap is for attention in a kernel that no other tap can see into. It sees Q and K right after
their projection: before rotary embedding, QK-norm and anything else that the layer does to them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanopt.compiling import not_compiled_alone
from spanopt.declarations import Declaration, declare
from spanopt.node import apply
from spanopt.rescaling import Rescaling
from spanopt.scale import SpanScale
from spanopt.sites import AttentionSite
from spanopt.taps.calls import thread
from spanopt.taps.layouts import OutputLayout
from spanopt.taps.mode import keeping
from spanopt.taps.real import Tokens, given_tokens
from spanopt.taps.refusals import refuse, refuse_vmap
from spanopt.taps.tap import Tap
from spanopt.taps.telling import Watched, Watcher

__all__ = ["ProjectionTap"]


@not_compiled_alone
class ProjectionTap(Tap):
    """The tap of a layer for which the user names the modules that compute Q and K.

    No other tap acts on such a layer.

    Attributes:
        projections: The modules, and how Q and K lie in their outputs.
    """

    def __init__(
        self,
        site: AttentionSite,
        scale: SpanScale,
        rescaling: Rescaling,
        projections: list[OutputLayout],
    ) -> None:
        if rescaling.setup.needs_other:
            raise ValueError(
                f"layer {site.name!r}: the projection {rescaling.setup.name!r} needs queries and "
                "keys at once, which qk_modules={...} shows one by one; give it projection='span', "
                "or pass a function that reads its own side alone as "
                "spanopt.setups.Setup(name, function, needs_other=False)"
            )
        self.projections = projections
        self._shapes: dict[str, torch.Size] = {}
        super().__init__(site, scale, rescaling, {})

    def on_output(self, projection: OutputLayout, output: Tensor) -> Tensor:
        """Put the node on a module's output.

        Args:
            projection: The module, and how Q and K lie in its output.
            output: Shape ``(..., N, features)``, or ``(N, B, features)`` where the projection is
                not ``batch_first``.

        Returns:
            A view of the output, a copy where the layer changes the output in place, or the output
            itself where there is nothing to do.

        Raises:
            TypeError: The output is not a dense floating-point tensor.
            ValueError: Its features do not divide into heads.
        """
        call = self.current_call()
        place = self.place()
        if call is None or not place.inside:
            return output
        layer, name = self.site.name, projection.name
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise TypeError(
                f"layer {layer!r}: {name!r} must return a tensor (..., N, features) for the "
                f"projection tap, got {type(output).__name__}"
            )
        whole = output
        refuse(self.site, **{name: output})
        refuse_vmap(self.site.name, output)
        projection.check(layer, output.shape[-1])
        if output.ndim > 2 and not projection.batch_first:
            output = output.transpose(0, 1)
        *batch, length, features = output.shape
        head_dim = features // (projection.blocks * projection.width)
        given = dict(zip(("query", "key"), self.given() or (None, None), strict=True))
        sides: dict[str, _Side] = {}
        for side, _, count in projection.sides:
            shape = torch.Size((*batch, projection.blocks * count, length, head_dim))
            self._note(side, shape)
            rescaling = self.query if side == "query" else self.key
            rescaling.check_range(output.dtype, f"layer {layer!r}, {side} side")
            tokens = given_tokens(given[side], shape, side, layer) or Tokens()
            sides[side] = _Side(rescaling, tokens)
        idle = self.watching() is None and all(
            side.rescaling.mode == "identity" for side in sides.values()
        )
        if idle or not (output.requires_grad and torch.is_grad_enabled()):
            return whole
        query, key = (sides.get(side, _Side()) for side in ("query", "key"))
        thread.busy = True  # compiled code traces the backward here, outside of any call
        try:
            with keeping(place):
                result = apply(
                    _ProjectionNode,
                    output,
                    projection.blocks,
                    projection.width,
                    projection.sides,
                    query.rescaling,
                    *query.tokens,
                    key.rescaling,
                    *key.tokens,
                )
        finally:
            thread.busy = False
        call.streams.follow("", result, (output,), {})
        watcher = self.watching()
        if watcher is not None:
            self._watch(watcher, projection, output.detach(), sides, result)
        if result.ndim > 2 and not projection.batch_first:
            result = result.transpose(0, 1)
        # With the copy the layer changes a tensor of its own, and the node keeps Q and K unchanged.
        return result.clone() if projection.in_place else result

    def _watch(
        self,
        watcher: Watcher,
        projection: OutputLayout,
        output: Tensor,
        sides: dict[str, _Side],
        result: Tensor,
    ) -> None:
        """Arrange for a watcher to be told of the gradients of each side."""

        def note(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
            if inputs[0] is None or outputs[0] is None:
                return
            for side, first, count in projection.sides:
                part = projection.blocks, projection.width, first, count
                x, given, rescaled = (
                    _heads(x, *part).flatten(-4, -3) for x in (output, outputs[0], inputs[0])
                )
                rescaling, tokens = sides[side]
                watched = Watched(self.site.name, side, x, rescaling, *tokens)
                watcher.gradients(watched, given, rescaled)

        assert result.grad_fn is not None
        result.grad_fn.register_hook(note)

    def _note(self, side: str, shape: torch.Size) -> None:
        """Mark the layer as seen once the shapes of both sides are known."""
        self._shapes[side] = shape
        if len(self._shapes) < 2:
            return
        query, key = self._shapes["query"], self._shapes["key"]
        self._shapes = {}
        if query[-1] != key[-1]:
            raise ValueError(
                f"layer {self.site.name!r}: the query's heads have {query[-1]} features and the "
                f"key's {key[-1]}; check num_heads and num_kv_heads in qk_modules={{...}}"
            )
        self.mark("projection", query[-3], key[-3], query[-1], (query[-2], key[-2]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except RuntimeError as error:
            if not any(text in str(error) for text in ("_ProjectionNode", "a custom Function")):
                raise
            raise RuntimeError(
                f"layer {self.site.name!r} changes the output of a projection in place, which the "
                "projection tap has a node on: write q = q * scale in place of q *= scale, or "
                "give the layer's entry of qk_modules 'in_place': True"
            ) from error


class _Side(NamedTuple):
    """What the node has to know about one side. The default is for a side not in the output."""

    rescaling: Rescaling = Rescaling(mode="identity")
    tokens: Tokens = Tokens()


def _heads(x: Tensor, blocks: int, width: int, first: int, count: int) -> Tensor:
    """Return the heads of one side in a module's output, shape (..., blocks, count, N, d)."""
    heads = x.view(*x.shape[:-1], blocks, width, -1)[..., first : first + count, :]
    return heads.movedim(-4, -2)


class _ProjectionNode(torch.autograd.Function):
    @staticmethod
    def forward(
        output: Tensor,
        blocks: int,
        width: int,
        sides: tuple[tuple[str, int, int], ...],
        query: Rescaling,
        query_mask: Tensor | None,
        query_documents: Tensor | None,
        key: Rescaling,
        key_mask: Tensor | None,
        key_documents: Tensor | None,
    ) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.blocks, ctx.width, ctx.sides, ctx.query, *query_tokens, ctx.key = inputs[:8]
        ctx.save_for_backward(x, *query_tokens, *inputs[8:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, query_mask, query_documents, key_mask, key_documents = ctx.saved_tensors
        tokens = {"query": (query_mask, query_documents), "key": (key_mask, key_documents)}
        grad = grad.clone(memory_format=torch.contiguous_format)
        for side, first, count in ctx.sides:
            rescaling = ctx.query if side == "query" else ctx.key
            if rescaling.mode == "identity":
                continue
            # The shape is (..., blocks, count, N, d). Flattening it to (..., H, N, d) may copy.
            part, basis = (_heads(t, ctx.blocks, ctx.width, first, count) for t in (grad, x))
            mask, documents = tokens[side]
            scaled = rescaling(
                part.flatten(-4, -3), basis.flatten(-4, -3), mask=mask, documents=documents
            )
            part.copy_(scaled.view_as(part))
        return grad, None, None, None, None, None, None, None, None, None


declare(Declaration("projection", "in the modules that qk_modules names"))
