"""What is no attention by hand, or has no span, is refused by name."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spanopt import (
    SpanScale,
    UnscaledLayerError,
    attach,
)
from taps.softmax.softmax_forms import (
    SCALE,
    WEIGHTS,
    B,
    ByHand,
    D,
    H,
    M,
    N,
    Numbered,
    assert_far,
    both_inputs,
    check,
    run,
    scores,
    tokens,
)

KEYS, QUERIES = (
    torch.linspace(-1, 1, size**2, dtype=torch.float64).view(size, size) for size in (M, N)
)


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
