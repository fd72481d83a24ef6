"""Which queries are padding: those of self-attention, found by what Q and K were computed from."""

import pytest
import torch
from compare import assert_close
from models import gradients
from torch import nn
from torch.nn import functional as F

from spanopt import attach, token_mask
from tokens.token_forms import (
    EACH_TAP,
    HEADS,
    KINDS,
    LENGTH,
    SCALE,
    WIDTH,
    Attention,
    Model,
    alone,
    assert_differ,
    by_hand,
    everything,
    keys,
    normal,
    padding,
    run,
    sdpa,
    total,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch._prims_common.check.*",
    "ignore:.*enable_nested_tensor.*",
    "ignore:.*mismatched key_padding_mask and attn_mask.*",
)


# Whether queries are the same tokens as keys.


class Normed(Attention):
    def __init__(self, attend):
        super().__init__(attend)
        self.norm = nn.LayerNorm(WIDTH)

    def project(self, x, context):
        x = self.norm(x)
        return super().project(x, x)


class Adapted(Attention):
    """With low-rank adapters on the query."""

    def __init__(self, attend):
        super().__init__(attend)
        self.q_proj = nn.ModuleDict(
            {
                "base": nn.Linear(WIDTH, WIDTH),
                "a": nn.Sequential(nn.Dropout(0.0), nn.Linear(WIDTH, 2)),
                "b": nn.Linear(2, WIDTH),
            }
        )

    def project(self, x, context):
        q = self.q_proj["base"](x)
        q = q + 0.5 * self.q_proj["b"](self.q_proj["a"](x.to(q.dtype)))
        return q, self.k_proj(x), self.v_proj(x)


class Fused(Attention):
    def __init__(self, attend):
        super().__init__(attend)
        del self.q_proj, self.k_proj, self.v_proj
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def project(self, x, context):
        return self.qkv(x).chunk(3, dim=-1)


class Rotary(Attention):
    """Takes the angles of the positions, (B, N, d)."""

    def project(self, x, context, cos, sin):
        def rotate(x):
            a, b = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-b, a], dim=-1) * sin

        q, k, v = super().project(x, context)
        return rotate(q), rotate(k), v


class Positional(Attention):
    """Adds positions to queries and keys, not to values."""

    def project(self, x, context, cos, sin):
        q, k, _ = super().project(x + cos, context + cos)
        return q, k, self.v_proj(x)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x).copy_(x).mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Kernels(Attention):
    """Passes Q and K through a function with a backward of its own, and writes in place."""

    def project(self, x, context):
        q, k, v = super().project(x, context)
        k *= 2
        k[..., :2] = k[..., :2].tanh()
        return _Double.apply(q), _Double.apply(k), v


SELF_ATTENTION = {
    "norm": Normed,
    "adapter": Adapted,
    "fused": Fused,
    "rotary": Rotary,
    "positions": Positional,
    "kernels": Kernels,
}


@pytest.mark.parametrize("attend", [sdpa, by_hand], ids=["sdpa", "by hand"])
@pytest.mark.parametrize("layer", SELF_ATTENTION)
def test_padded_queries_are_recognised_by_what_q_and_k_were_computed_from(layer, attend):
    model = SELF_ATTENTION[layer](attend).double()
    x, real = normal(3, LENGTH, WIDTH), padding()
    angles = normal(3, LENGTH, WIDTH) if layer in ("rotary", "positions") else None

    def run(x, real, mask, angles):
        extras = () if angles is None else (angles.cos(), angles.sin())
        return gradients(model, model(x, mask, None, extras)[real].pow(3).sum())

    def without_padding(i):
        own = None if angles is None else angles[i : i + 1, real[i]]
        return run(x[i : i + 1, real[i]], slice(None), None, own)

    with attach(model, SCALE):
        expected = total(map(without_padding, range(3)))
        assert_close(run(x, real, keys(real), angles), expected)
        with token_mask({"": (everything(real), None)}):
            assert_differ(run(x, real, keys(real), angles), expected)


class Holding(Attention):
    """Is not handed its mask."""

    def forward(self, x):
        return super().forward(x, self.mask)


class Batch:
    def __init__(self, x, mask):
        self.x, self.mask = x, mask


class OfBatch(Attention):
    def forward(self, batch):
        return super().forward(batch.x, batch.mask)


@pytest.mark.parametrize("layer", [Holding, OfBatch])
def test_padded_queries_are_recognised_where_the_mask_is_no_argument(layer):
    model, x, real = layer().double(), normal(3, LENGTH, WIDTH), padding()

    def run(x, real, mask):
        model.mask = mask
        y = model(x) if layer is Holding else model(Batch(x, mask))
        return gradients(model, y[real].pow(3).sum())

    with attach(model, SCALE):
        expected = total(run(x[i : i + 1, real[i]], slice(None), None) for i in range(3))
        assert_close(run(x, real, keys(real)), expected)


class Prefixed(Attention):
    """Puts learned keys before those of the tokens."""

    def __init__(self, attend):
        super().__init__(attend)
        self.prefix = nn.Parameter(torch.randn(2, 3, WIDTH))

    def project(self, x, context):
        q, k, v = super().project(x, context)
        prefix = self.prefix[:, None].expand(-1, len(x), -1, -1)
        return q, torch.cat([prefix[0], k], dim=1), torch.cat([prefix[1], v], dim=1)


@pytest.mark.parametrize("attend", [sdpa, by_hand], ids=["sdpa", "by hand"])
def test_queries_beside_more_keys_are_padding_only_by_token_mask(attend):
    model, x, real = Prefixed(attend).double(), normal(3, LENGTH, WIDTH), padding()
    mask = F.pad(keys(real), (3, 0), value=True)
    with attach(model, SCALE):
        expected = alone(model, x, real)
        actual = run(model, real, x, mask)
        with token_mask({"": (real, None)}):
            assert_close(run(model, real, x, mask), expected)
        with token_mask({"": (everything(real), None)}):
            assert_close(run(model, real, x, mask), actual, 1e-12)
        assert_differ(actual, expected)


@pytest.mark.parametrize("kind", EACH_TAP)
def test_a_context_that_is_the_input_is_self_attention(kind):
    model, x, real = KINDS[kind]().double(), normal(3, LENGTH, WIDTH), padding()
    with attach(model, SCALE):
        expected = alone(model, x, real, keys)
        assert_close(run(model, real, x, keys(real), x), expected)


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
def test_positions_added_to_queries_and_keys_of_multihead_attention(batch_first):
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).double()
    nn.init.normal_(module.in_proj_bias)
    x, real = normal(3, LENGTH, WIDTH), padding()
    positions = normal(3, LENGTH, WIDTH)

    def run(x, positions, real, padded=None):
        q, x = (y if batch_first else y.transpose(0, 1) for y in (x + positions, x))
        y = module(q, q, x, key_padding_mask=padded)[0]
        return gradients(module, (y if batch_first else y.transpose(0, 1))[real].pow(3).sum())

    with attach(module, SCALE):
        expected = total(
            run(*(y[i : i + 1, real[i]] for y in (x, positions)), slice(None)) for i in range(3)
        )
        assert_close(run(x, positions, real, ~real), expected)


@pytest.mark.parametrize("length", [LENGTH, 6], ids=["as many queries as keys", "fewer queries"])
@pytest.mark.parametrize("kind", [*EACH_TAP, "where", "sdpa with grouped queries"])
def test_in_cross_attention_the_mask_tells_of_the_keys_alone(kind, length):
    model = Model(KINDS[kind]).double()
    x, context = normal(3, length, WIDTH), normal(3, LENGTH, WIDTH)
    real = padding()
    queries = padding(lengths=(5, 6, 1), length=length)
    with attach(model, SCALE):
        inputs = queries, x, keys(real), context
        expected = alone(model, x, everything(queries), keys, context, real)
        assert_close(run(model, everything(queries), *inputs[1:]), expected)
        expected = alone(model, x, queries, keys, context, real)
        assert_differ(run(model, *inputs), expected)  # nothing tells of the padded queries
        for masks in ((queries, None), (queries, real)):
            with token_mask({"layers.*.attn": masks}):
                assert_close(run(model, *inputs), expected)


@pytest.mark.parametrize("kind", ["sdpa", "masked_fill", "masked_fill with merged heads"])
def test_a_mask_that_closes_all_keys_to_a_query_tells_of_it_in_cross_attention_too(kind):
    model = Model(KINDS[kind]).double()
    x, context = normal(3, LENGTH, WIDTH), normal(3, LENGTH, WIDTH)
    queries, real = padding("left"), padding(lengths=(5, 10, 6))
    with attach(model, SCALE):
        expected = alone(model, x, queries, keys, context, real)
        mask = queries[:, None, :, None] & keys(real)
        assert_close(run(model, queries, x, mask, context), expected)


@pytest.mark.parametrize("kind", ["packed", "masked_fill"])
def test_cross_attention_compiled(kind, compiled):
    model = Model(KINDS[kind], 1).double()
    x, context, real = normal(3, LENGTH, WIDTH), normal(3, LENGTH, WIDTH), padding()
    with attach(model, SCALE):
        expected = alone(model, x, everything(real), keys, context, real)
        inputs = everything(real), x, keys(real), context
        assert_close(compiled(model, *inputs, backend="eager"), expected)
