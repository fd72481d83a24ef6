"""Focus on one layer: the object that its tap asks when the layer computes attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spanopt.focus.attention import focused_attention
from spanopt.focus.choosing import chosen, kept_scores, may_be_none
from spanopt.focus.spec import Focus, Keeping
from spanopt.shards import is_context_parallel, is_spread
from spanopt.sites import AttentionSite
from spanopt.taps.tap import Tap

__all__ = ["LayerFocus", "UnfocusedLayerError"]


class UnfocusedLayerError(RuntimeError):
    """Focus was asked for on a layer, but the scores of its attention are not seen."""


class LayerFocus:
    """Focus on one layer; a :class:`~spanopt.taps.focusing.Focusing`.

    Attributes:
        focus: What the user asks for.
        keeping: Which keys are kept at this step; ``None`` if all are kept.
        reached: Whether the layer's attention was seen since its forward pass began.
    """

    def __init__(self, focus: Focus) -> None:
        self.focus = focus
        self.keeping: Keeping | None = focus.at(0)
        self.reached: bool = False

    def acts(self, tap: Tap, args: Any, kwargs: Any) -> bool:
        """Return whether focus changes a call of the layer, as far as its arguments show.

        Args:
            tap: The layer's tap.
            args: The positional arguments of the call.
            kwargs: The arguments of the call by name.
        """
        keeping = self._now(tap)
        module = tap.site.module
        if keeping is not None and isinstance(module, nn.MultiheadAttention):
            # A watched layer can't take PyTorch's fast path, which rounds differently.
            key = kwargs.get("key", args[min(1, len(args) - 1)] if args else None)
            if isinstance(key, Tensor) and key.ndim in (2, 3):
                keys = key.shape[1 if module.batch_first and key.ndim == 3 else 0]
                appended = (module.bias_k is not None) + bool(module.add_zero_attn)
                keeping = keeping.fitting(keys + appended)
        return keeping is not None

    def reach(self, tap: Tap) -> None:
        """Note that a layer's attention is seen.

        Raises:
            UnfocusedLayerError: The layer runs it under activation checkpointing within itself.
        """
        self.reached = True
        if tap.place().repeated:
            raise self.unseen(
                tap,
                "runs its attention under activation checkpointing within itself, and the second "
                "run would not be seen; checkpoint the layer as a whole",
            )

    def signature(self, tap: Tap) -> tuple[Any, ...]:
        """Return all values on which compiled code depends, as numbers and text."""
        keeping = self._now(tap)
        return () if keeping is None else (keeping.kind, keeping.k, *keeping.always)

    def attention(
        self, tap: Tap, func: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the result of a call of ``scaled_dot_product_attention``.

        Args:
            tap: The layer's tap.
            func: The attention function.
            query: Shape ``(..., H, N, d)``.
            key: Shape ``(..., H', M, d)``.
            *args: Further arguments of the call.
            **kwargs: Arguments of the call by name.

        Raises:
            TypeError: A nested tensor, a DTensor, or only a part of a sequence.
        """
        self.reach(tap)
        keeping = self._now(tap)
        keeping = None if keeping is None else keeping.fitting(key.shape[-2])
        if keeping is None:
            result: Tensor = func(query, key, *args, **kwargs)
            return result
        _refuse(tap.site, query, key, *args)
        _check_positions(tap, keeping)
        value, *rest = args
        focused = focused_attention(query, key, value, keeping, *rest, **kwargs)
        drops = bool(rest[1] if len(rest) > 1 else kwargs.get("dropout_p", 0.0))
        if keeping.kind != "gradient" or drops:
            return focused
        with torch.no_grad():
            plain = func(query, key, *args, **kwargs)
        return _InPlaceOf.apply(focused, plain)

    def scores(
        self,
        tap: Tap,
        x: Tensor,
        key_axis: int,
        query_axes: tuple[int, ...],
        has_others: bool = False,
    ) -> Tensor:
        """Return the scores for the softmax, with -inf at keys that are not kept.

        Args:
            tap: The layer's tap.
            x: The scores with their masks.
            key_axis: The dimension of keys, counted from the end.
            query_axes: The dimensions of queries, counted from the end.
            has_others: Whether there are keys, such as a sink, that are not in K.

        Raises:
            TypeError: A DTensor, or only a part of a sequence.
            UnfocusedLayerError: The kind of focus goes by positions that the scores don't have.
        """
        self.reach(tap)
        keeping = self._now(tap)
        keeping = None if keeping is None else keeping.fitting(x.shape[key_axis])
        if keeping is None:
            return x
        _refuse(tap.site, x)
        _check_positions(tap, keeping, has_others)
        if len(query_axes) > 1 and keeping.kind in ("window", "block", "strided"):
            raise UnfocusedLayerError(
                f"layer {tap.site.name!r} has the positions of queries in {len(query_axes)} "
                f"dimensions, and kind={keeping.kind!r} goes by one; give it kind='top'"
            )
        order = [i for i in range(-x.ndim, 0) if i not in (key_axis, query_axes[-1])]
        order += [query_axes[-1], key_axis]
        turned = x.permute(order)
        with torch.no_grad():
            by = turned.detach()
            by = by if by.dtype == torch.float64 else by.float()
            positions = chosen(by, keeping, 0, by.shape[-2], by.shape[-1])
            kept, _ = kept_scores(by, positions, may_be_none(keeping))
            dropped = kept == -torch.inf
        if keeping.kind == "gradient":
            turned = _GradientOf.apply(turned, dropped)
        else:
            turned = turned.masked_fill(dropped, -torch.inf)
        return turned.permute([order.index(i) for i in range(-x.ndim, 0)])

    def unseen(self, tap: Tap, reason: str) -> RuntimeError:
        """Return the error about a layer whose scores are not seen.

        Args:
            tap: The layer's tap.
            reason: What the layer did, as the end of a sentence that begins with "it".
        """
        site = tap.site
        return UnfocusedLayerError(
            f"no focus on layer {site.name!r} ({site.class_name}): it {reason}. Focus chooses keys "
            "by scores that it sees: those of torch.nn.functional.scaled_dot_product_attention, of "
            "nn.MultiheadAttention, and of a softmax that a product of Q and K reaches. Leave the "
            f"layer out: focus(model, {{..., {site.name!r}: None}})"
        )

    def _now(self, tap: Tap) -> Keeping | None:
        rests = self.focus.training_only and not tap.site.module.training
        return None if rests else self.keeping


def _check_positions(tap: Tap, keeping: Keeping, has_others: bool = False) -> None:
    """Refuse a pattern of positions if some keys are not those of the sequence's tokens.

    Raises:
        UnfocusedLayerError: The pattern is refused.
    """
    module = tap.site.module
    if isinstance(module, nn.MultiheadAttention):
        has_others = module.bias_k is not None or bool(module.add_zero_attn)
    if has_others and keeping.kind in ("window", "block", "strided"):
        raise UnfocusedLayerError(
            f"layer {tap.site.name!r} has other keys beside those of its tokens, such as a sink, "
            f"and kind={keeping.kind!r} goes by positions; give it kind='top'"
        )


def _refuse(site: AttentionSite, *tensors: Any) -> None:
    for x in tensors:
        if not isinstance(x, Tensor):
            continue
        if is_spread(x) or x.is_nested:
            kind = "nested tensor" if x.is_nested else "DTensor"
            raise TypeError(
                f"layer {site.name!r}: focus can't choose keys in a {kind}: give attention dense, "
                "local tensors, or leave the layer out"
            )
    if is_context_parallel():
        raise TypeError(
            f"layer {site.name!r}: the sequence is sharded by context_parallel, and a process sees "
            "a part of the keys, of which focus can't choose; leave the layer out"
        )


class _InPlaceOf(torch.autograd.Function):
    """A function that returns another tensor's exact values, but passes the gradient to ``x``."""

    @staticmethod
    def forward(x: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _GradientOf(torch.autograd.Function):
    """The identity on scores, whose gradient is zero at the scores that are dropped."""

    @staticmethod
    def forward(x: Tensor, dropped: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dropped,) = ctx.saved_tensors
        return grad.masked_fill(dropped, 0), None
