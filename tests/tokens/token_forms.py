"""Layers and masks on which padding and documents are tried in every tap."""

import functools
import math

import torch
from models import gradients
from torch import nn
from torch.nn import functional as F

from spanopt import SpanScale

SCALE = SpanScale(query=(2.0, 0.5), key=(3.0, 1.0))


WIDTH, HEADS = 8, 2


LENGTH, LENGTHS = 10, (9, 6, 7)  # one position is padding in every sequence


LOWEST = torch.finfo(torch.float64).min


# Attention in the ways that the taps see into: q (B, H, N, d), k and v (B, H', M, d).


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])


def repeated(q, k, v, mask):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def future(scores):
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


def by_hand(q, k, v, mask, how="fill"):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is None:
        pass
    elif how == "fill":
        scores = scores.masked_fill(~mask, -1e4)
    elif how == "two masks":
        scores = scores.masked_fill(~mask, LOWEST).masked_fill(future(scores), LOWEST)
    elif how == "two masks, the other first":
        scores = scores + torch.zeros_like(scores).masked_fill(future(scores), -1e9)
        scores = scores.masked_fill(~mask, LOWEST)
    elif how == "where":
        scores = torch.where(mask, scores, torch.full_like(scores, -1e9))
    elif how == "by keyword":
        scores = scores.masked_fill(value=LOWEST, mask=~mask)
    elif how == "where by keyword":
        scores = torch.where(condition=mask, input=scores, other=torch.full_like(scores, -1e9))
    elif how == "add":
        scores = scores + mask
    elif how == "subtract":
        scores = scores - 1e9 * (1 - mask.to(scores.dtype))
    else:
        scores[(~mask).expand_as(scores)] = LOWEST
    return scores.softmax(-1) @ v


def grouped(q, k, v, mask):
    """By hand in five dimensions, the groups beside the key heads."""
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2), v.unsqueeze(2)
    scores = torch.einsum("bkgnd,bkgmd->bkgnm", q, k.expand(*q.shape[:3], *k.shape[3:]))
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), LOWEST)
    return (scores.softmax(-1) @ v).flatten(1, 2)


def merged(q, k, v, mask):
    """By hand with the heads merged into the batch."""
    batch, heads, n, d = q.shape
    q, k, v = (x.reshape(batch * heads, -1, d) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(d)
    if mask is not None:
        mask = mask.expand(batch, heads, n, k.shape[1]).reshape_as(scores)
        scores = scores.masked_fill(~mask, LOWEST)
    return torch.bmm(F.softmax(scores, dim=-1), v).unflatten(0, (batch, heads))


class Attention(nn.Module):
    def __init__(self, attend=sdpa, kv_heads=HEADS):
        super().__init__()
        self.attend = attend
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, kv_heads * WIDTH // HEADS) for _ in range(2))
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def project(self, x, context):
        return self.q_proj(x), self.k_proj(context), self.v_proj(context)

    def forward(self, x, mask=None, context=None, extras=()):
        q, k, v = self.project(x, x if context is None else context, *extras)
        q, k, v = (y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for y in (q, k, v))
        return self.out_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(-2))


class Packed(nn.MultiheadAttention):
    """Takes the others' masks, those that close keys to all queries as ``key_padding_mask``."""

    def __init__(self, need_weights=False):
        super().__init__(WIDTH, HEADS, batch_first=True)
        nn.init.normal_(self.in_proj_bias)
        self.need_weights = need_weights

    def forward(self, x, mask=None, context=None):
        context = x if context is None else context
        masks = {}
        if mask is not None and mask.shape[2] == 1:
            masks = {"key_padding_mask": ~mask[:, 0, 0]}
        elif mask is not None:
            mask = mask.expand(-1, HEADS, -1, -1).flatten(0, 1)
            masks = {"attn_mask": mask if mask.is_floating_point() else ~mask}
        return super().forward(x, context, context, need_weights=self.need_weights, **masks)[0]


class Model(nn.Module):
    """``layers.N.attn`` are its attention layers."""

    def __init__(self, layer, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "attn": layer()}) for _ in range(layers)
        )

    def forward(self, x, *inputs):
        for layer in self.layers:
            x = x + layer["attn"](layer["norm"](x), *inputs)
        return x


def hand(how):
    return functools.partial(by_hand, how=how)


PROJECTIONS = {"layers.*.attn": {"query": "q_proj", "key": "k_proj", "num_heads": HEADS}}


KINDS = {
    "sdpa": Attention,
    "sdpa with grouped queries": functools.partial(Attention, sdpa, 1),
    "sdpa with repeated keys": functools.partial(Attention, repeated, 1),
    "packed": Packed,
    "packed with weights": functools.partial(Packed, need_weights=True),
    "masked_fill": functools.partial(Attention, hand("fill")),
    "masked_fill with repeated keys": functools.partial(Attention, hand("fill"), 1),
    "masked_fill with grouped queries": functools.partial(Attention, grouped, 1),
    "masked_fill with merged heads": functools.partial(Attention, merged),
    "where": functools.partial(Attention, hand("where")),
    "masked_fill by keyword": functools.partial(Attention, hand("by keyword")),
    "where by keyword": functools.partial(Attention, hand("where by keyword")),
    "two masks": functools.partial(Attention, hand("two masks")),
    "two masks, the other first": functools.partial(Attention, hand("two masks, the other first")),
    "add": functools.partial(Attention, hand("add")),
    "subtract": functools.partial(Attention, hand("subtract")),
    "setitem": functools.partial(Attention, hand("setitem")),
}


EACH_TAP = ["sdpa", "packed", "packed with weights", "masked_fill", "masked_fill with merged heads"]


# Masks, from which tokens are real, (B, L).


def keys(real):
    return real[:, None, None]


def causal(real):
    return keys(real) & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()


def added(form, value):
    return lambda real: torch.zeros(()).double().masked_fill(~form(real), value)


def padding(side="right", lengths=LENGTHS, length=LENGTH):
    real = torch.arange(length) < torch.tensor(lengths)[:, None]
    return real if side == "right" else real.flip(1)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def total(parts):
    parts = list(parts)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def run(model, real, *inputs):
    """Gradients of the loss of real tokens."""
    return gradients(model, model(*inputs)[real].pow(3).sum())


def alone(model, x, real, form=None, context=None, of_context=None):
    """The sum of the gradients that the sequences have one by one, without their padding."""
    parts = []
    for i, tokens in enumerate(real):
        inputs = [x[i : i + 1, tokens]]
        if context is not None:
            tokens = of_context[i]
            inputs.append(context[i : i + 1, tokens])
        full = torch.ones(1, int(tokens.sum()), dtype=torch.bool)
        inputs.insert(1, None if form is None else form(full))
        parts.append(run(model, slice(None), *inputs))
    return total(parts)


def assert_differ(actual, expected, least=1e-4):
    """So that a test which finds gradients equal says something."""
    size = max(value.abs().max() for value in expected.values())
    assert max((actual[name] - expected[name]).abs().max() for name in expected) > least * size


def everything(real):
    return torch.ones_like(real)
