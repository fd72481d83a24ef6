import pytest
import torch
from compare import assert_close
from models import Decoder, ScoreAttention, gradients, loss_of, tokens
from torch import nn
from torch.nn import functional as F

from spanopt import SpanScale, attach

pytestmark = pytest.mark.oldest

SCALES = {"query": (2.0, 0.5), "key": (3.0, 1.0)}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_the_oracles_with_grouped_queries_too(kv_heads, causal):
    model = ScoreAttention(16, 4, kv_heads, causal).double()
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    expected = gradients(model, model.reference(x, **SCALES).pow(3).sum())
    plain = gradients(model, model(x).pow(3).sum())
    with attach(model, SpanScale(**SCALES)):
        actual = gradients(model, model(x).pow(3).sum())
    assert_close(actual, expected)
    assert (plain["q_proj.weight"] - actual["q_proj.weight"]).abs().max() > 1e-3


def test_gradients_are_the_oracles_in_cross_attention():
    model = ScoreAttention().double()
    x, context = (torch.randn(3, n, 16, dtype=torch.float64, requires_grad=True) for n in (9, 5))
    expected = gradients(model, model.reference(x, context, **SCALES).pow(3).sum())
    inputs = {"x": x.grad, "context": context.grad}
    x.grad = context.grad = None
    with attach(model, SpanScale(**SCALES)):
        actual = gradients(model, model(x, context).pow(3).sum())
    assert_close(actual, expected)
    assert_close({"x": x.grad, "context": context.grad}, inputs)


def test_a_whole_decoder_passes_the_rescaled_gradients_on_to_earlier_layers():
    model, batch = Decoder(layers=3).double(), tokens()
    reference = {f"blocks.{i}.attn": SCALES for i in range(3)}
    expected = gradients(model, loss_of(model(batch, reference), batch))
    with attach(model, SpanScale(**SCALES)):
        actual = gradients(model, loss_of(model(batch), batch))
    assert_close(actual, expected)


def test_forward_values_are_bit_for_bit_unchanged_at_any_scale():
    model, batch = Decoder(), tokens()
    before = model(batch)
    for scale in ((2.0, 1.0), (0.0, 0.0), (-3.0, 100.0), (1.5, 1.5)):
        with attach(model, {"*": scale}):
            assert torch.equal(model(batch), before)


def test_per_head_values_scale_each_head_by_its_own():
    model = ScoreAttention(16, 4, 2).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    factors = [1.0, 2.0, 3.0, 4.0]
    with attach(model, SpanScale(query=(factors, 1.0), key=([2.0, 5.0], 1.0))):
        actual = gradients(model, model(x).pow(3).sum())["q_proj.weight"]
    for head, factor in enumerate(factors):
        expected = gradients(
            model, model.reference(x, query=(factor, 1.0), key=(1.0, 1.0)).pow(3).sum()
        )["q_proj.weight"]
        rows = slice(4 * head, 4 * head + 4)
        torch.testing.assert_close(actual[rows], expected[rows])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (SpanScale([1.0, 2.0, 3.0]), "3 per-head values on the query side, which has 4 heads"),
        (SpanScale([1.0] * 4), "4 per-head values on the key side, which has 2 heads"),
    ],
)
def test_a_wrong_number_of_per_head_values_is_an_error_at_the_first_forward(scale, message):
    model = ScoreAttention(16, 4, 2)
    with attach(model, scale), pytest.raises(ValueError, match=message):
        model(torch.randn(2, 9, 16))


def test_a_wrong_number_of_per_head_values_is_an_error_at_once_with_example_inputs():
    model = ScoreAttention(16, 4)
    with pytest.raises(ValueError, match="3 per-head values"):
        attach(model, SpanScale([1.0, 2.0, 3.0]), example_inputs=torch.randn(2, 9, 16))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_module_called_twice_is_scaled_on_each_calls_own_query_and_key():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = ScoreAttention()

        def forward(self, x):
            return self.attn(self.attn(x))

    model = Twice().double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    reference = model.attn.reference(model.attn.reference(x))
    expected = gradients(model, reference.pow(3).sum())
    with attach(model, SpanScale(2.0, 1.0)):
        assert_close(gradients(model, model(x).pow(3).sum()), expected)


def test_a_layer_inside_a_layer_is_scaled_once():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ScoreAttention()

        def forward(self, x):
            y = self.inner(x)
            q, k, v = (z.unsqueeze(1) for z in (x, y, y))
            return F.scaled_dot_product_attention(q, k, v).squeeze(1) + y

    model = Outer().double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)

    def inner_only(scale):
        with attach(model, {"inner": scale, "": None}):
            return gradients(model, model(x).pow(3).sum())

    with attach(model, {"": None, "inner": (2.0, 1.0)}) as hooks:
        assert [site.name for site in hooks.sites] == ["", "inner"]
    # The outer layer's tap is entered too; identity there must leave the inner scale alone.
    with attach(model, {"": (1.0, 1.0), "inner": (2.0, 1.0)}):
        both = gradients(model, model(x).pow(3).sum())
    assert_close(both, inner_only((2.0, 1.0)))
    # And a layer that is left alone stays so inside one that is scaled.
    with attach(model, {"": (3.0, 1.0), "inner": (1.0, 1.0)}):
        outer = gradients(model, model(x).pow(3).sum())
    with attach(model, {"": (3.0, 1.0), "inner": None}):
        assert_close(gradients(model, model(x).pow(3).sum()), outer)
    plain = gradients(model, model(x).pow(3).sum())
    assert (outer["inner.q_proj.weight"] - plain["inner.q_proj.weight"]).abs().max() > 1e-6


def test_nested_tensors_are_refused_by_name():
    class Nested(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    q = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)], requires_grad=True)
    model = nn.ModuleDict({"attn": Nested()})
    with (
        attach(model, SpanScale(2.0, 1.0)),
        pytest.raises(TypeError, match="layer 'attn': the query tensor must be"),
    ):
        model["attn"](q.transpose(1, 2) if q.dim() == 3 else q)


def test_changes_of_scale_act_from_the_next_forward_on():
    model, x = ScoreAttention().double(), torch.randn(2, 9, 16, dtype=torch.float64)
    with attach(model, {"*": (2.0, 1.0)}) as hooks:
        old = gradients(model, model(x).pow(3).sum())
        loss = model(x).pow(3).sum()
        hooks.groups[0]["parallel"] = 4.0
        pending = gradients(model, loss)
        new = gradients(model, model(x).pow(3).sum())
    assert_close(pending, old, 0)
    assert_close(new, gradients(model, model.reference(x, **_both(4.0)).pow(3).sum()))


def _both(parallel):
    return {"query": (parallel, 1.0), "key": (parallel, 1.0)}
