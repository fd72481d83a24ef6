"""Measures of the gradients of Q and K: functions from tensors to tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spanopt.setups import SPAN
from spanopt.taps.telling import Watched

__all__ = ["MEASURES", "by_head", "entropies", "floating", "measure", "score_chunks"]

MEASURES = (
    "parallel_energy",
    "violation_energy",
    "parallel_share",
    "chance_share",
    "effective_rank",
    "condition",
    "cosine",
    "norm_before",
    "norm_after",
    "entropy",
)
# The number of scores that are computed at once.
_CHUNK = 2**24


def measure(watched: Watched, given: Tensor, rescaled: Tensor) -> dict[str, Tensor]:
    """Return every measure of a gradient except the entropy and the parallel share.

    Args:
        watched: Q or K, and how its gradient is rescaled.
        given: The gradient before rescaling, with the shape of Q or K.
        rescaled: The gradient after rescaling.

    Returns:
        For each measure, one value per head, shape ``(H,)``.
    """
    mask = watched.mask
    if mask is not None:
        mask = by_head(mask.expand(watched.x.shape[:-1])[..., None])[..., 0]
    x, given, rescaled = (by_head(floating(t.detach())) for t in (watched.x, given, rescaled))
    other = None if watched.other is None else by_head(floating(watched.other))
    parallel = watched.rescaling.parallel_part(
        given, x, mask=mask, documents=watched.documents, other=other
    )
    energies = (t.square().sum((0, 2, 3)) for t in (parallel, given - parallel))
    before, after = (torch.linalg.vector_norm(t, dim=(0, 2, 3)) for t in (given, rescaled))
    singular = _singular_values(x if mask is None else torch.where(mask[..., None], x, 0))
    weights = singular / singular.sum(-1, keepdim=True)
    rank = torch.special.entr(weights).sum(-1).exp()
    measured = {}
    if watched.rescaling.setup is SPAN and watched.documents is None:
        real_tokens = x.new_ones(x.shape[:-1]) if mask is None else mask.to(x.dtype)
        tokens = real_tokens.sum(-1).clamp(min=1)  # (B, H)
        measured["chance_share"] = (tokens.clamp(max=x.shape[-1]) / tokens).mean(0)
    return measured | {
        **dict(zip(("parallel_energy", "violation_energy"), energies, strict=True)),
        "effective_rank": rank.nanmean(0),
        "condition": (singular[..., 0] / singular[..., -1]).nanmedian(0).values,
        "cosine": (given * rescaled).sum((0, 2, 3)) / (before * after),
        "norm_before": before,
        "norm_after": after,
    }


def _singular_values(x: Tensor) -> Tensor:
    """Return the singular values; they are NaN for a matrix with entries that are not finite."""
    finite = x.isfinite().all(-1).all(-1)[..., None]  # (B, H, 1)
    singular = torch.linalg.svdvals(torch.where(finite[..., None], x, 0))
    return torch.where(finite, singular, math.nan)


def score_chunks(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Iterator[Tensor]:
    """Yield the scores that a call of ``scaled_dot_product_attention`` computes, masks included.

    Args:
        query: Shape ``(..., H, N, d)``.
        key: Shape ``(..., H', M, d)``.
        mask: The call's ``attn_mask``.
        is_causal: Whether a query sees no later key.
        scale: Factor of the scores; ``None`` for 1 / sqrt(d).
        enable_gqa: Whether several query heads share a key head.

    Yields:
        Scores of shape ``(..., H, n, M)``, for n queries at a time, so that memory is bounded.
    """
    query, key = query.detach(), key.detach()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = query.shape[-2], key.shape[-2]
    size = max(1, _CHUNK // max(1, query.shape[:-2].numel() * keys))
    for first in range(0, queries, size):
        part = floating(query[..., first : first + size, :]) @ floating(key).mT * scale
        if is_causal:
            rows = torch.arange(first, first + part.shape[-2], device=part.device)
            future = rows[:, None] < torch.arange(keys, device=part.device)
            part = part.masked_fill(future, -math.inf)
        if mask is not None:
            rows_of = mask if mask.shape[-2] == 1 else mask[..., first : first + size, :]
            part = _masked(part, rows_of)
        yield part


def by_head(x: Tensor) -> Tensor:
    """Return (B, ..., N, d) as (B, H, N, d). Without a dimension of heads, H is 1."""
    if x.ndim < 4:
        return x.reshape(-1, 1, *x.shape[-2:])
    return x.flatten(1, -3)


def floating(x: Tensor) -> Tensor:
    """Return a float64 tensor as it is, and any other in float32."""
    return x if x.dtype == torch.float64 else x.float()


def entropies(weights: Tensor) -> Tensor:
    """Return the entropy in nats of each query's attention weights."""
    return torch.special.entr(weights).sum(-1)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
