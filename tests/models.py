"""Small attention models that know nothing of spanopt, and the same mathematics written out.

Each ``reference`` recomputes a model's forward from its parameters by hand and rescales the
gradients of Q and K with tensor hooks that call the NumPy oracle: another way to the same numbers.
"""

import math

import torch
from oracle import rescaled
from torch import nn
from torch.nn import functional as F


def oracle_hook(x, parallel, violation):
    """Rescale the gradient of ``x`` (..., N, d) with the oracle; ``x`` must not be a leaf."""

    def hook(grad):
        numbers = rescaled(grad.double().numpy(), x.detach().double().numpy(), parallel, violation)
        return torch.as_tensor(numbers, dtype=grad.dtype)

    if x.requires_grad:
        x.register_hook(hook)
    return x


def attention(q, k, v, query=(2.0, 1.0), key=(2.0, 1.0), bias=None, causal=False):
    """Softmax attention by hand, (B, H, N, d), with oracle hooks on Q and K."""
    q, k = oracle_hook(q * 1.0, *query), oracle_hook(k * 1.0, *key)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v


class ScoreAttention(nn.Module):
    """Grouped-query attention through ``scaled_dot_product_attention``."""

    def __init__(self, width=16, heads=4, kv_heads=None, causal=True):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.causal = causal
        d = width // heads
        self.q_proj = nn.Linear(width, heads * d)
        self.k_proj = nn.Linear(width, self.kv_heads * d)
        self.v_proj = nn.Linear(width, self.kv_heads * d)
        self.out_proj = nn.Linear(width, width)

    def project(self, x, context=None):
        context = x if context is None else context
        split = lambda y, h: y.unflatten(-1, (h, -1)).transpose(1, 2)  # noqa: E731
        return (
            split(self.q_proj(x), self.heads),
            split(self.k_proj(context), self.kv_heads),
            split(self.v_proj(context), self.kv_heads),
        )

    def forward(self, x, context=None):
        q, k, v = self.project(x, context)
        causal = self.causal and context is None
        gqa = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    def reference(self, x, context=None, **scales):
        q, k, v = self.project(x, context)
        y = attention(q, k, v, causal=self.causal and context is None, **scales)
        return self.out_proj(y.transpose(1, 2).flatten(-2))


class Decoder(nn.Module):
    """A GPT-like stack; ``blocks.N.attn`` are its attention layers."""

    def __init__(self, width=16, heads=4, layers=2, vocabulary=11, attention=ScoreAttention):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "attn": attention(width, heads),
                    "mlp": nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, 2 * width),
                        nn.GELU(),
                        nn.Linear(2 * width, width),
                    ),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens, reference=None):
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            y = block["norm"](x)
            if reference is None:
                x = x + block["attn"](y)
            else:
                x = x + block["attn"].reference(y, **reference.get(f"blocks.{i}.attn", {}))
            x = x + block["mlp"](x)
        return self.head(x)


def tokens(batch=3, length=9, vocabulary=11):
    return torch.randint(vocabulary, (batch, length))


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def gradients(model, loss):
    """Gradients of every parameter by name, zeros where there is none."""
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def mha_reference(module, query, key, value, *, bias=None, scales=None):
    """``nn.MultiheadAttention`` by hand, batched, (L, B, E)."""
    heads, d = module.num_heads, module.head_dim
    if module.in_proj_weight is not None:
        ws = module.in_proj_weight.chunk(3)
    else:
        ws = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    bs = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), ws, bs, strict=True))
    batch = q.shape[1]
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.expand(1, batch, -1)])
        v = torch.cat([v, module.bias_v.expand(1, batch, -1)])
    q, k, v = (x.unflatten(-1, (heads, d)).permute(1, 2, 0, 3) for x in (q, k, v))
    if module.add_zero_attn:
        zero = torch.zeros(batch, heads, 1, d, dtype=q.dtype)
        k, v = torch.cat([k, zero], 2), torch.cat([v, zero], 2)
    if bias is not None:
        bias = F.pad(bias, (0, k.shape[2] - bias.shape[-1]))
    y = attention(q, k, v, bias=bias, **(scales or {}))
    return module.out_proj(y.permute(2, 0, 1, 3).flatten(-2))


class OneOfEach(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.score = ScoreAttention()
        self.packed = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        y = self.score(x)
        return self.packed(y, y, y)[0]


def train(model, optimizer, steps=1):
    for step in range(steps):
        torch.manual_seed(step)
        batch = tokens()
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


LAYER_SCALES = {
    "blocks.0.attn": {"query": (2.0, 0.5), "key": (3.0, 1.0)},
    "blocks.1.attn": {"query": (0.5, 1.5), "key": (1.0, 1.0)},
}


class Reference(nn.Module):
    """A model whose forward pass is the oracle's."""

    def __init__(self, model, of=LAYER_SCALES):
        super().__init__()
        self.model, self.of = model, of

    def forward(self, batch):
        return self.model(batch, reference=self.of)
