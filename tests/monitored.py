"""Models to measure, and training under a monitor, for the tests of the monitor and its parts."""

import pytest
import torch
from models import Decoder
from torch import nn
from torch.nn import functional as F

from spanopt import SpanMonitor, SpanScale, SpanScaledOptimizer

B, N, D, H = 3, 11, 16, 4


class Attention(nn.Module):
    """Attention in several spellings, which keeps its Q, K and their gradients on request."""

    def __init__(self, kind, kv_heads=H):
        super().__init__()
        self.kind, self.kv_heads = kind, kv_heads
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * kv_heads * (D // H))
        self.kept = {}

    def keep(self, name, x):
        if name in self.kept:
            self.kept[name] = x.detach().numpy().copy()
            x.register_hook(lambda g: self.kept.update({f"{name}_grad": g.numpy().copy()}))
        return x

    def forward(self, x, mask=None, padding_mask=None):
        split = lambda y, h: y.unflatten(-1, (h, -1)).transpose(1, 2)  # noqa: E731
        q = split(self.q(x), H)
        k, v = (split(part, self.kv_heads) for part in self.kv(x).chunk(2, -1))
        q, k = self.keep("query", q * 1.0), self.keep("key", k * 1.0)
        if self.kind == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if self.kind == "score":
            return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        scores = q @ k.mT * 0.3
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v


def alike(rows, others, rel=1e-8):
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            is_number = isinstance(value, float)
            assert other[name] == (pytest.approx(value, rel=rel) if is_number else value), name


def one_step(model, loss, scales=SpanScale(2.0, 1.0), **options):  # noqa: B008
    optimizer = SpanScaledOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, scales)
    with SpanMonitor(optimizer, **options) as monitor:
        loss().backward()
        optimizer.step()
    optimizer.detach()
    return monitor


def decoder(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Decoder(**kwargs)


def train(model, monitored, steps=5, scales=None, every=2, loss=None, **options):
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), model, scales or {"*": (2.0, 1.0)}
    )
    monitor = SpanMonitor(optimizer, every, **options) if monitored else None
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(11, (2, 12), generator=rng)
        model(tokens).square().mean().backward()
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return optimizer, monitor


def packed():
    return nn.TransformerEncoderLayer(D, H, 16, batch_first=True)


KINDS = {
    "score": lambda: Attention("score"),
    "by hand": lambda: Attention("by hand"),
    "packed": packed,
}


def optimizer_of(model):
    return SpanScaledOptimizer(torch.optim.AdamW(model.parameters()), model, SpanScale(2.0, 1.0))


def take_step(call, optimizer):
    optimizer.zero_grad()
    call(torch.randint(11, (2, 12))).square().mean().backward()
    optimizer.step()
