"""Any chain of functions from a product to its softmax: the oracle's gradients, or an error.

A case is a list of functions, each in a layout of the scores. Some close keys, some open them
again, some change a view in place. Padding is what is closed to every query when the softmax is
taken; its values tell the oracle which keys these are.
"""

import pytest
import torch
from compare import largest_error
from hypothesis import given
from hypothesis import strategies as st
from oracle import rescaled
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.nn import functional as F
from torch.optim import SGD

from spanopt import SpanMonitor, SpanScaledOptimizer, UnscaledLayerError, attach
from taps.softmax.softmax_forms import (
    PADDED_KEYS,
    SCALE,
    SCALES,
    WINDOW,
    B,
    ByHand,
    H,
    M,
    N,
    both_inputs,
    check,
    merged,
    padded_oracle,
    run,
    scores,
    split,
)

# A layout is a way there, and a way back.
LAYOUTS = {
    "as it is": (lambda x: x, lambda x, like: x),
    "heads merged": (lambda x: x.flatten(0, 1), lambda x, like: x.unflatten(0, (B, H))),
    "viewed": (lambda x: x.reshape(B * H, *x.shape[2:]), lambda x, like: x.reshape(like.shape)),
    "turned": (lambda x: x.transpose(-2, -1), lambda x, like: x.transpose(2, 3)),
    "heads last": (lambda x: x.permute(0, 2, 3, 1), lambda x, like: x.permute(0, 3, 1, 2)),
    "heads first": (lambda x: x.transpose(0, 1), lambda x, like: x.transpose(0, 1)),
    "tokens first": (lambda x: x.permute(2, 3, 1, 0), lambda x, like: x.permute(3, 2, 0, 1)),
    "batch before": (lambda x: x.unsqueeze(0), lambda x, like: x.squeeze(0)),
    "by rows": (lambda x: x.unflatten(2, (-1, 1)), lambda x, like: x.flatten(2, 3)),
}


def number(x, closed, value):
    return torch.zeros(x.shape, dtype=x.dtype).masked_fill(closed, value)


def into_the_mask(x, closed):
    mask = number(x, closed, -1e9)
    mask += x
    return mask


def set_items(x, index, value):
    x[index] = value
    return x


def unused(changed, x):
    """Scores that were changed by way of another tensor, whose value is not used."""
    return x


LOWEST = torch.tensor(-1e10, dtype=torch.float64)


# Each takes scores and a mask of the same shape that is true at padded keys.
CLOSING = {
    "masked_fill": lambda x, closed: x.masked_fill(closed, -1e9),
    "masked_fill_": lambda x, closed: x.masked_fill_(closed, -1e9),
    "where": lambda x, closed: torch.where(closed, -1e9, x),
    "add": lambda x, closed: x + number(x, closed, -1e9),
    "add a boolean": lambda x, closed: torch.add(x, closed, alpha=-1e9),
    "add, x2": lambda x, closed: torch.add(x, x2=number(x, closed, -1e9)),
    "iadd": lambda x, closed: x.add_(number(x, closed, -1e9)),
    "into the mask": into_the_mask,
    "sub": lambda x, closed: x - number(x, closed, 1e9),
    "from the mask": lambda x, closed: number(x, closed, -1e9) - (-x),
    "minimum": lambda x, closed: torch.minimum(x, number(x, ~closed, 2e9) - 1e9),
    "clamp": lambda x, closed: x.clamp(max=number(x, ~closed, 2e9) - 1e9),
    "setitem": lambda x, closed: set_items(x, closed, -1e9),
    "setitem of a tensor": lambda x, closed: set_items(
        x, (..., closed), torch.tensor(-1e9).double()
    ),
}
# A bias that closes nothing, unless the scores are multiplied by 100 later.
WEAK = {
    "add": lambda x, closed: x + number(x, closed, -1e3),
    "sub": lambda x, closed: x - number(x, closed, 1e3),
    "iadd": lambda x, closed: x.add_(number(x, closed, -1e3)),
    "into the mask": lambda x, closed: number(x, closed, -1e3).add_(x),
    "masked_fill": lambda x, closed: x.masked_fill(closed, -1e3),
    "where": lambda x, closed: torch.where(closed, number(x, closed, -1e3), x),
    "setitem": lambda x, closed: set_items(x, closed, -1e3),
    "minimum": lambda x, closed: torch.minimum(x, number(x, ~closed, 2e3) - 1e3),
    "add, alpha": lambda x, closed: x.add(number(x, closed, -2e3), alpha=0.5),
}
NEUTRAL = {
    "times 2": lambda x, closed: x * 2,
    "times 100": lambda x, closed: x * 100.0,
    "times 100 of each head": lambda x, closed: x * torch.full(x.shape[1:], 100.0).double(),
    "over 1e8": lambda x, closed: x / 1e8,
    "over 1e8 of a tensor": lambda x, closed: x.div_(torch.tensor(1e8)),
    "over 3 in place": lambda x, closed: x.div_(3.0),
    "times each head's": lambda x, closed: x * torch.full(x.shape, 1.5, dtype=x.dtype),
    "bias": lambda x, closed: x + torch.linspace(-1, 1, x.numel()).view(x.shape),
    "negated": lambda x, closed: -x,
    "times -1": lambda x, closed: x * -1.0,
    "from 0": lambda x, closed: 0 - x,
    "tanh": lambda x, closed: torch.tanh(x),
    "relu": lambda x, closed: F.relu(x),
    "leaky_relu": lambda x, closed: F.leaky_relu(x, 1e-9),
    "abs": lambda x, closed: x.abs(),
    "clamp": lambda x, closed: x.clamp(-5, 5),
    "clamp below": lambda x, closed: x.clamp(min=-1e10),
    "maximum": lambda x, closed: torch.maximum(x, torch.tensor(-5.0).double()),
    "maximum of the lowest": lambda x, closed: torch.max(x, LOWEST),
    "nan_to_num": lambda x, closed: x.nan_to_num(neginf=-5.0),
    "opened by 0": lambda x, closed: x.masked_fill(closed, 0.0),
    "opened by where": lambda x, closed: x.where(~closed, torch.zeros_like(x)),
    "opened by a product": lambda x, closed: x * ~closed,
    "opened by items": lambda x, closed: set_items(x, closed, 0.5),
    "window": lambda x, closed: x - 0.5 * closed,
    "dropout": lambda x, closed: F.dropout(x, 0.0),
    "maximum subtracted": lambda x, closed: x - x.detach().max(),
    "cast": lambda x, closed: x.float().double(),
    "contiguous": lambda x, closed: x.contiguous(),
    "sign times abs": lambda x, closed: x.sign() * x.abs(),
    "itself added": lambda x, closed: x + x * 0.5,
}
OTHER = {
    "index_fill_": lambda x, closed: x.index_fill_(-1, torch.tensor([0]), -1e9),
    "of a view": lambda x, closed: unused(x.view_as(x).masked_fill_(closed, -1e9), x),
    "of a slice": lambda x, closed: unused(x[..., 1:].masked_fill_(closed[..., 1:], -1e9), x),
    "of its data": lambda x, closed: unused(x.data.masked_fill_(closed, -1e9), x),
    "of detached": lambda x, closed: unused(x.detach().masked_fill_(closed, -1e9), x),
    "masked_scatter_": lambda x, closed: x.masked_scatter_(closed, torch.full_like(x, -1e9)),
    "addcmul_": lambda x, closed: x.addcmul_(closed.to(x.dtype), torch.tensor(-1e9).double()),
    "inplace of a view": lambda x, closed: unused(F.relu(x.view_as(x), inplace=True), x),
    "inplace, unknown": lambda x, closed: F.hardtanh(x, -5.0, 5.0, True),
    "items of a slice": lambda x, closed: set_items(x, (..., slice(0, 1)), -1e9),
    "items of scores": lambda x, closed: set_items(x, (...,), x.clone().masked_fill(closed, -1e9)),
    "slice doubled": lambda x, closed: unused(x[..., :1].mul_(2.0), x),
    "cumsum_": lambda x, closed: x.cumsum_(-1),
    "flip": lambda x, closed: x.flip(-1),
}
FUNCTIONS = {
    **{f"closing: {name}": change for name, change in CLOSING.items()},
    **{f"weak: {name}": change for name, change in WEAK.items()},
    **NEUTRAL,
    **OTHER,
}
JOINED = {
    "keys behind": (-1, False),
    "keys before": (-1, True),
    "queries behind": (-2, False),
    "queries before": (-2, True),
    "heads": (1, True),
    "sequences": (0, False),
}
PRODUCTS = {
    "matmul": lambda q, k: scores(q, k),
    "turned": lambda q, k: scores(k, q).mT,
    "bmm": lambda q, k: split(torch.bmm(merged(q), merged(k).mT)),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->hbij", q, k).transpose(0, 1),
    "of two": lambda q, k: scores(q, k) + 0.5 * scores(k, q).transpose(2, 3),
    "baddbmm of two": lambda q, k: split(
        torch.baddbmm(merged(scores(q, k)), merged(q), merged(k).mT)
    ),
}
STEPS = st.one_of(
    st.tuples(st.sampled_from(sorted(FUNCTIONS)), st.sampled_from(sorted(LAYOUTS))),
    st.tuples(st.sampled_from(sorted(f"closing: {name}" for name in CLOSING)), st.just("as it is")),
    st.tuples(st.just("join"), st.sampled_from(sorted(JOINED))),
)
CHAINS = st.tuples(st.sampled_from(sorted(PRODUCTS)), st.lists(STEPS, min_size=1, max_size=5))


class Chain:
    """Weights by a chain, which keeps the scores of its last softmax."""

    def __init__(self, product, steps):
        self.product, self.steps = product, steps

    def __call__(self, q, k):
        x = PRODUCTS[self.product](q, k)
        closed = PADDED_KEYS.expand(B, H, N, M)
        cut = [slice(None)] * 4
        for name, way in self.steps:
            if name == "join":
                dim, before = JOINED[way]
                size = [*x.shape]
                size[dim] = 2
                more = torch.full(size, 0.25, dtype=x.dtype), torch.zeros(size, dtype=torch.bool)
                pairs = zip(more, (x, closed), strict=True)
                x, closed = (torch.cat(pair if before else pair[::-1], dim=dim) for pair in pairs)
                old = cut[dim]
                start, stop = (old.start or 0, old.stop or x.shape[dim] - 2)
                cut[dim] = slice(start + 2 * before, stop + 2 * before)
                continue
            there, back = LAYOUTS[way]
            x = back(FUNCTIONS[name](there(x), there(closed)), x)
        weights = x.softmax(-1)
        self.last = x.detach()[tuple(cut)]
        self.closed = closed[tuple(cut)]
        return weights[tuple(cut)]

    def hook(self, x, scale, is_key):
        """An oracle that reads at the backward pass which keys no query can see."""
        x = x * 1.0

        def of(grad):
            real = (self.last > -9e3).any(1).any(1)[:, None] if is_key else torch.tensor(True)
            values = grad.numpy(), x.detach().numpy()
            return torch.as_tensor(rescaled(*values, *scale, mask=real.numpy()))

        x.register_hook(of)
        return x


def outcome(product, steps, compiled=lambda model: model):
    """Return "right" or "refused", or fail. ``None`` where the chain itself does not run."""
    torch.manual_seed(0)
    chain = Chain(product, steps)
    model, inputs = ByHand(chain).double(), both_inputs()

    def hook(q, k):
        return chain.hook(q, SCALES["query"], False), chain.hook(k, SCALES["key"], True)

    try:
        _, expected = run(model, *inputs, hook=hook)
    except (RuntimeError, IndexError):
        return None
    if not all(value.isfinite().all() for value in expected.values()):
        return None
    in_between = (chain.last > -9e3) & (chain.last < -90) & chain.closed
    if in_between.any() and len(steps) > 1:
        return None  # what closed keys may have become a bias, or the reverse
    with attach(model, SCALE) as hooks:
        try:
            _, actual = run(compiled(model), *inputs)
            hooks.check()
        except (UnscaledLayerError, ValueError):
            return "refused"
    assert largest_error(actual, expected) <= 1e-6, (product, steps)
    return "right"


@given(CHAINS)
def test_a_chain_of_functions_is_followed_rightly_or_refused(case):
    outcome(*case)


AS_IT_IS = "as it is"
# What was scaled by the wrong span, without a word, and how it ends now.
ENDS = {
    "right": [
        [("closing: into the mask", AS_IT_IS)],
        [("closing: from the mask", AS_IT_IS)],
        [("closing: add a boolean", AS_IT_IS)],
        [("closing: add, x2", AS_IT_IS)],
        [("closing: minimum", AS_IT_IS)],
        [("closing: clamp", AS_IT_IS)],
        [("closing: setitem of a tensor", AS_IT_IS)],
        [("closing: masked_fill", "heads first")],
        [("closing: masked_fill", "batch before")],
        [("join", "keys before"), ("closing: masked_fill", AS_IT_IS)],
        [("join", "keys before"), ("join", "keys behind"), ("closing: add", "turned")],
        [("join", "queries before"), ("closing: where", AS_IT_IS)],
        [("join", "keys before"), ("window", AS_IT_IS), ("closing: iadd", AS_IT_IS)],
        *([(f"weak: {name}", AS_IT_IS), ("times 100", AS_IT_IS)] for name in WEAK),
        [("weak: add", "heads first"), ("times 100", "turned")],
        [("weak: add", AS_IT_IS), ("times 100 of each head", AS_IT_IS)],
        [("join", "keys before"), ("weak: masked_fill", "viewed"), ("times 100", "by rows")],
    ],
    "refused": [
        *([(name, AS_IT_IS)] for name in OTHER),
        [("closing: masked_fill_", AS_IT_IS), ("of a view", AS_IT_IS)],
        [("join", "heads"), ("closing: masked_fill", AS_IT_IS)],
        [("join", "sequences"), ("closing: masked_fill", AS_IT_IS)],
        *(
            [("closing: masked_fill", AS_IT_IS), (name, AS_IT_IS)]
            for name in NEUTRAL
            if name.startswith(("opened", "over 1e8"))
            or name in ("tanh", "relu", "leaky_relu", "abs", "clamp", "maximum", "nan_to_num")
        ),
        *(
            [("negated", AS_IT_IS), ("bias", AS_IT_IS), (name, AS_IT_IS)]
            for name in ("negated", "times -1", "from 0")
        ),
    ],
}


@pytest.mark.parametrize(
    ("steps", "end"), [(steps, end) for end, cases in ENDS.items() for steps in cases], ids=str
)
def test_what_was_scaled_by_the_wrong_span(steps, end):
    assert outcome("matmul", steps) == end


@pytest.mark.parametrize(
    "name",
    [
        "of a view",
        "index_fill_",
        "inplace of a view",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("of a slice", "cumsum_")),
    ],
)
def test_compiled_scores_that_another_tensor_changes_are_lost_as_well(name, compiled):
    with pytest.raises(Unsupported, match="UnscaledLayerError"):  # raised while Dynamo traces
        outcome("matmul", [(name, AS_IT_IS)], compiled)


@pytest.mark.parametrize("name", ["add", "masked_fill"])
def test_compiled_scores_whose_mask_a_later_factor_makes(name, compiled):
    steps = [(f"weak: {name}", AS_IT_IS), ("times 100", "viewed")]
    assert outcome("matmul", steps, compiled) == "right"


@pytest.mark.parametrize("way", ["batch before", "viewed", "by rows"])
def test_compiled_masks_are_read_in_every_layout(way, compiled):
    assert outcome("matmul", [("closing: masked_fill", way)], compiled) == "right"


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("index_fill_", "index_fill_"),
        ("of a view", "a change of it in place"),
        ("of its data", "a change of its data"),
        ("items of scores", "an assignment"),
        ("join", "cat"),
    ],
)
def test_the_error_names_the_change_at_which_scores_were_lost(name, operation):
    model = ByHand(Chain("matmul", [(name, "heads" if name == "join" else AS_IT_IS)])).double()
    with attach(model, SCALE) as hooks:

        def step():
            model(*both_inputs()).sum().backward()
            hooks.check()

        with pytest.raises(UnscaledLayerError, match=f"at {operation}"):
            step()


def test_signs_of_masked_scores_leave_other_scores_with_the_gradient():
    def weigh(q, k):
        x = scores(q, k)
        sign = x.masked_fill(WINDOW, -1.0).sign() + 0.0
        return (sign * x.abs()).softmax(-1)

    check(ByHand(weigh).double(), *both_inputs())


class Chosen(nn.Module):
    """Each query sees the keys with its highest scores, but no padded one."""

    def __init__(self):
        super().__init__()
        self.attn = ByHand(None)

    def forward(self, x, context, attention_mask, hook=None):
        def weigh(q, k):
            x = scores(q, k)
            few = x < x.detach().topk(3, -1).values[..., -1:]
            return x.masked_fill(few | ~attention_mask[:, None, None], -1e9).softmax(-1)

        self.attn.weigh = weigh
        return self.attn(x, context, hook=hook)


def test_of_keys_that_scores_choose_the_models_mask_tells_which_are_padding():
    real = ~PADDED_KEYS[:, 0, 0]
    hook = padded_oracle(True, real[:, None].numpy())
    check(Chosen().double(), *both_inputs(), attention_mask=real, hook=hook)
    check(Chosen().double(), *both_inputs(), attention_mask=torch.ones_like(real))


class Layered(nn.Module):
    def __init__(self, weigh):
        super().__init__()
        self.attn = ByHand(weigh)

    def forward(self, x, context):
        return self.attn(x, context)


def entropies(weigh):
    torch.manual_seed(0)
    model = Layered(weigh).double()
    optimizer = SpanScaledOptimizer(SGD(model.parameters(), lr=0.0), model, SCALE)
    with SpanMonitor(optimizer) as monitor:
        model(*both_inputs()).sum().backward()
        optimizer.step()
    assert all(row["problem"] is None for row in monitor.rows)
    return [row["entropy"] for row in monitor.rows if row["side"] == "query"]


@pytest.mark.parametrize("layout", ["heads first", "keys first", "queries before"])
def test_the_monitor_measures_the_weights_of_the_product_in_every_layout(layout):
    def weigh(q, k):
        x = scores(q, k)
        if layout == "heads first":
            return x.transpose(0, 1).softmax(-1).transpose(0, 1)
        if layout == "keys first":
            return x.permute(3, 2, 1, 0).softmax(0).permute(3, 2, 1, 0)
        return torch.cat([torch.zeros_like(x[:, :, :2]), x], dim=2).softmax(-1)[:, :, 2:]

    expected = entropies(lambda q, k: scores(q, k).softmax(-1))
    assert entropies(weigh) == pytest.approx(expected)
    assert max(expected) > 1
