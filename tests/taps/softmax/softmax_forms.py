"""Attention written by hand in many ways, and its reference with oracle hooks."""

import io
import math

import torch
from compare import largest_error
from models import oracle_hook
from oracle import rescaled
from torch import nn
from torch.nn import functional as F

from spanopt import (
    SpanScale,
    attach,
)

SCALES = {"query": (2.0, 0.5), "key": (3.0, 1.0)}


SCALE = SpanScale(**SCALES)


# Batch, heads, queries, keys, head size: no two alike, and more tokens than a head has features.
B, H, N, M, D = 3, 2, 9, 7, 4


class ByHand(nn.Module):
    """Attention by hand; ``weigh`` makes its weights (B, H, N, M) of Q and K, (B, H', N, d)."""

    def __init__(self, weigh, heads=H, kv_heads=None):
        super().__init__()
        self.weigh = weigh
        self.heads, self.kv_heads = heads, kv_heads or heads
        width = heads * D
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, self.kv_heads * D)
        self.v_proj = nn.Linear(width, self.kv_heads * D)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, context=None, hook=None):
        context = x if context is None else context
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            project(context).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        if hook is not None:
            q, k = hook(q, k)
        weights = self.weigh(q, k)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(-2))


def oracle(query=SCALES["query"], key=SCALES["key"]):
    """What puts oracle hooks on Q and K."""
    return lambda q, k: (oracle_hook(q * 1.0, *query), oracle_hook(k * 1.0, *key))


def tokens(batch=B, length=N, width=H * D, **options):
    options = {"dtype": torch.float64, "requires_grad": True, **options}
    return torch.randn(batch, length, width, **options)


def both_inputs():
    return tokens(), tokens(length=M)


def run(model, *inputs, **options):
    """The result of a training step on a model, and all gradients by name."""
    module = getattr(model, "_orig_mod", model)
    leaves = {str(i): x for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)}
    leaves = {**leaves, **dict(module.named_parameters())}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(1)
    result = model(*inputs, **options)
    result.pow(3).sum().backward()
    return result.detach(), {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
        for name, leaf in leaves.items()
    }


def assert_far(actual, plain, names=("q_proj.weight", "k_proj.weight")):
    """That all gradients whose names end so are clearly others."""
    found = [name for name in plain if name.endswith(tuple(names))]
    assert len(found) >= len(names)
    for name in found:
        assert largest_error({name: actual[name]}, {name: plain[name]}) > 0.1, name


def check(model, *inputs, scale=SCALE, hook=None, tolerance=1e-10, names=None, **options):
    """That a model is scaled as the reference is, and forward values are as they were."""
    before, plain = run(model, *inputs, **options)
    _, expected = run(model, *inputs, hook=hook or oracle(), **options)
    with attach(model, scale) as hooks:
        after, actual = run(model, *inputs, **options)
        assert hooks.unseen() == []
    assert torch.equal(after, before)
    assert largest_error(actual, expected) <= tolerance
    assert_far(actual, plain, *(() if names is None else (names,)))
    return hooks


# How a layer gets from Q and K to its weights.


def merged(x):
    return x.flatten(0, 1)


def split(x):
    return x.unflatten(0, (B, -1))


def heads_last(x):
    return x.transpose(1, 2)


def tokens_first(x):
    return x.permute(2, 0, 1, 3)


def rows_first(x):
    """Of two rows, (R, N, B, H, d / 2)."""
    return x.unflatten(-1, (2, -1)).permute(3, 2, 0, 1, 4)


def scores(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(D)


def in_place(change):
    """Weights from scores that are changed by a method without taking its result."""

    def weigh(q, k):
        x = scores(q, k)
        change(x)
        return x.softmax(-1)

    return weigh


def divided_in_place(q, k):
    x = q @ k.mT
    x /= 3.0
    x *= 2.0
    x += 1.0
    x -= 0.5
    return x.softmax(-1)


def query_divided_in_place(q, k):
    q = q.clone()
    q /= 3.0
    return (q @ k.mT).softmax(-1)


def by_rows_and_columns(q, k):
    """With positions of queries and keys by row and column, as SAM and ViTDet have them."""
    x = merged(scores(q, k)).view(B * H, 3, 3, M, 1)
    rows, columns = (
        torch.linspace(-1, 1, B * H * N * size, dtype=q.dtype).view(-1, 3, 3, size)
        for size in (M, 1)
    )
    x = x + rows[:, :, :, :, None] + columns[:, :, :, None, :]
    return split(x.view(B * H, N, M).softmax(-1))


def turned_by_rows_and_columns(q, k):
    x = scores(q, k).view(B, H, 3, 3, M).permute(0, 1, 4, 2, 3)
    return x.reshape(B, H, M, N).mT.softmax(-1)


def cog(q, k):
    x = scores(q, k)
    sign, x = x.sign(), x.abs()
    return x.softmax(-1) * sign


def signed_root(q, k):
    x = scores(q, k)
    return (x.sign() * torch.sqrt(abs(x) + 0.1)).softmax(-1)


def with_a_sink(q, k):
    sink = torch.linspace(-1, 1, H, dtype=q.dtype).reshape(1, H, 1, 1).expand(B, H, N, 1)
    x = torch.cat([scores(q, k), sink], dim=-1)
    x = x - x.max(dim=-1, keepdim=True).values
    return F.softmax(x, dim=-1, dtype=x.dtype)[..., :-1]


class Child(nn.Module):
    def __init__(self, dim=-1):
        super().__init__()
        self.softmax = nn.Softmax(dim)

    def forward(self, q, k):
        return self.softmax(scores(q, k))


ALIBI = torch.linspace(-2, 0, H * N * M, dtype=torch.float64).reshape(H, N, M).repeat(B, 1, 1)


SCALAR = torch.tensor(0.7, dtype=torch.float64)


OF_EACH_HEAD = torch.eye(D, dtype=torch.float64) + torch.linspace(0, 1, H * D * D).view(H, D, D)


MIX = torch.linspace(-1, 2, 3 * H, dtype=torch.float64).view(3, H)  # 3 heads of H, and H of 3


def mixed(x):
    """Scores of three heads of those of two, and of two again."""
    return torch.einsum("bhij,hg->bgij", torch.einsum("b h i j, g h -> b g i j", x, MIX), MIX)


def heads_last_of_all(x):
    return x.permute(0, 2, 3, 1)


PRODUCTS = {
    "q @ k.transpose": lambda q, k: (q @ k.transpose(-2, -1)).softmax(-1),
    "q @ k.mT": lambda q, k: (q @ k.mT).softmax(-1),
    "q @ k.permute": lambda q, k: (q @ k.permute(0, 1, 3, 2)).softmax(-1),
    "torch.matmul": lambda q, k: torch.matmul(q, k.transpose(2, 3)).softmax(-1),
    "torch.matmul, keywords": lambda q, k: torch.matmul(input=q, other=k.mT).softmax(-1),
    "Tensor.matmul": lambda q, k: q.matmul(k.mT).softmax(-1),
    "Tensor.__rmatmul__": lambda q, k: k.mT.__rmatmul__(q).softmax(-1),
    "one by one": lambda q, k: torch.stack(
        [(a @ b.mT).softmax(-1) for a, b in zip(q, k, strict=True)]
    ),
    "one by one, 2-D": lambda q, k: torch.stack(
        [(a @ b.t()).softmax(-1) for a, b in zip(merged(q), merged(k), strict=True)]
    ).unflatten(0, (B, H)),
    "torch.mm": lambda q, k: torch.stack(
        [torch.mm(a, b.T).softmax(-1) for a, b in zip(merged(q), merged(k), strict=True)]
    ).unflatten(0, (B, H)),
    "torch.bmm": lambda q, k: split(torch.bmm(merged(q), merged(k).mT).softmax(-1)),
    "torch.bmm, keywords": lambda q, k: split(
        torch.bmm(input=merged(q), mat2=merged(k).mT).softmax(-1)
    ),
    "Tensor.bmm": lambda q, k: split(merged(q).bmm(merged(k).mT).softmax(-1)),
    "torch.baddbmm": lambda q, k: split(
        torch.baddbmm(ALIBI, merged(q), merged(k).mT, alpha=0.3).softmax(-1)
    ),
    "torch.baddbmm, beta 0": lambda q, k: split(
        torch.baddbmm(torch.empty_like(ALIBI), merged(q), merged(k).mT, beta=0, alpha=0.3)
    ).softmax(-1),
    "Tensor.baddbmm, keywords": lambda q, k: split(
        ALIBI.baddbmm(batch1=merged(q), batch2=merged(k).mT, beta=0.5, alpha=0.3)
    ).softmax(-1),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1),
    "einsum, operands in a list": lambda q, k: torch.einsum("bhid,bhjd->bhij", [q, k]).softmax(-1),
    "einsum, heads last": lambda q, k: torch.einsum(
        "b n h d, b m h d -> b h n m", heads_last(q), heads_last(k)
    ).softmax(-1),
    "einsum, tokens first": lambda q, k: (
        torch.einsum("ibnd,jbnd->ijbn", tokens_first(q), tokens_first(k))
        .softmax(1)
        .permute(2, 3, 0, 1)
    ),
    "einsum, ellipsis": lambda q, k: torch.einsum("...nd,...md->...nm", q, k).softmax(dim=-1),
    "einsum, keys first": lambda q, k: torch.einsum("bhjd,bhid->bhij", k, q).softmax(-1),
    "einsum, feature before token": lambda q, k: torch.einsum(
        "bhid,bhdj->bhij", q, k.transpose(2, 3)
    ).softmax(-1),
    "einsum, tied over rows": lambda q, k: torch.einsum(
        "bhird,bhjrd->bhij", *(x.unflatten(-1, (2, -1)) for x in (q, k))
    ).softmax(-1),
    "einsum, tied over rows, tokens and heads first": lambda q, k: (
        torch.einsum("rinhd,rjnhd->hnij", rows_first(q), rows_first(k)).softmax(-1).transpose(0, 1)
    ),
    "einsum, heads first": lambda q, k: (
        torch.einsum("bhid,bhjd->hbij", q, k).softmax(-1).transpose(0, 1)
    ),
    "k @ q.mT over -2": lambda q, k: (k @ q.mT).softmax(-2).mT,
    "k @ q.mT, transposed": lambda q, k: (k @ q.mT).transpose(-2, -1).softmax(-1),
    "k @ q.mT, transpose with keywords": lambda q, k: (
        (k @ q.mT).transpose(dim0=-2, dim1=-1).softmax(-1)
    ),
    "k @ q.mT, permuted": lambda q, k: (k @ q.mT).permute(0, 1, 3, 2).softmax(-1),
    "k @ q.mT, permute with keywords": lambda q, k: torch.permute(
        k @ q.mT, dims=(0, 1, 3, 2)
    ).softmax(-1),
    "k @ q.mT, .mT": lambda q, k: (k @ q.mT).mT.softmax(-1),
}


WAYS = {
    "scaled before": lambda q, k: ((q / 2.0) @ (k * 1.5).mT).softmax(-1),
    "scaled after": lambda q, k: (0.4 * (q @ k.mT) * SCALAR).softmax(-1),
    "divided": lambda q, k: torch.div(q @ k.mT, math.sqrt(D)).softmax(-1),
    "divided by a tensor": lambda q, k: (q @ k.mT).div(torch.tensor(D).sqrt()).softmax(-1),
    "torch.mul, keywords": lambda q, k: torch.mul(input=q @ k.mT, other=0.4).softmax(-1),
    "multiplied with its operand right": lambda q, k: torch.mul(SCALAR, q @ k.mT).softmax(-1),
    "negated": lambda q, k: (-(-q @ k.mT)).softmax(-1),
    "in place": divided_in_place,
    "in place before": query_divided_in_place,
    "of what a constant was multiplied with": lambda q, k: (
        (q @ OF_EACH_HEAD) @ (k @ OF_EACH_HEAD).mT
    ).softmax(-1),
    "mul_": in_place(lambda x: x.mul_(0.4)),
    "div_": in_place(lambda x: x.div_(3.0)),
    "softcap": lambda q, k: (2.0 * torch.tanh(scores(q, k) / 2.0)).softmax(-1),
    "softcap in place": in_place(lambda x: x.div_(2.0).tanh_()),
    "clamped": lambda q, k: scores(q, k).clamp(-0.9, 0.9).softmax(-1),
    "bias": lambda q, k: (scores(q, k) + split(ALIBI)).softmax(-1),
    "bias left": lambda q, k: (split(ALIBI) + scores(q, k)).softmax(-1),
    "bias of each key": lambda q, k: (scores(q, k) + torch.arange(M) / M).softmax(-1),
    "cast": lambda q, k: scores(q, k).float().softmax(-1).to(q.dtype),
    "cast to and fro": lambda q, k: scores(q, k).float().double().softmax(-1),
    "cast by to": lambda q, k: F.softmax(scores(q, k).to(torch.float32), -1).type_as(q),
    "cast by type": lambda q, k: scores(q, k).type(torch.float32).softmax(-1).double(),
    "cast by softmax": lambda q, k: F.softmax(scores(q, k), dim=-1, dtype=torch.float32).to(q),
    "dropout on weights": lambda q, k: F.dropout(scores(q, k).softmax(-1), 0.3),
    "dropout on scores": lambda q, k: F.dropout(scores(q, k), 0.3).softmax(-1),
    "viewed apart": lambda q, k: torch.bmm(merged(q), merged(k).mT).view(B, H, N, M).softmax(-1),
    "viewed together": lambda q, k: split(scores(q, k).view(B * H, N, M).softmax(-1)),
    "to and fro": lambda q, k: (
        torch.bmm(merged(q), merged(k).mT)
        .reshape(B, H, N, M)
        .add(split(ALIBI))
        .flatten(0, 1)
        .contiguous()
        .softmax(-1)
        .unflatten(0, (B, H))
    ),
    "another batch dimension for a while": lambda q, k: (
        scores(q, k).unsqueeze(0).squeeze(0).softmax(-1)
    ),
    "another batch dimension": lambda q, k: scores(q, k).unsqueeze(0).softmax(-1).squeeze(0),
    "with a sink": with_a_sink,
    "maximum subtracted": lambda q, k: (
        scores(q, k) - scores(q, k).detach().max(-1, keepdim=True)[0]
    ).softmax(-1),
    "own maximum subtracted": lambda q, k: (lambda x: x - torch.amax(x, dim=-1, keepdim=True))(
        scores(q, k)
    ).softmax(-1),
    "two products": lambda q, k: (scores(q, k) + torch.einsum("bhid,bhjd->bhij", q, k)).softmax(-1),
    "two products, one of them turned": lambda q, k: (
        scores(q, k) + (k @ q.mT).transpose(-2, -1)
    ).softmax(-1),
    "tokens before heads": lambda q, k: heads_last(
        torch.einsum("bhid,bhjd->bihj", q, k).softmax(-1)
    ),
    "heads mixed": lambda q, k: mixed(scores(q, k)).softmax(-1),
    "heads mixed, weight first": lambda q, k: torch.einsum(
        "hg,bhij->bgij", MIX.T @ MIX, scores(q, k)
    ).softmax(-1),
    "heads mixed with an ellipsis": lambda q, k: torch.einsum(
        "...hij,gh->...gij", scores(q, k), MIX.T @ MIX
    ).softmax(-1),
    "heads mixed for each query": lambda q, k: torch.einsum(
        "bhij,bihg->bgij", scores(q, k), (MIX.T @ MIX) * torch.ones(B, N, 1, 1)
    ).softmax(-1),
    "heads mixed and added": lambda q, k: (scores(q, k) + mixed(scores(q, k))).softmax(-1),
    "heads mixed by linear": lambda q, k: (
        F.linear(heads_last_of_all(scores(q, k)), MIX.T @ MIX).permute(0, 3, 1, 2).softmax(-1)
    ),
    "heads mixed by linear, keywords": lambda q, k: (
        F.linear(input=heads_last_of_all(scores(q, k)), weight=MIX.T @ MIX, bias=None)
        .permute(0, 3, 1, 2)
        .softmax(-1)
    ),
    "heads mixed by matmul": lambda q, k: (
        (heads_last_of_all(scores(q, k)) @ (MIX.T @ MIX)).permute(0, 3, 1, 2).softmax(-1)
    ),
    "heads mixed by matmul from the left": lambda q, k: (
        ((MIX.T @ MIX) @ scores(q, k).permute(0, 2, 1, 3)).transpose(1, 2).softmax(-1)
    ),
    "heads mixed by convolution": lambda q, k: F.conv2d(
        scores(q, k), (MIX.T @ MIX)[:, :, None, None]
    ).softmax(-1),
    "by rows and columns": by_rows_and_columns,
    "turned by rows and columns": turned_by_rows_and_columns,
    "of all, with a dimension more": lambda q, k: (
        scores(q, k)[:, :, None, ...].squeeze(2).softmax(-1)
    ),
    "absolute": lambda q, k: abs(scores(q, k)).softmax(-1),
    "signs apart": cog,
    "root with its sign": signed_root,
    "rectified": lambda q, k: F.relu(scores(q, k)).softmax(-1),
    "rectified in place": in_place(lambda x: x.relu_()),
    "squared": lambda q, k: (scores(q, k) ** 2).softmax(-1),
    "weights renormalised": lambda q, k: (lambda w: w / w.detach().sum(-1, keepdim=True))(
        scores(q, k).softmax(-1) * split(ALIBI)
    ),
}


# Methods that leave scores where they are, with arguments.
METHODS = {
    "multiply": (0.4,),
    "divide": (3.0,),
    "true_divide": (3.0,),
    "negative": (),
    "clamp_min": (-0.9,),
    "clamp_max": (0.9,),
    "clip": (-0.9, 0.9),
    "maximum": (-SCALAR,),
    "minimum": (SCALAR,),
    "nan_to_num": (),
    "abs": (),
    "absolute": (),
    "relu": (),
    "square": (),
    "pow": (2,),
    "half": (),
    "bfloat16": (),
    "double": (),
    "clone": (),
    "contiguous": (),
    "expand": (B, H, N, M),
    "reshape": (1, B, H, N, M),
    "expand_as": (torch.empty(B, H, N, M),),
    "view_as": (torch.empty(B, H, N, M),),
    "reshape_as": (torch.empty(B, H, N, M),),
    "type_as": (torch.empty(0),),
}


def by_method(name):
    def weigh(q, k):
        x = torch.einsum("bhid,bhjd->bhij", k, q).transpose(2, 3)
        x = getattr(x if "view" not in name else x.contiguous(), name)(*METHODS[name])
        return x.softmax(-1).to(q.dtype).reshape(B, H, N, M)

    return weigh


SOFTMAXES = {
    "F.softmax": lambda q, k: F.softmax(scores(q, k), dim=-1),
    "F.softmax, positive": lambda q, k: F.softmax(scores(q, k), 3),
    "F.softmax, keywords": lambda q, k: F.softmax(input=scores(q, k), dim=-1),
    "torch.softmax": lambda q, k: torch.softmax(scores(q, k), -1),
    "torch.softmax, positive": lambda q, k: torch.softmax(scores(q, k), dim=3),
    "torch.softmax, keywords": lambda q, k: torch.softmax(input=scores(q, k), dim=-1),
    "torch.softmax, dtype": lambda q, k: torch.softmax(scores(q, k), -1, torch.float32).double(),
    "Tensor.softmax": lambda q, k: scores(q, k).softmax(dim=-1),
    "Tensor.softmax, positive": lambda q, k: scores(q, k).softmax(3),
    "Tensor.softmax, dtype": lambda q, k: scores(q, k).softmax(-1, dtype=torch.float32).double(),
    "k @ q.mT, positive": lambda q, k: scores(k, q).softmax(2).mT,
    "nn.Softmax": Child(),
    "nn.Softmax, positive": Child(3),
}


WEIGHTS = {**PRODUCTS, **WAYS, **{name: by_method(name) for name in METHODS}, **SOFTMAXES}


# Masks. Padded keys are no part of the span of K.

WINDOW = (torch.arange(N)[:, None] - torch.arange(M)).abs() > 4


PADDED_KEYS = torch.zeros(B, 1, 1, M, dtype=torch.bool)


PADDED_KEYS[0, ..., -2:] = True


PADDED_KEYS[1, ..., :1] = True


LOWEST = torch.finfo(torch.float64).min


def bias(closed, value=-torch.inf):
    return torch.zeros(closed.shape, dtype=torch.float64).masked_fill(closed, value)


def fill_in_place(x, closed):
    x.masked_fill_(closed, -torch.inf)
    return x


def set_items(x, closed):
    x[closed.expand_as(x)] = -torch.inf
    return x


def set_items_to_a_tensor(x, closed):
    x[closed.expand_as(x)] = torch.tensor(-1e9, dtype=x.dtype)
    return x


def set_items_of_zeros(x, closed):
    mask = torch.zeros_like(x)
    mask[closed.expand_as(x)] = -torch.inf
    return x + mask


def add_in_place(x, closed):
    x += bias(closed, LOWEST)
    return x


MASKS = {
    "masked_fill": lambda x, closed: x.masked_fill(closed, -torch.inf),
    "masked_fill of -1e9": lambda x, closed: torch.masked_fill(x, closed, -1e9),
    "masked_fill of finfo.min": lambda x, closed: x.masked_fill(closed, LOWEST),
    "masked_fill, keywords": lambda x, closed: x.masked_fill(mask=closed, value=-1e9),
    "masked_fill, keywords swapped": lambda x, closed: x.masked_fill(value=-1e9, mask=closed),
    "masked_fill of a tensor": lambda x, closed: x.masked_fill(closed, torch.tensor(-torch.inf)),
    "masked_fill of 1 - mask": lambda x, closed: x.masked_fill((~closed).int() == 0, -1e9),
    "masked_fill_": lambda x, closed: x.masked_fill_(closed, -torch.inf),
    "masked_fill_ alone": fill_in_place,
    "where": lambda x, closed: torch.where(~closed, x, -torch.inf),
    "where, swapped": lambda x, closed: torch.where(closed, -1e9, x),
    "where of tensors": lambda x, closed: torch.where(~closed, x, torch.full_like(x, LOWEST)),
    "where of tensors, swapped": lambda x, closed: torch.where(closed, torch.tensor(LOWEST), x),
    "Tensor.where": lambda x, closed: x.where(~closed, -torch.inf),
    "where, keywords": lambda x, closed: torch.where(closed, input=torch.tensor(-1e9), other=x),
    "-inf added": lambda x, closed: x + bias(closed),
    "-1e9 added": lambda x, closed: torch.add(x, bias(closed, -1e9)),
    "finfo.min added": lambda x, closed: bias(closed, LOWEST) + x,
    "added, keywords": lambda x, closed: torch.add(input=x, other=bias(closed)),
    "added in place": add_in_place,
    "(1 - mask) * -1e4": lambda x, closed: x.add((1.0 - (~closed).double()) * -1e4),
    "add_": lambda x, closed: x.add_(bias(closed)),
    "subtracted": lambda x, closed: x - 1e9 * closed.double(),
    "GPT-2": lambda x, closed: x * (~closed).double() - 1e4 * (1 - (~closed).double()),
    "OPT": lambda x, closed: torch.max(x + bias(closed, LOWEST), torch.tensor(LOWEST)),
    "scores[mask] = -inf": set_items,
    "scores[mask] = tensor": set_items_to_a_tensor,
    "zeros_like": lambda x, closed: x + torch.zeros_like(x).masked_fill(closed, -torch.inf),
    "zeros_like in place": lambda x, closed: x + torch.zeros_like(x).masked_fill_(closed, -1e9),
    "zeros_like with items": set_items_of_zeros,
    "ones_like": lambda x, closed: x.masked_fill(torch.ones_like(x).bool() & closed, -1e9),
    "new_zeros": lambda x, closed: x + x.new_zeros(x.shape).masked_fill(closed, -torch.inf),
    "new_full": lambda x, closed: x + x.new_full(x.shape, -1e9) * closed,
    "expand_as": lambda x, closed: x.masked_fill(closed.expand_as(x), -torch.inf),
    "cast as the scores": lambda x, closed: x - 1e9 * closed.to(x.dtype),
    "two masks": lambda x, closed: (
        x.masked_fill(WINDOW, -torch.inf) + bias(closed.all(-2, keepdim=True), -1e9)
    ),
    "heads merged": lambda x, closed: split(
        merged(x) + merged(bias(closed).expand(B, H, N, M).contiguous())
    ),
    "transposed": lambda x, closed: x.mT.masked_fill(closed.mT, -torch.inf).transpose(2, 3),
    "with a sink": lambda x, closed: torch.cat([x + bias(closed), torch.ones_like(x[..., :1])], -1),
    "after a sink": lambda x, closed: (
        torch.cat([x, torch.ones_like(x[..., :1])], -1) + bias(F.pad(closed, (0, 1)))
    ),
}


def oracle_on_real(x, scale, real):
    """Like oracle_hook, by the span of real tokens alone."""
    x = x * 1.0
    x.register_hook(
        lambda grad: torch.as_tensor(rescaled(grad.numpy(), x.detach().numpy(), *scale, mask=real))
    )
    return x


def padded_oracle(real_queries, real_keys):
    return lambda q, k: (
        oracle_on_real(q, SCALES["query"], real_queries),
        oracle_on_real(k, SCALES["key"], real_keys),
    )


def below_the_second(x):
    return x < x.topk(2, dim=-1).values[..., -1:]


def not_among_the_first(x):
    return torch.ones_like(x).bool().scatter(-1, x.topk(2, dim=-1).indices, False)


def not_among_the_first_in_place(x):
    mask = torch.ones_like(x).bool()
    mask.scatter_(-1, x.topk(2, dim=-1).indices, False)
    return mask


def set_where_below_zero(x):
    x[x < 0] = -torch.inf
    return x


# Each closes a key to all queries.
OF_SCORES = {
    "topk threshold": lambda x: x.masked_fill(below_the_second(x), -torch.inf),
    "topk threshold, where": lambda x: torch.where(below_the_second(x), -1e9, x),
    "topk scattered": lambda x: x.masked_fill(not_among_the_first(x), -1e9),
    "topk scattered in place": lambda x: x.masked_fill(not_among_the_first_in_place(x), -1e9),
    "kthvalue": lambda x: x.masked_fill(x < x.detach().kthvalue(M - 1, -1, True).values, -1e9),
    "below zero": lambda x: x.masked_fill(x < 0, -torch.inf),
    "not above zero": lambda x: x.masked_fill(torch.logical_not(x.gt(0)), -torch.inf),
    "below zero, added": lambda x: x + (x < 0).double() * -1e9,
    "below zero, added as filled zeros": lambda x: x + torch.zeros_like(x).masked_fill(x < 0, -1e9),
    "below zero, subtracted": lambda x: x - 1e9 * (x < 0),
    "below zero, set": set_where_below_zero,
    "below the mean": lambda x: x.masked_fill(x < x.mean(-1, keepdim=True), -1e9),
    "keys below zero on average": lambda x: x.masked_fill(x.mean((1, 2), True) < 0, -1e9),
    "of low weight": lambda x: x.masked_fill(x.softmax(-1) < 1e-3, -1e9),
    "dropped out": lambda x: x.masked_fill(F.dropout(x.detach().relu(), 0.2) == 0, -1e9),
    "drawn": lambda x: x.masked_fill(torch.bernoulli(x.detach().sigmoid()) == 0, -1e9),
}


def masked_by_itself(name):
    """Weights of scores that differ most by key, masked by what was computed from them."""

    def weigh(q, k):
        x = OF_SCORES[name](scores(q, k) + torch.linspace(-20, 20, M, dtype=q.dtype))
        if not torch.compiler.is_compiling():
            closed = (x < -1e3).flatten(1, -2).all(1)
            assert closed.any(), "else it would be no padding anyway"
        return x.softmax(-1)

    return weigh


# Softmaxes over both axes.


def normalised_both_ways(first):
    def weigh(q, k):
        x = scores(q, k)
        one = x.softmax(first)
        return one + x.softmax(-3 - first)

    return weigh


# Heads.


def grouped(q, kv_heads):
    return q.unflatten(1, (kv_heads, -1))


def stored(x):
    """What comes back from torch.save, and nothing of spanopt in the file."""
    file = io.BytesIO()
    torch.save(x, file)
    assert b"_spanopt_notes" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=not isinstance(x, nn.Module))


class Numbered(nn.Module):
    def __init__(self, width=H * D):
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(width, width) / 3) for _ in range(2))

    def forward(self, x, hook=None):
        q, k = x @ self.w1, x @ self.w2
        if hook is not None:
            q, k = hook(q, k)
        return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=2), x)


UNIFORM = SpanScale(query=(2.0, 2.0), key=(3.0, 3.0))  # without a projection, fast to compile
