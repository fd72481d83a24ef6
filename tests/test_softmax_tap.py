"""The softmax tap: attention written by hand, against the same forward with oracle hooks."""

import copy
import gc
import io
import math
import weakref

import pytest
import torch
from models import ScoreAttention, oracle_hook
from oracle import projector, rescaled
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spanopt import (
    SpanScale,
    SpanScaledOptimizer,
    UnscaledLayerError,
    attach,
    find_attention,
    token_mask,
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


def largest_error(actual, expected):
    """The largest difference of any gradient, relative to the largest number in that gradient."""
    floor = 1e-6 * max(value.abs().max() for value in expected.values())
    errors = [
        (actual[name] - value).abs().max() / value.abs().max().clamp(min=floor)
        for name, value in expected.items()
    ]
    assert torch.stack(errors).isfinite().all()
    return max(errors).item()


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


@pytest.mark.parametrize("weigh", WEIGHTS.values(), ids=WEIGHTS)
def test_gradients_are_the_oracles_however_the_weights_are_written(weigh):
    (site,) = check(ByHand(weigh).double(), *both_inputs()).sites
    assert site.tap == "softmax"
    assert (site.query_length, site.key_length, site.head_dim) == (N, M, D)


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


@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_are_passed_and_padded_keys_found_in_them(mask, padded):
    closed = (WINDOW | PADDED_KEYS) if padded else WINDOW.expand(B, 1, N, M)
    model = ByHand(lambda q, k: mask(scores(q, k), closed).softmax(-1)[..., :M]).double()
    real = ~PADDED_KEYS.squeeze(2) if padded else torch.tensor(True)
    check(model, *both_inputs(), hook=padded_oracle(True, real.numpy()))


@pytest.mark.parametrize(
    "product", ["bmm", "baddbmm", "reversed", "einsum", "heads first", "rows and columns", "mixed"]
)
def test_padding_is_found_whatever_the_product(product):
    closed = WINDOW | PADDED_KEYS
    mask = bias(closed).expand(B, H, N, M)
    weigh = {
        "bmm": lambda q, k: (split(torch.bmm(merged(q), merged(k).mT)) + mask).softmax(-1),
        "baddbmm": lambda q, k: split(
            torch.baddbmm(merged(mask), merged(q), merged(k).mT).softmax(-1)
        ),
        "reversed": lambda q, k: (k @ q.mT).masked_fill(closed.mT, -torch.inf).softmax(-2).mT,
        "einsum": lambda q, k: (
            (torch.einsum("ibnd,jbnd->ijbn", tokens_first(q), tokens_first(k)))
            .add(mask.permute(2, 3, 0, 1))
            .softmax(1)
            .permute(2, 3, 0, 1)
        ),
        "heads first": lambda q, k: (
            torch.einsum("rinhd,rjnhd->hnij", rows_first(q), rows_first(k))
            .masked_fill(closed[:, 0], -1e4)
            .softmax(-1)
            .transpose(0, 1)
        ),
        "rows and columns": lambda q, k: (
            scores(q, k)
            .view(B, H, 3, 3, 1, M)
            .masked_fill(PADDED_KEYS[:, :, None, None], -torch.inf)
            .view(B, H, N, M)
            .softmax(-1)
        ),
        "mixed": lambda q, k: mixed(scores(q, k)).masked_fill(closed, -torch.inf).softmax(-1),
    }[product]
    hook = padded_oracle(True, ~PADDED_KEYS.squeeze(2).numpy())
    check(ByHand(weigh).double(), *both_inputs(), hook=hook)


def test_in_self_attention_padded_keys_are_padded_queries():
    class Masked(ByHand):
        def forward(self, x, mask, hook=None):
            self.weigh = lambda q, k: (scores(q, k) + mask).softmax(-1)
            return super().forward(x, hook=hook)

    mask = bias(F.pad(PADDED_KEYS, (N - M, 0)), -1e9)
    real = (mask[:, 0] > -1).numpy()
    check(Masked(None).double(), tokens(), mask, hook=padded_oracle(real, real))


def test_queries_to_which_all_keys_are_closed_are_padding_in_cross_attention():
    padded_queries = torch.zeros(B, 1, N, 1, dtype=torch.bool)
    padded_queries[1, :, -3:] = True
    closed = WINDOW | padded_queries | PADDED_KEYS
    model = ByHand(lambda q, k: scores(q, k).masked_fill(closed, -1e9).softmax(-1)).double()
    real = ~padded_queries.squeeze(3).numpy(), ~PADDED_KEYS.squeeze(2).numpy()
    check(model, *both_inputs(), hook=padded_oracle(*real))


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


@pytest.mark.parametrize("name", OF_SCORES)
def test_masks_that_were_computed_from_the_scores_are_no_padding(name):
    check(ByHand(masked_by_itself(name)).double(), *both_inputs())


# Softmaxes over both axes.


def normalised_both_ways(first):
    def weigh(q, k):
        x = scores(q, k)
        one = x.softmax(first)
        return one + x.softmax(-3 - first)

    return weigh


@pytest.mark.parametrize("first", [-1, -2])
def test_where_both_sides_are_normalised_the_first_softmax_tells_the_keys(first):
    sides = [SCALES["query"], SCALES["key"]]
    check(
        ByHand(normalised_both_ways(first)).double(),
        *both_inputs(),
        hook=oracle(*(sides if first == -1 else sides[::-1])),
    )


class CoAttention(nn.Module):
    """One product, in which each of two sequences attends to the other."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(H * D, D) for _ in range(2))

    def forward(self, x, context, masks=(None, None), hook=None):
        q, k = self.q_proj(x), self.k_proj(context)
        if hook is not None:
            q, k = hook(q, k)
        affinity = torch.bmm(q, k.transpose(1, 2))
        over_context, over_x = (
            affinity if mask is None else affinity.masked_fill(~mask, -1e9) for mask in masks
        )
        of_context = over_context.softmax(2) @ context
        of_x = over_x.softmax(1).transpose(1, 2) @ x
        return torch.cat([of_context, of_x], dim=1)


REAL_QUERIES, REAL_KEYS = torch.arange(N) < torch.tensor([[9], [7], [8]]), ~PADDED_KEYS[:, 0, 0]
OF_BOTH_SIDES = padded_oracle(REAL_QUERIES.numpy(), REAL_KEYS.numpy())


def test_co_attention_is_scaled_once_on_each_side():
    check(CoAttention().double(), *both_inputs())


def test_padding_of_both_sides_of_co_attention():
    masks = (REAL_QUERIES[:, :, None] & REAL_KEYS[:, None],) * 2
    check(CoAttention().double(), *both_inputs(), masks=masks, hook=OF_BOTH_SIDES)


def test_token_mask_goes_before_the_masks_of_co_attention():
    model, inputs = CoAttention().double(), both_inputs()
    masks = REAL_KEYS[:, None], REAL_QUERIES[:, :, None]
    _, expected = run(model, *inputs, masks=masks, hook=OF_BOTH_SIDES)
    with attach(model, SCALE), token_mask({"*": (REAL_QUERIES, REAL_KEYS)}):
        _, actual = run(model, *inputs, masks=masks)
    assert largest_error(actual, expected) < 1e-10


# Heads.


def grouped(q, kv_heads):
    return q.unflatten(1, (kv_heads, -1))


def repeated(k, groups):
    batch, kv_heads, length, d = k.shape
    expanded = k[:, :, None].expand(batch, kv_heads, groups, length, d)
    return expanded.reshape(batch, kv_heads * groups, length, d)


# By name: heads, key heads, and both as the tap sees them.
GROUPED = {
    "repeat_interleave": (
        (4, 2),
        (4, 4),
        lambda q, k: scores(q, k.repeat_interleave(2, dim=1)).softmax(-1),
    ),
    "expanded": ((4, 2), (4, 4), lambda q, k: scores(q, repeated(k, 2)).softmax(-1)),
    "5-D": (
        (4, 2),
        (4, 2),
        lambda q, k: scores(grouped(q, 2), k.unsqueeze(2)).softmax(-1).flatten(1, 2),
    ),
    "5-D einsum": (
        (4, 2),
        (4, 2),
        lambda q, k: torch.einsum("bkgnd,bkmd->bkgnm", grouped(q, 2), k).softmax(-1).flatten(1, 2),
    ),
    "multi-query einsum": (
        (4, 1),
        (4, 1),
        lambda q, k: torch.einsum("bhid,bjd->bhij", q, k.squeeze(1)).softmax(-1),
    ),
    "multi-query": ((4, 1), (4, 1), lambda q, k: scores(q, k).softmax(-1)),
    "multi-query, heads in the rows": (
        (4, 1),
        (1, 1),
        lambda q, k: scores(q[:, :1], k).softmax(-1).expand(B, 4, N, M),
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_queries_by_hand(name):
    (heads, kv_heads), seen, weigh = GROUPED[name]
    inputs = tokens(width=4 * D), tokens(length=M, width=4 * D)
    (site,) = check(ByHand(weigh, heads, kv_heads).double(), *inputs).sites
    assert (site.heads, site.kv_heads) == seen


@pytest.mark.parametrize("name", ["as many", "multi-query", "5-D", "5-D einsum"])
def test_per_head_values_scale_each_head_by_its_own(name):
    as_many = (4, 4), (4, 4), WEIGHTS["q @ k.mT"]
    (heads, kv_heads), _, weigh = {**GROUPED, "as many": as_many}[name]
    query, key = ([1.0, 2.0, 3.0, 4.0], 0.5), ([2.0, -3.0, 4.0, 0.5][:kv_heads], 1.0)
    model = ByHand(weigh, heads, kv_heads).double()
    inputs = tokens(width=4 * D), tokens(length=M, width=4 * D)
    check(model, *inputs, scale=SpanScale(query=query, key=key), hook=oracle(query, key))


def test_per_head_values_for_repeated_keys_are_those_of_their_query_heads():
    (heads, kv_heads), _, weigh = GROUPED["repeat_interleave"]
    query, key = ([1.0, 2.0, 3.0, 4.0], 0.5), ([2.0, -3.0, 4.0, 0.5], 1.0)
    model = ByHand(weigh, heads, kv_heads).double()
    inputs = tokens(width=4 * D), tokens(length=M, width=4 * D)
    with attach(model, SpanScale(query=query, key=key)):
        _, actual = run(model, *inputs)
    model.weigh = lambda q, k: scores(*oracle(query, key)(q, repeated(k, 2))).softmax(-1)
    _, expected = run(model, *inputs)
    assert largest_error(actual, expected) < 1e-10


@pytest.mark.parametrize(
    ("weigh", "scale", "message"),
    [
        (WEIGHTS["q @ k.mT"], SpanScale([1.0] * 3), "3 per-head values on the query side, which"),
        (WEIGHTS["torch.bmm"], SpanScale([1.0] * H), "which has no dimension for its heads"),
        (WEIGHTS["k @ q.mT over -2"], SpanScale(1, key=([1.0] * 3, 1)), "on the key side"),
    ],
)
def test_a_wrong_number_of_per_head_values_is_an_error_at_the_first_forward(weigh, scale, message):
    model = ByHand(weigh).double()
    with attach(model, scale), pytest.raises(ValueError, match=message):
        model(*both_inputs())


# Scales.


def test_identity_scales_leave_gradients_bit_for_bit():
    model, inputs = ByHand(WEIGHTS["q @ k.mT"]), both_inputs()
    model, inputs = model.double(), inputs
    before, plain = run(model, *inputs)
    with attach(model, {"*": (1.0, 1.0)}) as hooks:
        after, actual = run(model, *inputs)
        assert hooks.unseen() == []
    assert torch.equal(after, before)
    assert all(torch.equal(actual[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ((2.0, 2.0), (2.0, 2.0)),
        ((2.0, 2.0), (0.0, 0.0)),
        ((3.0, 3.0), (3.0, 1.0)),
        ((2.0, 0.5), (4.0, 4.0)),
        ((0.0, 1.0), (1.0, 0.0)),
        ((-2.0, 0.5), (3.0, -1.0)),
    ],
)
@pytest.mark.parametrize("weigh", ["q @ k.mT", "k @ q.mT over -2", "einsum, tokens first"])
def test_uniform_zero_and_negative_scales(weigh, query, key):
    scale, hook = SpanScale(query=query, key=key), oracle(query, key)
    check(ByHand(WEIGHTS[weigh]).double(), *both_inputs(), scale=scale, hook=hook)


@pytest.mark.parametrize("weigh", ["q @ k.mT", "k @ q.mT over -2"])
@pytest.mark.parametrize("side", ["query", "key"])
def test_one_side_only(side, weigh):
    model, inputs = ByHand(WEIGHTS[weigh]).double(), both_inputs()
    scales = {**SCALES, side: (1.0, 1.0)}
    scaled = {"query": "k_proj.weight", "key": "q_proj.weight"}[side]
    check(model, *inputs, scale=SpanScale(**scales), hook=oracle(**scales), names=[scaled])


@pytest.mark.parametrize("weigh", ["q @ k.mT", "k @ q.mT over -2"])
@pytest.mark.parametrize("frozen", ["q_proj", "k_proj"])
def test_one_side_frozen(frozen, weigh):
    model = ByHand(WEIGHTS[weigh]).double()
    getattr(model, frozen).requires_grad_(False)
    inputs = tokens(requires_grad=frozen == "k_proj"), tokens(length=M, requires_grad=False)
    trained = {"q_proj": "k_proj.weight", "k_proj": "q_proj.weight"}[frozen]
    check(model, *inputs, names=[trained])


def test_changes_of_scale_act_from_the_next_forward_on():
    model, inputs = ByHand(WEIGHTS["q @ k.mT"]).double(), both_inputs()
    with attach(model, SCALE) as hooks:
        _, old = run(model, *inputs)
        for leaf in (*model.parameters(), *inputs):
            leaf.grad = None
        loss = model(*inputs).pow(3).sum()
        hooks.groups[0].update(query=(4.0, 0.5))
        loss.backward()
        assert torch.equal(model.q_proj.weight.grad, old["q_proj.weight"])
        _, new = run(model, *inputs)
    _, expected = run(model, *inputs, hook=oracle(query=(4.0, 0.5)))
    assert largest_error(new, expected) < 1e-10


def test_bfloat16_with_the_softmax_in_float32():
    weigh = WEIGHTS["cast by softmax"]
    model = ByHand(weigh).bfloat16()
    inputs = tokens(dtype=torch.bfloat16), tokens(length=M, dtype=torch.bfloat16)
    check(model, *inputs, tolerance=0.03)


def test_float32():
    model = ByHand(WEIGHTS["with a sink"])
    check(model, tokens(dtype=torch.float32), tokens(length=M, dtype=torch.float32), tolerance=1e-4)


def test_autocast():
    model = ByHand(WEIGHTS["q @ k.mT"])
    inputs = tokens(dtype=torch.float32), tokens(length=M, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check(model, *inputs, tolerance=0.03)


# How a layer is called.


class Wrapped(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.run = forward

    def forward(self, *inputs, hook=None):
        return self.run(*self.layers.values(), *inputs, hook=hook)


def twice(layer, x, hook):
    return layer(layer(x, hook=hook), x, hook=hook)


def in_a_loop(layer, x, hook):
    for _ in range(3):
        x = x + layer(x, hook=hook)
    return x


def stacked(first, second, x, hook):
    return second(first(x, hook=hook), hook=hook)


@pytest.mark.parametrize(("forward", "layers"), [(twice, 1), (in_a_loop, 1), (stacked, 2)])
def test_each_call_is_scaled_on_its_own_query_and_key(forward, layers):
    made = {f"layer{i}": ByHand(WEIGHTS["q @ k.mT"]) for i in range(layers)}
    check(Wrapped(forward, **made).double(), tokens())


def test_scores_of_an_earlier_layer_may_be_added():
    def first(q, k):
        earlier.append(scores(q, k))
        return earlier[-1].softmax(-1)

    earlier = []
    layers = {
        "first": ByHand(first),
        "second": ByHand(lambda q, k: (earlier.pop() + scores(q, k)).softmax(-1)),
    }
    check(Wrapped(stacked, **layers).double(), tokens())


def test_functional_gradients():
    model, inputs = ByHand(WEIGHTS["q @ k.mT"]).double(), both_inputs()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, inputs).pow(3).sum()

    with attach(model, SCALE):
        _, expected = run(model, *inputs)
        actual = torch.func.grad(loss)(dict(model.named_parameters()))
    assert largest_error(actual, {name: expected[name] for name in actual}) < 1e-12


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_of_the_layer(use_reentrant):
    def forward(layer, x, hook):
        y = checkpoint(layer, x, hook=hook, use_reentrant=False) if hook else None
        return y if hook else checkpoint(layer, x, use_reentrant=use_reentrant)

    check(Wrapped(forward, layer=ByHand(WEIGHTS["q @ k.mT"])).double(), tokens())


@pytest.mark.parametrize("weigh", WEIGHTS.values(), ids=WEIGHTS)
def test_activation_checkpointing_inside_the_layer(weigh):
    def checkpointed(q, k):
        return checkpoint(weigh, q, k, use_reentrant=False)

    check(ByHand(checkpointed).double(), *both_inputs())


def test_reentrant_checkpointing_inside_the_layer_is_never_silently_unscaled():
    def weigh(q, k):
        return checkpoint(WEIGHTS["q @ k.mT"], q, k, use_reentrant=True)

    model, inputs = ByHand(weigh).double(), both_inputs()
    run(model, *inputs)

    def train(hooks):
        run(model, *inputs)
        hooks.check()

    with attach(model, SCALE) as hooks, pytest.raises(UnscaledLayerError):
        train(hooks)


def test_backward_twice_accumulates():
    model, inputs = ByHand(WEIGHTS["q @ k.mT"]).double(), both_inputs()
    with attach(model, SCALE):
        _, once = run(model, *inputs)
        for leaf in (*model.parameters(), *inputs):
            leaf.grad = None
        loss = model(*inputs).pow(3).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        model(*inputs).pow(3).sum().backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: 3 * once[name] for name in actual}
    assert largest_error(actual, expected) < 1e-12


def differentiable(x, parallel, violation):
    """Like oracle_hook, differentiable, the projector a constant."""
    x = x * 1.0
    spans = [torch.as_tensor(projector(basis)) for basis in x.detach().flatten(0, 1).numpy()]
    P = torch.stack(spans).unflatten(0, x.shape[:2])
    x.register_hook(lambda g: parallel * P @ g + violation * (g - P @ g))
    return x


@pytest.mark.parametrize("weigh", ["q @ k.mT", "k @ q.mT over -2", "einsum, tokens first"])
def test_double_backward(weigh):
    model, inputs = ByHand(WEIGHTS[weigh]).double(), both_inputs()

    def penalised(*inputs, hook=None):
        result = model(*inputs, hook=hook)
        gradients = torch.autograd.grad(result.pow(3).sum(), inputs, create_graph=True)
        return torch.cat([g.flatten() for g in gradients]) * 10

    def hook(q, k):
        return differentiable(q, *SCALES["query"]), differentiable(k, *SCALES["key"])

    penalised.named_parameters = model.named_parameters
    _, plain = run(penalised, *inputs)
    _, expected = run(penalised, *inputs, hook=hook)
    with attach(model, SCALE):
        _, actual = run(penalised, *inputs)
    assert largest_error(actual, expected) < 1e-10
    assert_far(actual, plain)


def test_nothing_happens_without_gradients():
    model, inputs = ByHand(WEIGHTS["q @ k.mT"]).double(), both_inputs()
    expected = model(*inputs)
    with attach(model, SCALE) as hooks:
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert torch.equal(model(*inputs), expected)
        assert hooks.unseen() == [""]
        run(model, *inputs)
        assert hooks.unseen() == []


def saved_for_backward(model, *inputs):
    """The sizes of all storages saved for backward but the parameters'."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = model(*inputs)
    del result
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sorted(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    "weigh",
    ["q @ k.mT", "q @ k.transpose", "torch.matmul", "torch.bmm", "k @ q.mT over -2"],
)
def test_no_tensor_is_saved_that_plain_code_does_not_save(weigh):
    model, inputs = ByHand(WEIGHTS[weigh]).double(), both_inputs()
    plain = saved_for_backward(model, *inputs)
    with attach(model, SCALE):
        assert saved_for_backward(model, *inputs) == plain


# What is left behind.


class Keeping(nn.Module):
    """A layer that keeps what it computes, and writes some of it to buffers."""

    def __init__(self, width=H * D):
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(width, width) for _ in range(2))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("last", None)
        self.kept = ()

    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        product = torch.bmm(q, k.transpose(1, 2))
        masked = product.masked_fill(torch.eye(N).bool(), -1e9)
        weights = masked.softmax(-1)
        self.mean.lerp_(product.detach().mean(), 0.1)
        self.last = weights.detach()
        self.kept = (q, k, product, masked, weights)
        return weights @ x


def stored(x):
    """What comes back from torch.save, and nothing of spanopt in the file."""
    file = io.BytesIO()
    torch.save(x, file)
    assert b"_spanopt_notes" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=not isinstance(x, nn.Module))


@pytest.mark.parametrize("backward", [False, True], ids=["", "after the backward pass"])
def test_what_a_layer_computed_can_be_saved_and_copied_and_carries_no_notes(backward):
    model, x = Keeping().double(), tokens()
    with attach(model, SCALE):
        result = model(x)
        if backward:
            result.pow(3).sum().backward()
        everything = (x, result, *model.kept, *model.buffers(), *model.parameters())
        assert all(vars(one) == {} for one in everything)
        for one in everything:
            assert torch.equal(stored(one), one)
        assert torch.equal(copy.deepcopy(result.detach()), result)
        assert torch.equal(stored(model.state_dict())["last"], model.last)
        assert torch.equal(stored(model)(x), result)
        model.kept = ()  # which are no leaves, so that no copy of them can be made
        assert torch.equal(copy.deepcopy(model)(x), result)


def tensors_alive(model, x):
    """Which of the kept tensors are alive after each pass, while the scores are still in use."""
    gc.collect()
    gc.disable()
    try:
        loss = model(x).pow(3).sum()
        kept, model.kept = [weakref.ref(one) for one in model.kept], model.kept[2:3]
        forward = [one() is not None for one in kept]
        loss.backward()
        return forward, [one() is not None for one in kept]
    finally:
        gc.enable()


def test_no_tensor_is_kept_alive_that_plain_code_does_not_keep():
    model, x = Keeping().double(), tokens()
    plain = tensors_alive(model, x)
    assert sum(plain[1]) == 1
    with attach(model, SCALE):
        assert tensors_alive(model, x) == plain


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


KEYS, QUERIES = (
    torch.linspace(-1, 1, size**2, dtype=torch.float64).view(size, size) for size in (M, N)
)


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


@pytest.mark.parametrize(
    "softmax",
    [
        lambda x: x.flatten(-2).softmax(-1).view(x.shape),
        lambda x: x.softmax(1),
        lambda x: x.transpose(1, 2).reshape(B, N, H * M).softmax(-1).reshape(x.shape),
        lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
        lambda x: x.view(B, H, 3, 3, M, 1).softmax(-1).view(x.shape),
        lambda x: x.view(B, H, 3, 3, M).softmax(3).view(x.shape),
        lambda x: x.view(B, H, 3, 3, M).permute(0, 1, 4, 3, 2).reshape(B, H, M, N).softmax(2).mT,
        lambda x: x.view(B, H * 3, 3 * M).softmax(-1).view(x.shape),
        lambda x: torch.einsum("bhij,jk->bhik", x, KEYS).softmax(-1),
        lambda x: torch.einsum("bhij,bhkj->bhik", x, KEYS.expand(B, H, M, M)).softmax(-1),
        lambda x: F.linear(x, KEYS).softmax(-1),
        lambda x: (x @ KEYS).softmax(-1),
        lambda x: (QUERIES @ x).softmax(-1),
        lambda x: F.conv2d(x, torch.ones(H, H, 3, 3).double(), padding=1).softmax(-1),
        lambda x: x.cumsum(-1).softmax(-1),
    ],
    ids=[
        "of queries and keys",
        "of heads",
        "of heads and keys",
        "by hand",
        "of the columns of keys",
        "of the columns of queries",
        "of columns before rows",
        "of parts of queries and keys",
        "of keys mixed by einsum",
        "of keys mixed by einsum with what looks like a key",
        "of keys mixed by linear",
        "of keys mixed by matmul",
        "of queries mixed by matmul",
        "of neighbours mixed by convolution",
        "of sums over keys",
    ],
)
def test_another_normalisation_is_not_taken_for_attention(softmax):
    model = ByHand(lambda q, k: softmax(scores(q, k))).double()
    with (
        attach(model, SpanScale(2.0, 1.0)),
        pytest.raises(UnscaledLayerError, match="not scaled: layer '' "),
    ):
        model(*both_inputs())


def test_scores_that_a_softmax_is_taken_of_both_ways_are_not_silently_unscaled():
    def weigh(q, k):
        x = scores(q, k)
        return x.softmax(-1) + x.softmax(-2)

    model, inputs = ByHand(weigh).double(), both_inputs()
    _, plain = run(model, *inputs)
    with attach(model, SCALE) as hooks:
        try:
            _, actual = run(model, *inputs)
            hooks.check()
        except (UnscaledLayerError, ValueError):
            return
    assert_far(actual, plain)


# Tensors that have no span.


def test_heads_that_do_not_broadcast_are_the_error_of_plain_code():
    model = ByHand(lambda q, k: (q @ k[:, :3].mT).softmax(-1), heads=4)
    inputs = tokens(width=4 * D, dtype=torch.float32), tokens(width=4 * D, dtype=torch.float32)
    with pytest.raises(RuntimeError) as plain:
        model(*inputs)
    with attach(model, SpanScale(2.0, 1.0)), pytest.raises(RuntimeError) as hooked:
        model(*inputs)
    assert str(hooked.value) == str(plain.value)


def test_nested_tensors_are_refused_by_name():
    class Nested(ByHand):
        def forward(self, q):
            return (q @ q.transpose(-2, -1)).softmax(-1)

    q = torch.nested.nested_tensor([torch.randn(3, D), torch.randn(5, D)], requires_grad=True)
    model = Nested(None)
    with (
        attach(model, SpanScale(2.0, 1.0)),
        pytest.raises((TypeError, UnscaledLayerError), match="layer ''"),
    ):
        model(q)


def test_complex_tensors_are_never_silently_unscaled():
    def weigh(q, k):
        q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
        return (q @ k.mH).real.softmax(-1)

    model = ByHand(weigh)
    inputs = tokens(dtype=torch.float32), tokens(length=M, dtype=torch.float32)
    model(*inputs)
    with (
        attach(model, SpanScale(2.0, 1.0)),
        pytest.raises((TypeError, UnscaledLayerError), match="layer ''"),
    ):
        model(*inputs)


class Fused(nn.Module):
    def forward(self, q, k):
        return F.scaled_dot_product_attention(q, k, k)


class Packed(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(D, 2)

    def forward(self, q, k):
        return super().forward(q, k, k)


SPANLESS = {"sparse": torch.Tensor.to_sparse, "complex": torch.Tensor.cfloat}


@pytest.mark.parametrize("kind", SPANLESS)
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("layer", [Fused, Packed])
def test_tensors_without_a_span_are_refused_by_name_in_the_other_taps_too(layer, side, kind):
    model = nn.ModuleDict({"attn": layer()})
    q, k = (torch.randn(B, N, D, requires_grad=True) for _ in range(2))
    inputs = (SPANLESS[kind](q), k) if side == "query" else (q, SPANLESS[kind](k))
    with (
        attach(model, SpanScale(2.0, 1.0)),
        pytest.raises(TypeError, match=f"layer 'attn': the {side} tensor must be"),
    ):
        model["attn"](*inputs)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "grouped"), [(4, 2, False), (4, 3, False), (4, 3, True), (2, 4, True)]
)
def test_heads_that_do_not_go_together_are_refused_by_name(heads, kv_heads, grouped):
    class Grouped(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=grouped)

    model = nn.ModuleDict({"attn": Grouped()})
    q, k = (torch.randn(B, count, N, D, requires_grad=True) for count in (heads, kv_heads))
    message = f"layer 'attn': the query has {heads} heads and the key {kv_heads}"
    with attach(model, SpanScale(2.0, 1.0)), pytest.raises(ValueError, match=message):
        model["attn"](q, k)


def test_scores_that_were_pickled_are_tensors_like_others():
    def weigh(q, k):
        stored.append(scores(q, k))
        return stored[-1].softmax(-1)

    stored, file = [], io.BytesIO()
    model, inputs = ByHand(weigh).double(), both_inputs()
    with attach(model, SpanScale(2.0, 1.0)):
        model(*inputs)
    torch.save(stored[-1], file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False).detach()
    loaded = copy.deepcopy(loaded)
    check(ByHand(lambda q, k: (scores(q, k) + loaded).softmax(-1)).double(), *inputs)


def test_vmap_is_refused_by_name():
    model, (x, context) = ByHand(WEIGHTS["q @ k.mT"]).double(), both_inputs()
    with (
        attach(model, SpanScale(2.0, 1.0)),
        pytest.raises(TypeError, match=r"layer '': .* torch\.vmap"),
    ):
        torch.vmap(lambda x, context: model(x[None], context[None]))(x, context)


def test_query_and_key_may_be_the_same_tensor():
    class Shared(Numbered):
        def forward(self, x, hook=None):
            q = k = x @ self.w1
            if hook is not None:
                q, k = hook(q, k)
            return (q @ k.mT).softmax(-1) @ (x @ self.w2)

    check(Shared().double(), tokens(), names=["w1"])


# Finding the layers.


class NonLocal(nn.Module):
    """The non-local block of vision models."""

    def __init__(self, width=H * D):
        super().__init__()
        self.theta, self.phi, self.g, self.W = (nn.Conv1d(width, width, 1) for _ in range(4))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, hook=None):
        y = x.mT
        theta, phi = self.theta(y).mT, self.phi(y).mT
        if hook is not None:
            theta, phi = hook(theta, phi)
        f = torch.matmul(theta, phi.permute(0, 2, 1))
        return x + self.W(torch.matmul(self.softmax(f), self.g(y).permute(0, 2, 1)).mT).mT


class Numbered(nn.Module):
    def __init__(self, width=H * D):
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(width, width) / 3) for _ in range(2))

    def forward(self, x, hook=None):
        q, k = x @ self.w1, x @ self.w2
        if hook is not None:
            q, k = hook(q, k)
        return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=2), x)


class InProj(nn.Module):
    def __init__(self, width=H * D):
        super().__init__()
        self.in_proj, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, hook=None):
        q, k, v = self.in_proj(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        if hook is not None:
            q, k = hook(q, k)
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        return self.out(torch.einsum("bhij,bhjd->bihd", weights, v).flatten(-2))


class PositionsInside(nn.Module):
    """An attention core with parameters of its own, that are no projections."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(N * M, H)

    def forward(self, q, k):
        bias = self.bias(torch.arange(N * M).view(N, M)).movedim(-1, 0)
        return (scores(q, k) + bias).softmax(-1)


class TalkingInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = (nn.Conv2d(H, H, 1, bias=False) for _ in range(2))

    def forward(self, q, k):
        x = scores(q, k)
        return self.after((x + self.before(x)).softmax(-1))


@pytest.mark.parametrize("core", [PositionsInside, TalkingInside])
def test_a_core_with_parameters_is_scaled_as_a_part_of_the_layer_around_it(core):
    model = nn.ModuleDict({"layer": ByHand(core()).double()})
    assert [site.name for site in find_attention(model)] == ["layer"]
    check(model["layer"], *both_inputs())


UNUSUAL = {
    NonLocal: (1, ("theta.weight", "phi.weight")),
    Numbered: (1, ("w1", "w2")),
    InProj: (H, ("in_proj.weight",)),
}


@pytest.mark.parametrize("layer", UNUSUAL)
def test_layers_with_unusual_names_are_found_and_scaled(layer):
    heads, weights = UNUSUAL[layer]
    model = nn.ModuleDict({"layer": layer().double()})
    (site,) = find_attention(model)
    assert (site.name, site.tap, site.certain, site.heads) == ("layer", "softmax", False, None)
    model = model["layer"]
    with attach(model, SCALE) as hooks:
        model(tokens())
        (site,) = hooks.sites
        assert (site.tap, site.heads, site.kv_heads) == ("softmax", heads, heads)
        assert site.head_dim == H * D // heads
        assert (site.query_length, site.key_length) == (N, N)
        hooks.forget()
        assert hooks.unseen() == [""], "once seen, it must be seen in each step"
    check(model, tokens(), names=weights)


class Router(nn.Module):
    """A mixture of experts: multiplies and takes a softmax, and is no attention."""

    def __init__(self, width=H * D, experts=5):
        super().__init__()
        self.gate, self.up = nn.Linear(width, experts), nn.Linear(width, experts * width)

    def forward(self, x):
        weights = F.softmax(self.gate(x), dim=-1)
        experts = self.up(x).unflatten(-1, (weights.shape[-1], -1))
        return (weights.unsqueeze(-2) @ experts).squeeze(-2)


class Sigmoid(ByHand):
    def __init__(self):
        super().__init__(lambda q, k: scores(q, k).sigmoid())


def test_a_layer_that_is_no_attention_is_dropped_in_silence():
    model = nn.Sequential(Router(), NonLocal(), Router()).double()
    assert [site.certain for site in find_attention(model)] == [False] * 3
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, SpanScale(2.0, 1.0)
    )
    before = model[1].theta.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        run(model, tokens())
        optimizer.step()
    assert not torch.equal(model[1].theta.weight, before)
    assert [site.heads for site in optimizer.hooks.sites] == [None, 1, None]


def test_a_model_of_layers_none_of_which_is_attention_is_an_error_at_the_step():
    model, x = nn.Sequential(Router(), Router()).double(), tokens()
    assert [site.certain for site in find_attention(model)] == [False] * 2
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, SpanScale(2.0, 1.0)
    )
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        run(model, x)
        with pytest.raises(UnscaledLayerError, match=r"layers '0', '1' \(scaled: none\)"):
            optimizer.step()
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_router_alone_has_the_gradients_of_plain_code():
    model, x = nn.Sequential(Router(), NonLocal()).double(), tokens()
    _, plain = run(model, x)
    with attach(model, SCALE):
        _, actual = run(model, x)
    late = [name for name in plain if name.startswith(("1.g", "1.W"))]
    assert all(torch.equal(actual[name], plain[name]) for name in late)
    alone, y = Router().double(), tokens()
    _, plain = run(alone, y)
    with attach(alone, SCALE):
        _, actual = run(alone, y)
    assert all(torch.equal(actual[name], plain[name]) for name in plain)


def test_sigmoid_attention_is_an_error_that_names_it_and_the_layers_that_are_scaled():
    model = nn.Sequential(ByHand(WEIGHTS["einsum"]), Sigmoid(), NonLocal(), Router()).double()
    message = r"not scaled: layer '1' \(Sigmoid\); scaled: '0' \(ByHand\), '2' \(NonLocal\)\. "
    with attach(model, SpanScale(2.0, 1.0)), pytest.raises(UnscaledLayerError, match=message):
        model(tokens())
    with attach(model, {"*": SCALE, "1": None}) as hooks:
        run(model, tokens())
        assert hooks.unseen() == []


class Indexer(nn.Module):
    """Chooses keys for each query by a product of its own, as in sparse attention."""

    def __init__(self, width=H * D, trained=False):
        super().__init__()
        self.wq, self.wk = nn.Linear(width, D), nn.Linear(width, D)
        self.trained = trained

    def forward(self, x):
        chosen = self.wq(x) @ self.wk(x).transpose(-2, -1)
        return chosen.relu() if self.trained else chosen.detach().topk(5).indices


class Indexed(ByHand):
    def __init__(self, **options):
        super().__init__(None)
        self.indexer = Indexer(**options)

    def forward(self, x, hook=None):
        chosen = self.indexer(x)
        if self.indexer.trained:
            self.weigh = lambda q, k: (scores(q, k) + chosen[:, None]).softmax(-1)
        else:
            closed = torch.ones(len(x), 1, N, N, dtype=torch.bool).scatter(3, chosen[:, None], 0)
            closed[..., 0] = False  # so that no key is closed to all
            self.weigh = lambda q, k: scores(q, k).masked_fill(closed, -torch.inf).softmax(-1)
        return super().forward(x, hook=hook)


def test_an_indexer_that_returns_no_gradient_is_no_attention_that_must_be_scaled():
    model, x = nn.Sequential(Indexed()).double(), tokens()
    assert [site.name for site in find_attention(model)] == ["0", "0.indexer"]
    check(model[0], x)
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, {"*": (2.0, 1.0)}
    )
    model(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(x)
    model(x).sum().backward()
    optimizer.step()


def test_an_indexer_that_is_named_or_trained_must_be_scaled():
    message = r"not scaled: layer '0.indexer' \(Indexer\); scaled: '0' \(Indexed\)"
    model = nn.Sequential(Indexed()).double()
    scales = {"*": SCALE, "0.indexer": (2.0, 1.0)}
    with attach(model, scales), pytest.raises(UnscaledLayerError, match=message):
        model(tokens())
    model = nn.Sequential(Indexed(trained=True)).double()
    with attach(model, SCALE), pytest.raises(UnscaledLayerError, match=message):
        model(tokens())


def test_a_frozen_layer_that_cannot_be_scaled_is_still_an_error():
    model = nn.Sequential(Sigmoid()).double().requires_grad_(False)
    with attach(model, SCALE), pytest.raises(UnscaledLayerError, match="not scaled: layer '0'"):
        model(tokens(requires_grad=False))


# Functions that no mode sees.


class Script(nn.Module):
    """Weights of scores that a function of TorchScript changes."""

    def __init__(self, source):
        super().__init__()
        self.changed = torch.jit.CompilationUnit(f"def changed(x):\n    return {source}\n").changed

    def forward(self, q, k):
        return self.changed(scores(q, k)).masked_fill(PADDED_KEYS, -torch.inf).softmax(-1)


@pytest.mark.parametrize("source", ["torch.tanh(x / 2.0) * 2.0", "x.abs().sqrt().neg()"])
def test_an_elementwise_script_is_followed_also_when_it_is_optimised(source):
    class Layer(ByHand):
        def __init__(self):
            super().__init__(None)
            self.weigh = Script(source)

    model, inputs = Layer().double(), both_inputs()
    hook = padded_oracle(True, ~PADDED_KEYS.squeeze(2).numpy())
    for _ in range(3):  # TorchScript optimises a function when it is run again
        check(model, *inputs, hook=hook)


@pytest.mark.parametrize(
    "source", ["x.cumsum(-1) * 2.0", "x.softmax(1) / 2.0", "x + x.mean(-1, keepdim=True)"]
)
def test_a_script_that_is_not_elementwise_loses_the_scores(source):
    class Layer(ByHand):
        def __init__(self):
            super().__init__(None)
            self.weigh = Script(source)

    model, inputs = nn.Sequential(Layer().double()), both_inputs()
    for _ in range(3):
        model[0](*inputs).sum().backward()
    with attach(model, SCALE) as hooks:
        model[0](*inputs).sum().backward()
        with pytest.raises(UnscaledLayerError, match="layer '0'"):
            hooks.check()


class Own(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.roll(1, -1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad.roll(-1, -1)


LOSSES = {
    "flip": lambda x: x.flip(-1).softmax(-1),
    "roll": lambda x: ((x + 1).roll(1, -1) * 2).softmax(-1),
    "pad": lambda x: F.pad(x / 2, (1, 1)).relu().softmax(-1)[..., 1:-1],
    "cumsum": lambda x: x.cumsum(-1).masked_fill(WINDOW, -1e9).softmax(-1),
    "OwnBackward": lambda x: (Own.apply(x) + 1).softmax(-1),
    "a softmax that is not over one side's tokens": lambda x: x.softmax(1),
}


@pytest.mark.parametrize("operation", LOSSES)
def test_the_error_names_the_operation_at_which_the_product_was_lost(operation):
    model = nn.Sequential(ByHand(lambda q, k: LOSSES[operation](scores(q, k)))).double()
    message = f"their product was lost on its way to a softmax: at {operation}\\."
    with attach(model, SCALE) as hooks:
        with pytest.raises(UnscaledLayerError, match=message):
            hooks.probe(model[0], both_inputs())
        model[0](*both_inputs()).sum().backward()
        with pytest.raises(UnscaledLayerError, match=message):
            hooks.check()


class Distances(ByHand):
    def __init__(self):
        super().__init__(lambda q, k: (-torch.cdist(q, k)).softmax(-1))


class Recurrent(ByHand):
    def __init__(self):
        super().__init__(lambda q, k: scores(q, k).tril() / N)


def test_the_error_says_of_each_kind_of_layer_what_was_seen():
    model = nn.Sequential(Distances(), Recurrent(), Distances()).double()
    with attach(model, SCALE), pytest.raises(UnscaledLayerError) as raised:
        model(tokens())
    text = str(raised.value)
    assert text.count("Each Distances called no attention that can be seen: it took a softmax") == 1
    assert "The Recurrent called no attention that can be seen: neither torch.nn" in text
    assert text.index("pass qk_modules=") < text.index("give it the scale None")


def test_for_layers_without_a_softmax_the_first_advice_is_a_pattern_with_the_scale_none():
    blocks = [
        nn.ModuleDict({"linear_attn": Recurrent(), "attn": ByHand(WEIGHTS["q @ k.mT"])})
        for _ in range(2)
    ]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks)}).double()

    def run_all(x):
        for block in model["blocks"]:
            for layer in block.values():
                x = layer(x)
        return x

    with attach(model, SCALE) as hooks:
        run_all(tokens()).sum().backward()
        with pytest.raises(UnscaledLayerError) as raised:
            hooks.check()
    text = str(raised.value)
    advice = "give it the scale None: scales={..., '*.linear_attn': None}"
    assert text.index(advice) < text.index("pass qk_modules=")
    with attach(model, {"*": SCALE, "*.linear_attn": None}) as hooks:
        run_all(tokens()).sum().backward()
        hooks.check()


# torch.compile.


class Bare(nn.Module):
    """Weights of Q and K, each way of its own, in a layer that has projections by name only."""

    def __init__(self, *ways):
        super().__init__()
        self.ways = ways
        self.q_proj, self.k_proj = (nn.Parameter(torch.ones(())) for _ in range(2))

    def forward(self, q, k):
        weights = [way(*x) for way, *x in zip(self.ways, q.unbind(), k.unbind(), strict=True)]
        return torch.stack(weights)

    def inputs(self):
        options = {"dtype": torch.float64, "requires_grad": True}
        return (torch.randn(len(self.ways), B, H, length, D, **options) for length in (N, M))


@pytest.fixture
def compiled():
    """What compiles a model in one graph; the compiler is fresh before and after."""
    torch.compiler.reset()
    yield lambda model, backend="aot_eager": torch.compile(model, fullgraph=True, backend=backend)
    torch.compiler.reset()


def closed_keys(mask):
    """Weights with a mask of that kind which closes some keys to all."""
    closed = (WINDOW | PADDED_KEYS).expand(B, H, N, M)
    return lambda q, k: MASKS[mask](scores(q, k), closed).softmax(-1)


UNIFORM = SpanScale(query=(2.0, 2.0), key=(3.0, 3.0))  # without a projection, fast to compile
COMPILED = {
    "a product": ([WEIGHTS["q @ k.transpose"]], SCALE),
    "a mask": ([closed_keys("masked_fill")], SCALE),
    "products": (
        [
            WEIGHTS[name]
            for name in ("torch.bmm", "torch.baddbmm", "einsum, tokens first", "k @ q.mT, permuted")
        ],
        UNIFORM,
    ),
    "masks shaped after the scores and computed from them": (
        [closed_keys("zeros_like"), masked_by_itself("topk threshold")],
        SCALE,
    ),
    "both ways": ([normalised_both_ways(-1)], UNIFORM),
    "ways": (
        [WEIGHTS[name] for name in ("mul_", "cast by softmax", "with a sink")],
        UNIFORM,
    ),
}


def check_compiled(model, run_compiled, scale):
    inputs = [*model.inputs()]
    _, plain = run(model, *inputs)
    with attach(model, scale) as hooks:
        _, eager = run(model, *inputs)
        for _ in range(2):
            hooks.forget()
            _, actual = run(run_compiled, *inputs)
            assert hooks.unseen() == [], "every compiled call must report"
    for i in range(len(model.ways)):
        one = [{side: g[side][i] for side in "01"} for g in (actual, eager, plain)]
        assert largest_error(*one[:2]) < 1e-10
        assert_far(one[1], one[2], "01")


@pytest.mark.parametrize(("ways", "scale"), COMPILED.values(), ids=COMPILED)
def test_compiled_in_one_graph_the_gradients_equal_eager_ones(ways, scale, compiled):
    model = Bare(*ways)
    check_compiled(model, compiled(model), scale)


@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*")
@pytest.mark.parametrize(
    ("weigh", "scale"),
    [("q @ k.transpose", SCALE), ("k @ q.mT over -2", UNIFORM)],
    ids=["a product", "reversed"],
)
def test_compiled_by_inductor(weigh, scale, compiled):
    model = Bare(WEIGHTS[weigh])
    check_compiled(model, compiled(model, "inductor"), scale)


def test_a_change_of_scale_acts_without_a_new_compilation(compiled):
    model = Bare(WEIGHTS["k @ q.mT over -2"])
    inputs = [*model.inputs()]
    with attach(model, SCALE) as hooks:
        run_compiled = compiled(model)
        run(run_compiled, *inputs)
        for factor in (3.0, 0.25, -1.0):
            hooks.groups[0].update(query=(factor, 0.5), key=(0.5, factor))
            _, eager = run(model, *inputs)
            with torch.compiler.set_stance("fail_on_recompile"):
                _, actual = run(run_compiled, *inputs)
            assert largest_error(actual, eager) < 1e-10


class Turned(nn.Module):
    """Attention that torch.compile hides from the tap: a property turns the scores."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(D, D))

    def forward(self, x):
        q, k = (project(x) for project in self.children())
        return (k @ q.mT).mT.softmax(-1) @ x


@pytest.mark.parametrize("names", [("q_proj", "k_proj"), ("theta", "phi")])
def test_what_is_lost_when_compiled_is_an_error_and_never_silent(names, compiled):
    model, x = nn.Sequential(Turned(*names)), tokens(width=D, dtype=torch.float32)
    scales = {"*": (3.0, 3.0)}
    with attach(model, scales) as hooks:
        model(x)
        assert hooks.sites[0].query_length == N, "seen in eager code"
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, scales=scales
    )

    def train():
        run(compiled(model, "eager"), x)
        optimizer.step()

    with pytest.raises((UnscaledLayerError, Unsupported), match="not scaled"):
        train()


class FlatRouter(nn.Module):
    """Attention, and a router on tokens without a batch dimension, its weight as a parameter."""

    def __init__(self, of):
        super().__init__()
        self.q_proj, self.k_proj, self.weight = (
            nn.Parameter(torch.randn(rows, D, dtype=torch.float64)) for rows in (D, D, 5)
        )
        self.of = of

    def forward(self, x, hook=None):
        q, k = x @ self.q_proj, x @ self.k_proj
        if hook is not None:
            q, k = hook(q, k)
        y = scores(q, k).softmax(-1)
        routed = torch.matmul(x.flatten(0, 1), self.of(self.weight)).softmax(-1)
        return torch.cat([y.flatten(), routed.flatten()])


FLAT = {
    "itself": lambda weight: weight.t(),
    "cast": lambda weight: weight.to(torch.float32).double().t(),
    "normalised": lambda weight: F.normalize(weight, dim=-1).t(),
}


@pytest.mark.parametrize("weight", FLAT.values(), ids=FLAT)
def test_the_weight_of_a_router_is_no_key(weight):
    check(FlatRouter(weight), tokens(width=D), names=["q_proj", "k_proj"])


def test_the_weight_of_a_router_is_no_key_when_compiled(compiled):
    model, x = nn.Sequential(FlatRouter(FLAT["itself"])), tokens(width=D)
    _, plain = run(model, x)
    with attach(model, UNIFORM):
        _, eager = run(model, x)
        _, actual = run(compiled(model, "eager"), x)
    assert largest_error(actual, eager) < 1e-10
    assert torch.equal(eager["0.weight"], plain["0.weight"])
    assert_far(eager, plain, ["q_proj", "k_proj"])


class BatchedRouter(nn.Module):
    """Attention, and routers with a weight for each head, which they change before they use it."""

    def __init__(self, *of):
        super().__init__()
        self.q_proj, self.k_proj, self.weight = (
            nn.Parameter(torch.randn(*shape, dtype=torch.float64))
            for shape in ((D, D), (D, D), (H, 5, D))
        )
        self.of = of

    def forward(self, x, hook=None):
        q, k = x @ self.q_proj, x @ self.k_proj
        if hook is not None:
            q, k = hook(q, k)
        branches = [scores(q, k).softmax(-1)]
        for of in self.of:
            weight = of(self.weight).transpose(-2, -1)
            branches.append(torch.matmul(x.unsqueeze(1), weight).softmax(-1))
        return torch.cat([branch.flatten() for branch in branches])


BATCHED = {
    "itself": lambda weight: weight,
    "normalised": lambda weight: F.normalize(weight, dim=-1),
    "divided by its norm": lambda weight: weight / weight.norm(dim=-1, keepdim=True),
    "cast": lambda weight: weight.to(torch.float32).double(),
    "doubled": lambda weight: weight * 2,
    "expanded": lambda weight: weight.expand(B, H, 5, D),
    "repeated": lambda weight: weight.repeat(B, 1, 1, 1),
    "one of its heads": lambda weight: weight[:1],
}


@pytest.mark.parametrize("weight", BATCHED.values(), ids=BATCHED)
def test_a_weight_for_each_head_is_no_key(weight):
    model, x = BatchedRouter(weight).double(), tokens(width=D)
    check(model, x, names=["q_proj", "k_proj"])
    _, plain = run(model, x)
    with attach(model, SCALE):
        _, actual = run(model, x)
    assert torch.equal(actual["weight"], plain["weight"])


def test_a_weight_for_each_head_is_no_key_when_compiled(compiled):
    model, x = nn.Sequential(BatchedRouter(*BATCHED.values())), tokens(width=D)
    _, plain = run(model, x)
    with attach(model, UNIFORM):
        _, eager = run(model, x)
        _, actual = run(compiled(model, "eager"), x)
    assert largest_error(actual, eager) < 1e-10
    assert torch.equal(eager["0.weight"], plain["0.weight"])
    assert largest_error({"": actual["0.weight"]}, {"": plain["0.weight"]}) < 1e-10
    assert_far(actual, plain, ["q_proj", "k_proj"])


def test_a_model_compiled_after_an_interrupted_forward_pass_is_scaled_once(compiled):
    def interrupt(module, args):
        raise KeyboardInterrupt

    model, x = nn.Sequential(ByHand(WEIGHTS["q @ k.transpose"])).double(), tokens()
    _, plain = run(model, x)
    with attach(model, UNIFORM) as hooks:
        _, expected = run(model, x)
        handle = model[0].out_proj.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
        run_compiled = compiled(model, "eager")
        for _ in range(2):
            hooks.forget()
            _, actual = run(run_compiled, x)
            assert largest_error(actual, expected) < 1e-10
            assert hooks.unseen() == []
        _, actual = run(model, x)
        assert largest_error(actual, expected) < 1e-10
    _, actual = run(model, x)
    assert all(torch.equal(actual[name], plain[name]) for name in plain)
    assert_far(expected, plain)


class OfABank(nn.Module):
    """Keys of what is no parameter and has no gradient, projected without a bias."""

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(H * D, H * D), nn.Linear(H * D, H * D, bias=False)
        self.register_buffer("bank", torch.randn(M, H * D))

    def forward(self, x, hook=None):
        q, k = (split(y) for y in (self.f(x), self.g(self.bank).expand(len(x), -1, -1)))
        if hook is not None:
            q, k = hook(q, k)
        return (q @ k.mT).softmax(-1)


def test_keys_made_of_a_constant_are_keys():
    check(OfABank().double(), tokens(), names=["f.weight", "g.weight"])


class Experts(nn.Module):
    """A mixture of experts with a softmax over the gates of each task."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(H * D, 3) for _ in range(2))
        self.experts = nn.ModuleList(nn.Linear(H * D, 8) for _ in range(3))

    def forward(self, x):
        x = x.mean(1)
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = [torch.bmm(gate(x).softmax(-1).unsqueeze(1), experts) for gate in self.gates]
        return torch.cat(mixed, -1)


def test_a_softmax_of_something_else_beside_a_product_makes_no_layer_attention():
    attention = ByHand(WEIGHTS["q @ k.mT"])
    model, (x, *_) = nn.Sequential(attention, Experts()).double(), both_inputs()
    with attach(model, {"*": (2.0, 0.5)}) as hooks:
        model(x).sum().backward()
        hooks.check()


@pytest.mark.parametrize("scales", [(2.0, 1.0), ([2.0] * H, 1.0)], ids=["one", "per head"])
def test_a_model_on_the_meta_device_runs_forward_and_backward(scales):
    with torch.device("meta"):
        model = ByHand(lambda q, k: (q @ k.mT).softmax(-1))
        x = torch.randn(B, N, H * D)
    with attach(model, {"*": scales}):
        model(x).sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
