"""The measures are what the formulas say, for every tap."""

import math

import numpy as np
import pytest
import torch
from monitored import (
    Attention,
    B,
    D,
    H,
    N,
    alike,
    one_step,
)
from oracle import projector
from torch import nn
from torch.nn import functional as F

from spanopt import SpanMonitor, SpanScaledOptimizer, token_mask


def expected(model, heads, side, scale):
    """Return the measures of each head, in NumPy, from what the unhooked model kept."""
    x, g = model.kept[side], model.kept[f"{side}_grad"]
    rows = []
    for h in range(heads):
        inside = np.stack([projector(x[b, h]) @ g[b, h] for b in range(len(x))])
        outside = g[:, h] - inside
        scaled = scale[0] * inside + scale[1] * outside
        sigma = np.linalg.svd(x[:, h], compute_uv=False)
        p = sigma / sigma.sum(-1, keepdims=True)
        before, after = np.linalg.norm(g[:, h]), np.linalg.norm(scaled)
        energy = (inside**2).sum(), (outside**2).sum()
        rows.append(
            {
                "parallel_energy": energy[0],
                "violation_energy": energy[1],
                "parallel_share": energy[0] / sum(energy),
                "chance_share": x.shape[-1] / x.shape[-2],
                "effective_rank": np.exp(-(p * np.log(p)).sum(-1)).mean(),
                "condition": np.median(sigma[:, 0] / sigma[:, -1]),
                "cosine": (g[:, h] * scaled).sum() / (before * after),
                "norm_before": before,
                "norm_after": after,
            }
        )
    return rows


def entropies(model, causal, scale, mask=None):
    q, k = (torch.from_numpy(model.kept[side]) for side in ("query", "key"))
    scores = q @ k.repeat_interleave(H // k.shape[1], 1).mT * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    w = scores.softmax(-1)
    return -torch.where(w > 0, w * w.log(), 0).sum(-1).mean((0, 2))


def close(rows, expected):
    for row, right in zip(rows, expected, strict=True):
        for name, value in right.items():
            assert row[name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("scales", [(3.0, 0.5), (2.0, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize(
    ("kind", "kv_heads"), [("causal", 2), ("score", H), ("by hand", H)], ids=lambda x: str(x)
)
def test_the_measures_are_the_formulas(kind, kv_heads, scales):
    model = Attention(kind, kv_heads).double()
    x = torch.randn(B, N, D, dtype=torch.float64)
    weight = torch.randn(B, H, N, D // H, dtype=torch.float64)
    model.kept = {"query": None, "key": None}
    (model(x) * weight).sum().backward()
    plain = dict(model.kept)
    model.kept = {}
    monitor = one_step(model, lambda: (model(x) * weight).sum(), {"*": scales})
    model.kept = plain
    query, key = monitor.rows[:H], monitor.rows[H:]
    close(query, expected(model, H, "query", scales))
    close(key, expected(model, kv_heads, "key", scales))
    right = entropies(model, kind == "causal", 0.5 if kind == "causal" else 0.3)
    assert [row["entropy"] for row in query] == pytest.approx(right.tolist(), rel=1e-9)
    assert {row["entropy"] for row in key} == {None}
    assert [row["head"] for row in monitor.rows] == [*range(H), *range(kv_heads)]


def packed_and_named(need_weights):
    """Return the same attention as packed and with named projections."""
    packed = nn.MultiheadAttention(D, H, batch_first=True).double()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.wq, self.wk, self.wv = (nn.Linear(D, D).double() for _ in range(3))
            parts = self.wq, self.wk, self.wv
            for part, weight in zip(parts, packed.in_proj_weight.chunk(3), strict=True):
                part.weight.data.copy_(weight)
                nn.init.zeros_(part.bias)

        def forward(self, x):
            split = lambda y: y.unflatten(-1, (H, -1)).transpose(1, 2)  # noqa: E731
            y = F.scaled_dot_product_attention(*(split(w(x)) for w in (self.wq, self.wk, self.wv)))
            return F.linear(y.transpose(1, 2).flatten(2), packed.out_proj.weight)

    named = Named()
    call = lambda x: packed(x, x, x, need_weights=need_weights)[0]  # noqa: E731
    return packed, call, named


@pytest.mark.parametrize("need_weights", [True, False])
def test_every_tap_measures_the_same(need_weights):
    packed, call, named = packed_and_named(need_weights)
    x = torch.randn(B, N, D, dtype=torch.float64)
    a = one_step(packed, lambda: call(x).pow(2).sum(), {"*": (2.0, 1.0)})
    spec = {"": {"query": "wq", "key": "wk", "num_heads": H}}
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(named.parameters()), named, {"*": (2.0, 1.0)}, qk_modules=spec
    )
    with SpanMonitor(optimizer) as b:
        named(x).pow(2).sum().backward()
        optimizer.step()
    for row in a.rows:  # attention can't be seen where projections are named
        assert (row.pop("entropy") is None) == (row["side"] == "key")
        if need_weights and row["side"] == "query":  # Q is divided by sqrt(d) before the product
            for name, power in {"energy": 1, "norm": 0.5}.items():
                row.update({key: x / (D / H) ** power for key, x in row.items() if name in key})
    assert {row.pop("entropy") for row in b.rows} == {None}
    alike(a.rows, b.rows)


def test_merged_heads_are_one_row():
    class Merged(Attention):
        def forward(self, x):
            q, k, v = (y.flatten(0, 1) for y in torch.randn(1) * 0 + self.parts(x))
            return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)

        def parts(self, x):
            k, v = self.kv(x).chunk(2, -1)
            return torch.stack((self.q(x), k, v)).unflatten(-1, (H, -1)).transpose(2, 3)

    model = Merged("merged")
    monitor = one_step(model, lambda: model(torch.randn(B, N, D)).pow(2).sum())
    assert [(row["side"], row["head"]) for row in monitor.rows] == [("query", None), ("key", None)]
    assert 0 < monitor.rows[0]["entropy"] < math.log(N)


@pytest.mark.parametrize("kind", ["score", "by hand"])
def test_padding_is_left_out(kind):
    model = Attention(kind).double()
    x = torch.randn(1, N, D, dtype=torch.float64)
    padded = torch.cat((x, 9 * torch.randn(1, 5, D, dtype=torch.float64)), 1)
    real = torch.arange(N + 5) < N

    def by_mask():
        return model(padded, real[None, None, None], real[None])[:, :, :N].pow(2).sum()

    def given():
        with token_mask(real[None]):
            return model(padded, real[None, None, None])[:, :, :N].pow(2).sum()

    bare = one_step(model, lambda: model(x).pow(2).sum())
    alike(bare.rows, one_step(model, by_mask).rows)
    alike(bare.rows, one_step(model, given).rows)
