"""Attention to chosen keys, in chunks of queries: forward, backward, and what autograd sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spanopt.focus.choosing import chosen, kept_scores, may_be_none, spread, width_of
from spanopt.focus.spec import Keeping

__all__ = ["CHUNK", "focused_attention"]

CHUNK = 64
"""Queries whose scores are computed at once."""


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
    """Compute attention to chosen keys; all arguments but two are those of PyTorch's attention.

    Scores and weights are computed in float32 at least. Besides its inputs and output, the
    function keeps for the backward pass which keys were chosen, and computes their weights again.

    Args:
        query: Shape ``(..., H, N, d)``.
        key: Shape ``(..., H', M, d)``.
        value: Shape ``(..., H', M, d')``.
        keeping: Which keys are kept. At least one must not be.
        attn_mask: See ``torch.nn.functional.scaled_dot_product_attention``, as for what follows.
        dropout_p: Probability that a weight is dropped.
        is_causal: Whether a query sees no later key.
        scale: Factor of the scores; ``None`` for 1 / sqrt(d).
        enable_gqa: Whether several query heads share a key head.
        chunk: Queries whose scores are computed at once.

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
        # Of the chosen keys alone, so that memory stays linear in N; "gradient" keeps all.
        width = m if keeping.kind == "gradient" else width_of(keeping, m)
        ones = torch.ones(rows, n, width, dtype=_dtype(q), device=q.device)
        multipliers = torch.nn.functional.dropout(ones, dropout_p)
    scale = d**-0.5 if scale is None else scale
    settings = (keeping.kind, keeping.k, [*keeping.always], is_causal, scale, chunk)
    call = q, k, v, attn_mask, multipliers, [*leading], *settings
    trained = any([x is not None and x.requires_grad for x in (q, k, v, attn_mask)])  # noqa: C419
    if trained and torch.is_grad_enabled():
        out, _ = _FocusedAttention.apply(*call)
    else:
        out, _ = torch.ops.spanopt.focused_attention(*call)
    return out.view(*leading, n, v.shape[-1])


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast floating tensors as autocast does for PyTorch's attention."""
    first = next(x for x in tensors if x is not None)
    device = first.device.type
    if not torch.is_autocast_enabled(device) or first.dtype == torch.float64:
        return [*tensors]
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or not x.is_floating_point() else x.to(dtype) for x in tensors]


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Settings(NamedTuple):
    """What holds for all chunks of a call."""

    keeping: Keeping
    leading: list[int]
    is_causal: bool
    scale: float
    chunk: int
    queries: int
    keys: int

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Yield the first query of each chunk, the one after its last, and a number of keys.

        Later keys are closed to all queries of the chunk.
        """
        kind, k, always = self.keeping.kind, self.keeping.k, self.keeping.always
        for first in range(0, self.queries, self.chunk):
            last = min(first + self.chunk, self.queries)
            seen = self.keys
            if self.is_causal and kind in ("top", "window", "gradient"):
                seen = min(seen, max(last, k + len(always), always[-1] + 1 if always else 0))
            yield first, last, seen

    def scores(
        self, q: Tensor, k: Tensor, mask: Tensor | None, first: int, last: int, seen: int
    ) -> Tensor:
        """Return the scores of a chunk, shape (rows, n, seen), with masks in them."""
        scores = torch.bmm(q[:, first:last] * self.scale, k[:, :seen].mT)
        if self.is_causal:
            row = torch.arange(first, last, device=q.device)[:, None]
            scores.masked_fill_(row < torch.arange(seen, device=q.device), -math.inf)
        if mask is not None:
            part = self.part(mask, first, last, seen)
            by_row = scores.view(*self.leading, last - first, seen)
            if mask.dtype == torch.bool:
                by_row.masked_fill_(~part, -math.inf)
            else:
                by_row += part
        return scores

    def part(self, mask: Tensor, first: int, last: int, seen: int) -> Tensor:
        """Return what of a mask is for a chunk."""
        mask = mask if mask.shape[-2] == 1 else mask[..., first:last, :]
        return mask if mask.shape[-1] == 1 else mask[..., :seen]

    def weights(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Return the attention weights of a chunk."""
        kept, best = kept_scores(scores, positions, may_be_none(self.keeping))
        weights = (scores if self.keeping.kind == "gradient" else kept).softmax(-1)
        # As in PyTorch's attention, a query to which all keys are closed gets zeros.
        return weights.masked_fill_((best == -math.inf) & weights[..., :1].isnan(), 0)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    multipliers: Tensor | None,
    leading: Sequence[int],
    kind: str,
    of_each: int,
    always: Sequence[int],
    is_causal: bool,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    keeping = Keeping(kind, of_each, tuple(always))
    n, m = q.shape[1], k.shape[1]
    settings = _Settings(keeping, [*leading], is_causal, scale, chunk, n, m)
    out = q.new_empty(len(q), n, v.shape[-1])
    all_positions = torch.empty(len(q), n, width_of(keeping, m), dtype=torch.int32, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(_dtype(q)) for x in (q, k, v))
        for first, last, seen in settings.chunks():
            scores = settings.scores(q, k, mask, first, last, seen)
            positions = chosen(scores, keeping, first, n, m)
            all_positions[:, first:last] = positions
            weights = settings.weights(scores, positions)
            if multipliers is not None:
                weights *= _multipliers(multipliers, keeping, first, last, positions, seen)
            out[:, first:last] = torch.bmm(weights, v[:, :seen])
    return out, all_positions


def _multipliers(
    multipliers: Tensor, keeping: Keeping, first: int, last: int, positions: Tensor, seen: int
) -> Tensor:
    """Return what dropout multiplies the weights of a chunk with, shape (rows, n, seen)."""
    part = multipliers[:, first:last]
    return part[..., :seen] if keeping.kind == "gradient" else spread(part, positions, seen, 1.0)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    multipliers: Tensor | None,
    all_positions: Tensor,
    leading: Sequence[int],
    kind: str,
    of_each: int,
    always: Sequence[int],
    is_causal: bool,
    scale: float,
    chunk: int,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keeping = Keeping(kind, of_each, tuple(always))
    n, m = q.shape[1], k.shape[1]
    settings = _Settings(keeping, [*leading], is_causal, scale, chunk, n, m)
    dtypes = [x.dtype for x in (q, k, v)]
    with torch.autocast(q.device.type, enabled=False):
        grad, q, k, v = (x.to(_dtype(q)) for x in (grad, q, k, v))
        of_q, of_k, of_v = (torch.zeros_like(x) for x in (q, k, v))
        of_mask = torch.zeros_like(mask) if mask is not None and with_mask else q.new_zeros(0)
        for first, last, seen in settings.chunks():
            scores = settings.scores(q, k, mask, first, last, seen)
            positions = all_positions[:, first:last].long()
            weights = settings.weights(scores, positions)
            given = grad[:, first:last]
            of_weights = torch.bmm(given, v[:, :seen].mT)
            if multipliers is None:
                of_v[:, :seen] += torch.bmm(weights.mT, given)
            else:
                by = _multipliers(multipliers, keeping, first, last, positions, seen)
                of_v[:, :seen] += torch.bmm((weights * by).mT, given)
                of_weights *= by
            of_weights -= (of_weights * weights).sum(-1, keepdim=True)
            of_scores = of_weights.mul_(weights)
            if kind == "gradient":
                of_scores = _of_kept(of_scores, scores, positions, keeping)
            of_q[:, first:last] = torch.bmm(of_scores, k[:, :seen]) * scale
            of_k[:, :seen] += torch.bmm(of_scores.mT, q[:, first:last]) * scale
            if mask is not None and with_mask:
                part = settings.part(of_mask, first, last, seen)
                by_row = of_scores.view(*leading, last - first, seen)
                part += by_row.sum_to_size(part.shape).to(part.dtype)
    of_q, of_k, of_v = (x.to(dtype) for x, dtype in zip((of_q, of_k, of_v), dtypes, strict=True))
    return of_q, of_k, of_v, of_mask


def _of_kept(x: Tensor, scores: Tensor, positions: Tensor, keeping: Keeping) -> Tensor:
    """Return the entries at keys that are kept, zero at others."""
    kept, _ = kept_scores(scores, positions, may_be_none(keeping))
    return torch.where(kept > -math.inf, x, 0)


_SETTINGS = (
    "SymInt[] leading, str kind, int k, int[] always, bool is_causal, float scale, int chunk"
)
_library = torch.library.Library("spanopt", "FRAGMENT")
_library.define(
    "focused_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, "
    f"Tensor? multipliers, {_SETTINGS}) -> (Tensor, Tensor)"
)
_library.define(
    "focused_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
    f"Tensor? mask, Tensor? multipliers, Tensor positions, {_SETTINGS}, bool with_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("focused_attention", _forward, "CompositeExplicitAutograd")
_library.impl("focused_attention_backward", _backward, "CompositeExplicitAutograd")


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
) -> tuple[Tensor, Tensor]:
    width = width_of(Keeping(kind, of_each, tuple(always)), k.shape[1])
    positions = q.new_empty(q.shape[0], q.shape[1], width, dtype=torch.int32)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[-1]), positions


@torch.library.register_fake("spanopt::focused_attention_backward", lib=_library)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    of_mask = torch.empty_like(mask) if mask is not None and rest[-1] else q.new_empty(0)
    return (*(torch.empty_like(x) for x in (q, k, v)), of_mask)


class _FocusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        multipliers: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = torch.ops.spanopt.focused_attention(
            q, k, v, mask, multipliers, *settings
        )
        return both

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings = inputs[5:]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:5], output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        q, k, v, mask, multipliers, positions = ctx.saved_tensors
        with_mask = ctx.needs_input_grad[3]
        of_q, of_k, of_v, of_mask = torch.ops.spanopt.focused_attention_backward(
            grad, q, k, v, mask, multipliers, positions, *ctx.settings, with_mask
        )
        return of_q, of_k, of_v, of_mask if with_mask else None, None, *(None,) * 7
