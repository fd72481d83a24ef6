"""Layers that do more than one attention by hand, or are inside one another."""

import pytest
import torch
from compare import largest_error
from models import ScoreAttention
from torch import nn
from torch.nn import functional as F

from spanopt import (
    attach,
)
from taps.softmax.softmax_forms import (
    SCALE,
    SCALES,
    WEIGHTS,
    B,
    ByHand,
    D,
    H,
    assert_far,
    both_inputs,
    check,
    oracle,
    run,
    scores,
    tokens,
)

# What else a layer multiplies.


class Busy(nn.Module):
    """A layer with attention and other products, none of which has a parameter of another."""

    def __init__(self, width=H * D):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "router", "a", "b", "c", "d", "e", "f"):
            setattr(self, name, nn.Linear(width, width))
        for name in ("gate", "flat_gate", "turned_gate", "inner", "outer", "mixed", "stacked"):
            setattr(self, name, nn.Parameter(torch.randn(width, width)))

    def forward(self, x, hook=None):
        q, k, v = (
            project(x).unflatten(-1, (H, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hook is not None:
            q, k = hook(q, k)
        flat = x.flatten(0, 1)
        branches = [
            scores(q, k).softmax(-1) @ v,
            torch.relu(x @ self.inner) @ self.outer,
            (x @ self.gate).softmax(-1),
            torch.softmax(flat @ self.flat_gate, -1),
            torch.softmax(torch.matmul(flat, self.turned_gate.t()), -1),
            torch.einsum("bnd,de->bne", x, self.mixed).softmax(-1),
            self.router(x).softmax(-1).mT @ x,
            (self.a(x) @ self.b(x).mT).sigmoid() @ x,
            self.c(x) @ self.d(x).mT @ x,
            torch.einsum("bni,bnj->bij", self.e(x), self.f(x)).relu(),
            torch.addmm(flat, flat, self.stacked).softmax(-1),
        ]
        return torch.cat([branch.reshape(B, -1) for branch in branches], dim=1)


def test_nothing_else_that_the_layer_multiplies_is_scaled():
    model, x = Busy().double(), tokens()
    check(model, x)
    _, plain = run(model, x)
    with attach(model, SCALE):
        _, actual = run(model, x)
    others = [n for n in plain if n != "0" and n.partition(".")[0] not in ("q_proj", "k_proj")]
    assert len(others) == 8 * 2 + 7
    assert all(torch.equal(actual[name], plain[name]) for name in others)


class TwoAttentions(nn.Module):
    def __init__(self, width=H * D):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "global_q", "global_k", "global_v"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x, hook=None):
        for names in (("q_proj", "k_proj", "v_proj"), ("global_q", "global_k", "global_v")):
            q, k, v = (
                getattr(self, name)(x).unflatten(-1, (H, -1)).transpose(1, 2) for name in names
            )
            if hook is not None:
                q, k = hook(q, k)
            x = x + (scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(-2)
        return x


def test_a_layer_with_two_attentions_is_scaled_at_both():
    weights = [f"{name}.weight" for name in ("q_proj", "k_proj", "global_q", "global_k")]
    check(TwoAttentions().double(), tokens(), names=weights)


class HalfByHand(ByHand):
    """The first head in the fused call, the others by hand."""

    def forward(self, x, context, hook=None):
        q, k, v = (
            project(y).unflatten(-1, (H, -1)).transpose(1, 2)
            for project, y in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        if hook is not None:
            q, k = hook(q, k)
            fused = scores(q, k)[:, :1].softmax(-1) @ v[:, :1]
        else:
            fused = F.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1])
        by_hand = self.weigh(q[:, 1:], k[:, 1:]) @ v[:, 1:]
        return self.out_proj(torch.cat([fused, by_hand], dim=1).transpose(1, 2).flatten(-2))


def test_a_layer_that_is_half_by_hand_is_scaled_at_both_halves():
    model, inputs = HalfByHand(WEIGHTS["q @ k.transpose"]).double(), both_inputs()
    _, plain = run(model, *inputs)
    _, expected = run(model, *inputs, hook=oracle())
    with attach(model, SCALE):
        _, actual = run(model, *inputs)
    assert largest_error(actual, expected) < 1e-10
    for rows in (slice(D), slice(D, None)):
        halves = [
            {name: g[rows] for name, g in gradients.items() if name in ("q_proj.weight",)}
            for gradients in (actual, plain)
        ]
        assert_far(*halves, names=["q_proj.weight"])


class Outer(nn.Module):
    """A layer around another one."""

    def __init__(self, inner):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(H * D, H * D))
        self.inner = inner

    def project(self, x, hook):
        x = x + (self.inner(x) if hook is None else self.inner(x, hook=hook))
        q, k, v = (
            project(x).unflatten(-1, (H, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return (q, k, v) if hook is None else (*hook(q, k), v)

    def forward(self, x, hook=None):
        q, k, v = self.project(x, hook)
        return (q @ k.mT).softmax(-1) @ v


class FusedAround(Outer):
    def forward(self, x, hook=None):
        q, k, v = self.project(x, hook)
        if hook is None:
            return F.scaled_dot_product_attention(q, k, v)
        return scores(q, k).softmax(-1) @ v


class FusedInside(ScoreAttention):
    def __init__(self):
        super().__init__(H * D, H, causal=False)

    def forward(self, x, hook=None):
        return super().forward(x) if hook is None else self.reference(x, **SCALES)


@pytest.mark.parametrize("outer", [Outer, FusedAround])
@pytest.mark.parametrize("inner", [lambda: ByHand(WEIGHTS["q @ k.mT"]), FusedInside])
def test_a_layer_inside_a_layer_and_the_outer_one_are_scaled_once_each(outer, inner):
    model = nn.ModuleDict({"outer": outer(inner())}).double()["outer"]
    weights = [f"{at}{name}.weight" for at in ("", "inner.") for name in ("q_proj", "k_proj")]
    check(model, tokens(), names=weights)
