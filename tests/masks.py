"""Attention masks of every kind, with what is true of their tokens.

A mask is where attention is allowed, boolean, shape (B, H or 1, N or 1, N). What is true of it, its
values alone do not always tell: some kinds are drawn so that they look like another.
"""

from typing import NamedTuple

import torch


class Sample(NamedTuple):
    """A mask and which of its tokens are real, shape (B, N)."""

    allowed: torch.Tensor
    real: torch.Tensor


def order(length):
    """Return by how much each query comes after each key, shape (N, N)."""
    return torch.arange(length)[:, None] - torch.arange(length)


def full(length):
    return torch.ones(length, length, dtype=torch.bool)


def causal(length):
    return order(length) >= 0


def strictly_causal(length):
    return order(length) > 0


def first_sees_itself(length):
    allowed = strictly_causal(length)
    allowed[0, 0] = True
    return allowed


def window(length):
    return order(length).abs() < 3


def sliding(length):
    return (order(length) >= 0) & (order(length) < 3)


def prefix(length):
    return causal(length) | (torch.arange(length) < length // 3)


def strided(length):
    return (torch.arange(length) % 4 == 0).expand(length, length)


def causal_strided(length):
    return strided(length) & causal(length)


PATTERNS = {
    name.__name__: name
    for name in (
        full,
        causal,
        strictly_causal,
        first_sees_itself,
        window,
        sliding,
        prefix,
        strided,
        causal_strided,
    )
}


def right(lengths, length):
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def left(lengths, length):
    return right(lengths, length).flip(1)


def closed(pattern, real, rows=False):
    """Return a pattern (N, N) with the padding closed as keys, and as queries if ``rows``."""
    allowed = pattern & real[:, None, None]
    return Sample(allowed & real[:, None, :, None] if rows else allowed, real)


def everything(batch, length):
    return torch.ones(batch, length, dtype=torch.bool)


def shared(pattern, batch=3):
    """Return the same pattern for each sequence, without padding."""
    length = len(pattern)
    return Sample(pattern.expand(batch, 1, length, length), everything(batch, length))


def random_keys(batch, length, generator=None):
    """Close keys at random, for all queries, but never so that they look like padding."""
    keys = torch.rand(batch, length, generator=generator) < 0.6
    keys[:, ::3], keys[:, 1], keys[:, 4:6] = True, False, torch.tensor([False, True])
    return Sample(keys[:, None, None], everything(batch, length))


def top_k(batch, length, k=3, generator=None):
    """Let each query see the k keys of the highest scores that another module has computed."""
    scores = torch.randn(batch, 1, length, length, generator=generator)
    scores[..., 1] -= 99.0  # a key that is never chosen, between two that are
    scores[..., [0, 2]] += 9.0
    chosen = scores.topk(k, dim=-1).indices
    allowed = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
    return Sample(allowed, everything(batch, length))


def documents(numbers):
    """Let tokens see their own document; 0 is padding and sees nothing."""
    allowed = (numbers[:, None, :, None] == numbers[:, None, None]) & (numbers > 0)[:, None, None]
    return Sample(allowed, numbers > 0)
