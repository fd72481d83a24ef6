"""Focus by brute force: one query at a time, in plain Python, which autograd differentiates."""

import math

import torch


def kept_keys(scores, kind, k, always, i, queries):
    """The keys that query i keeps, from its list of scores, with the masks in them."""
    keys = len(scores)
    open_keys = [j for j in range(keys) if scores[j] > -9e3]
    at = i + max(keys - queries, 0)
    others = [j for j in open_keys if j not in always]
    if kind in ("top", "gradient"):
        own = sorted(others, key=lambda j: -scores[j])[:k]
    elif kind == "window":
        own = sorted(others, key=lambda j: (abs(j - at), j < at))[:k]
    elif kind == "block":
        own = [j for j in open_keys if j // k == at // k]
    else:
        stride = math.ceil(keys / k)
        own = [j for j in open_keys if j % stride == at % stride]
    kept = [j for j in open_keys if j in own or j in always]
    return kept or list(range(keys))  # a query without any key is as in plain attention


def keep_mask(scores, kind, k, always=()):
    """Booleans like scores (..., N, M), true at keys that are kept."""
    flat = scores.detach().flatten(0, -3).tolist()
    keep = torch.zeros_like(scores, dtype=torch.bool).flatten(0, -3)
    for b, head in enumerate(flat):
        for i, row in enumerate(head):
            keep[b, i, kept_keys(row, kind, k, always, i, len(head))] = True
    return keep.view_as(scores)


def masked_scores(q, k, mask=None, is_causal=False, scale=None):
    groups = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    k = k.repeat_interleave(groups, dim=-3) if groups > 1 else k
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores


def brute(q, k, v, kind, of_each, always=(), multipliers=None, **options):
    """The attention; multipliers (..., N, M) are those of dropout."""
    scores = masked_scores(q, k, **options)
    keep = keep_mask(scores, kind, of_each, always)
    if kind == "gradient":
        scores = torch.where(keep, scores, scores.detach())
    else:
        scores = scores.masked_fill(~keep, -math.inf)
    top = scores.amax(-1, keepdim=True).detach()
    e = (scores - top.masked_fill(top == -math.inf, 0)).exp()
    weights = e / e.sum(-1, keepdim=True).clamp(min=1e-300)
    weights = weights if multipliers is None else weights * multipliers
    return weights @ v.repeat_interleave(weights.shape[-3] // v.shape[-3], dim=-3)
