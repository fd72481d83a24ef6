"""Measures of attention scores, which tell whether attention to fewer keys could pay.

The quantities and their names are those of Ram, Clarkson, Klinger, Ubaru and Gray, "Transformers
Learn Faster with Semantic Focus" (2025, arXiv 2506.14095). The authors' code for them is
``bounds-lhs.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["SCORE_MEASURES", "lambda_w", "lambda_x", "largest_eigenvalue", "measure_scores"]

SCORE_MEASURES = (
    "dispersion",
    "top_dispersion",
    "separation",
    "unchosen",
    "popular",
    "sink_ratio",
    "jacobian",
    "lambda_w",
    "lambda_x",
)

# A score of this or less means that a mask closes the key, the same as in spanopt.taps.masks.
_FORBIDDEN = -9e3
# The authors take this quantile of dispersions over queries, and the 1 - 0.95 one of separations.
_QUANTILE = 0.95
_LEAST = 1e-9
# About how many queries of each sequence and head have their Jacobian taken, evenly spaced.
_JACOBIANS = 64


def measure_scores(
    chunks: Iterable[Tensor], k: int, real: Tensor | None = None
) -> dict[str, Tensor]:
    """Return every measure of one attention call, see :data:`SCORE_MEASURES`.

    Args:
        chunks: The scores with their masks, in chunks of queries, shape ``(B, H, n, M)``. One
            chunk is held at a time.
        k: The number of keys that focus would keep.
        real: True at real queries, shape ``(B, H, N)``; ``None`` if all are real.

    Returns:
        For each measure, one value per head, shape ``(H,)``. Measures that need k are NaN if no
        query sees more than k keys.

    Example:
        >>> scores = torch.tensor([[[[4.0, 3.0, 0.0, -1.0]]]])
        >>> measured = measure_scores([scores], k=2)
        >>> [round(measured[name].item(), 4) for name in ("dispersion", "separation", "unchosen")]
        [5.0, 3.0, 0.5]
    """
    parts: dict[str, list[Tensor]] = {"dispersion": [], "top_dispersion": [], "separation": []}
    jacobians: list[Tensor] = []
    counts = seen = queries = None
    first = 0
    for scores in chunks:
        n, keys = scores.shape[-2:]
        if counts is None or seen is None or queries is None:
            counts = scores.new_zeros(*scores.shape[:-2], keys)
            seen, queries = torch.zeros_like(counts, dtype=torch.bool), counts[..., 0].clone()
        open_keys = scores > _FORBIDDEN
        number = open_keys.sum(-1)
        counted = number > 0
        if real is not None:
            of_chunk = real if real.shape[-1] == 1 else real[..., first : first + n]
            counted = counted & of_chunk
        wide = counted & (number > k)
        largest = scores.amax(-1)
        smallest = scores.masked_fill(~open_keys, math.inf).amin(-1)
        parts["dispersion"].append(_where(counted, largest - smallest))
        best = scores.topk(min(k + 1, keys), dim=-1)
        if keys > k:
            values = best.values
            parts["top_dispersion"].append(_where(wide, values[..., 0] - values[..., k - 1]))
            parts["separation"].append(_where(wide, values[..., k - 1] - values[..., k]))
            chosen = wide[..., None].expand_as(best.indices[..., :k]).to(counts.dtype)
            counts.scatter_add_(-1, best.indices[..., :k].flatten(-2), chosen.flatten(-2))
        seen |= (open_keys & wide[..., None]).any(-2)
        queries += wide.sum(-1)
        jacobians.append(_where(counted, largest_eigenvalue(scores.softmax(-1))))
        first += n
    if counts is None or seen is None or queries is None:
        raise ValueError("there are no scores to measure")
    heads = counts.shape[1]
    nothing = counts.new_full((heads,), math.nan)
    delta = _quantile(parts["dispersion"], _QUANTILE)
    measured = {
        "dispersion": delta,
        "jacobian": torch.cat(jacobians, -1).transpose(0, 1).flatten(1).nanmean(-1),
    }
    if not parts["separation"]:
        return {name: measured.get(name, nothing) for name in SCORE_MEASURES}
    top = _quantile(parts["top_dispersion"], _QUANTILE)
    separation = _quantile(parts["separation"], 1 - _QUANTILE)
    of_keys = _where(seen, counts)
    beta = _quantile([of_keys], _QUANTILE) / k
    unchosen = _where(seen, (counts == 0).to(counts.dtype))
    popular = torch.where(queries > 0, counts.amax(-1) / queries, math.nan)
    measured |= {
        "top_dispersion": top,
        "separation": separation,
        "sink_ratio": beta,
        "unchosen": unchosen.transpose(0, 1).flatten(1).nanmean(-1),
        "popular": popular.nanmean(0),
        "lambda_w": lambda_w(delta, top, separation),
        "lambda_x": lambda_x(delta, top, separation, beta),
    }
    return {name: measured[name] for name in SCORE_MEASURES}


def lambda_w(dispersion: Tensor, top_dispersion: Tensor, separation: Tensor) -> Tensor:
    """Return the left side of the paper's condition on weights, which is met below 1.

    The paper bounds how much the loss changes with the weights of attention. If the condition is
    met, this bound is tighter for focus than for full attention. The authors' ``bounds-lhs.py``
    calls the value ``wratio``.

    Args:
        dispersion: delta_s, the largest minus the smallest score of a query.
        top_dispersion: delta_h, the same for the query's k largest scores.
        separation: Delta_h, the query's k-th largest score minus the next.

    Example:
        >>> of_list_ops = torch.tensor([8.61]), torch.tensor([3.51]), torch.tensor([0.016])
        >>> lambda_w(*of_list_ops).item() < 1
        True
    """
    delta, gap = dispersion.clamp(min=_LEAST), separation.clamp(min=_LEAST)
    return top_dispersion / delta + (2 * (1 + 1 / gap)).log() / delta


def lambda_x(
    dispersion: Tensor, top_dispersion: Tensor, separation: Tensor, sink_ratio: Tensor
) -> Tensor:
    """Return the left side of the paper's condition on inputs, which is met below 1.

    The authors' ``bounds-lhs.py`` calls the value ``xratio``. See :func:`lambda_w`.

    Args:
        dispersion: delta_s.
        top_dispersion: delta_h.
        separation: Delta_h.
        sink_ratio: beta / k, how many queries choose one key, divided by k.
    """
    delta, gap = dispersion.clamp(min=_LEAST), separation.clamp(min=_LEAST)
    inner = delta * (1 + sink_ratio) * (1 + 1 / gap) + sink_ratio
    return top_dispersion / delta + (inner.log() - (delta + 1).log()) / delta


def largest_eigenvalue(weights: Tensor, steps: int = 30) -> Tensor:
    """Return the largest eigenvalue of the softmax's Jacobian, diag(p) - p p^T.

    It lies between the two largest weights. There the secular equation of this rank-one change has
    one root, which bisection finds.

    Args:
        weights: Attention weights p, shape ``(..., n, M)``. If there are many queries, only some
            are measured: between 64 and 127, evenly spaced.
        steps: Number of bisections.

    Returns:
        Shape ``(..., n)``, NaN at queries that are not measured.

    Example:
        >>> largest_eigenvalue(torch.tensor([[0.5, 0.5, 0.0]])).item()
        0.5
    """
    n = weights.shape[-2]
    every = max(1, n // _JACOBIANS)
    p = weights[..., ::every, :]
    high, low = _two_largest(p)
    squares = p.square()
    for _ in range(steps):
        middle = (low + high) / 2
        terms = torch.where(p > 0, squares / (p - middle[..., None]), 0)
        below = terms.sum(-1) < 1  # the root is above the middle
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    result = weights.new_full(weights.shape[:-1], math.nan)
    result[..., ::every] = (low + high) / 2
    return result


def _two_largest(p: Tensor) -> tuple[Tensor, Tensor]:
    if p.shape[-1] == 1:
        return p[..., 0], torch.zeros_like(p[..., 0])
    best = p.topk(2, dim=-1).values
    return best[..., 0], best[..., 1]


def _where(condition: Tensor, x: Tensor) -> Tensor:
    return torch.where(condition, x, math.nan)


def _quantile(parts: list[Tensor], q: float) -> Tensor:
    """Return a quantile for each head of values of shape (B, H, n), without NaN."""
    values = torch.cat(parts, -1).transpose(0, 1).flatten(1).sort(-1).values  # NaN come last
    number = (~values.isnan()).sum(-1, keepdim=True)
    at = q * (number - 1).clamp(min=0).to(values.dtype)
    low, high = (values.gather(-1, bound.long()) for bound in (at.floor(), at.ceil()))
    return (low + (high - low) * (at - at.floor()))[:, 0]
