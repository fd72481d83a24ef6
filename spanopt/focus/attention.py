"""Attention to chosen keys, as an operator that autograd and ``torch.compile`` support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spanopt.focus.choosing import width_of
from spanopt.focus.chunked import backward, computed_in, forward, saved_width
from spanopt.focus.spec import Keeping

__all__ = ["CHUNK", "focused_attention"]

CHUNK = 64
"""The number of queries whose scores are computed at once."""


def focused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keeping: Keeping,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """Compute attention to chosen keys, with PyTorch's arguments and ``keeping`` and ``chunk``.

    Scores and weights are computed in float32 at least. For the backward pass, the function keeps
    its inputs, the multipliers of dropout, and the positions and weights of the chosen keys. The
    backward pass computes weights again where they were not kept.

    Args:
        query: Shape ``(..., H, N, d)``.
        key: Shape ``(..., H', M, d)``.
        value: Shape ``(..., H', M, d')``.
        keeping: Which keys are kept. There must be at least one key that it does not keep.
        attn_mask: See ``torch.nn.functional.scaled_dot_product_attention``, also for the next four.
        dropout_p: Probability that a weight is dropped.
        is_causal: Whether a query sees no later key.
        scale: Factor of the scores; ``None`` for 1 / sqrt(d).
        enable_gqa: Whether several query heads share a key head.
        chunk: The number of queries whose scores are computed at once.

    Returns:
        Shape ``(..., H, N, d')``.

    Example:
        >>> q, k = torch.ones(1, 1, 1), torch.tensor([[[1.0], [9.0], [2.0]]])
        >>> focused_attention(q, k, k, Keeping("top", 1))
        tensor([[[9.]]])
    """
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    batches = [x.shape[:-2] for x in (query, key, value, attn_mask) if x is not None]
    leading = torch.broadcast_shapes(*batches)
    q, k, v = (
        x.expand(*leading, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (query, key, value)
    )
    (rows, n, d), m = q.shape, k.shape[1]
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (len(leading) + 2 - attn_mask.ndim)]
    multipliers = None
    if dropout_p > 0:
        # Only for the chosen keys, so that memory stays linear in N. "gradient" keeps all keys.
        width = m if keeping.kind == "gradient" else width_of(keeping, m)
        ones = torch.ones(rows, n, width, dtype=computed_in(q), device=q.device)
        multipliers = torch.nn.functional.dropout(ones, dropout_p)
    scale = d**-0.5 if scale is None else scale
    settings = (keeping.kind, keeping.k, [*keeping.always], is_causal, scale, chunk)
    call = q, k, v, attn_mask, multipliers, [*leading], *settings
    trained = any([x is not None and x.requires_grad for x in (q, k, v, attn_mask)])  # noqa: C419
    if trained and torch.is_grad_enabled():
        out, *_ = _FocusedAttention.apply(*call)
    else:
        out, *_ = torch.ops.spanopt.focused_attention(*call)
    return out.view(*leading, n, v.shape[-1])


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast floating tensors as autocast does for PyTorch's attention."""
    first = next(x for x in tensors if x is not None)
    device = first.device.type
    if not torch.is_autocast_enabled(device) or first.dtype == torch.float64:
        return [*tensors]
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or not x.is_floating_point() else x.to(dtype) for x in tensors]


_SETTINGS = (
    "SymInt[] leading, str kind, int k, int[] always, bool is_causal, float scale, int chunk"
)
_library = torch.library.Library("spanopt", "FRAGMENT")
_library.define(
    "focused_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, "
    f"Tensor? multipliers, {_SETTINGS}) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "focused_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
    f"Tensor? mask, Tensor? multipliers, Tensor positions, Tensor weights, {_SETTINGS}, "
    "bool with_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("focused_attention", forward, "CompositeExplicitAutograd")
_library.impl("focused_attention_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("spanopt::focused_attention", lib=_library)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    multipliers: Any,
    leading: Any,
    kind: str,
    of_each: int,
    always: Sequence[int],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = q.shape[:2]
    keeping, m = Keeping(kind, of_each, tuple(always)), k.shape[1]
    positions = q.new_empty(rows, n, width_of(keeping, m), dtype=torch.int32)
    weights = q.new_empty(rows, n, saved_width(keeping, m, q.device), dtype=computed_in(q))
    return q.new_empty(rows, n, v.shape[-1]), positions, weights


@torch.library.register_fake("spanopt::focused_attention_backward", lib=_library)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    of_mask = torch.empty_like(mask) if mask is not None and rest[-1] else q.new_empty(0)
    return (*(x.new_empty(x.shape) for x in (q, k, v)), of_mask)  # contiguous, as they come


class _FocusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        multipliers: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.spanopt.focused_attention(
            q, k, v, mask, multipliers, *settings
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings = inputs[5:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:5], *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        with_mask = ctx.needs_input_grad[3]
        of_q, of_k, of_v, of_mask = torch.ops.spanopt.focused_attention_backward(
            grad, *ctx.saved_tensors, *ctx.settings, with_mask
        )
        return of_q, of_k, of_v, of_mask if with_mask else None, None, *(None,) * 7
