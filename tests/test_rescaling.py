"""What turns g into g': modes, and factors that are not finite in the dtype of the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spanopt import SpanScale, attach, span_node
from spanopt.rescaling import Rescaling, unfit_dtypes

CPU = torch.device("cpu")


class Attention(nn.Module):
    def __init__(self, tap):
        super().__init__()
        self.tap = tap
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        q, k = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (self.q_proj(x), self.k_proj(x)))
        if self.tap == "score":
            return F.scaled_dot_product_attention(q, k, k)
        return (q @ k.mT).softmax(-1) @ k


def model_of(tap):
    if tap == "packed":
        return nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), "self_attn", {}
    fields = {"query": "q_proj", "key": "k_proj", "num_heads": 2}
    options = {"qk_modules": {"attn": fields}} if tap == "projection" else {}
    model = nn.Sequential()
    model.add_module("attn", Attention(tap))
    return model, "attn", options


@pytest.mark.parametrize(
    ("factors", "mode"),
    [
        ((1.0, 1.0), "identity"),
        ((2.0, 2.0), "uniform"),
        ((0.0, 0.0), "uniform"),
        ((2.0, 0.0), "parallel"),
        ((2.0, 1.0), "general"),
        (((2.0, 1.0), 1.0), "general"),
    ],
)
def test_the_mode_is_the_least_that_does_it(factors, mode):
    rescaling = Rescaling().with_numbers(factors, CPU)
    assert rescaling.mode == mode
    assert rescaling.projects() == (mode in ("parallel", "general"))
    assert Rescaling().with_numbers(factors, CPU, held=True).mode == "general"


def test_a_rescaling_survives_its_flat_form():
    rescaling = Rescaling(ridge=1e-3, preserve_norm=True).with_numbers((1e300, 1.0), CPU)
    again = Rescaling.unpack(rescaling.pack())
    assert vars(again) == vars(rescaling)


@pytest.mark.parametrize(
    ("factors", "unfit"),
    [
        ((2.0, 1.0), []),
        ((65504.0, 1.0), []),
        ((65505.0, 1.0), [torch.float16]),
        ((1.0, -1e38), [torch.float16]),
        ((1.0, (2.0, 1e39)), [torch.float16, torch.bfloat16, torch.float32]),
        ((3e38, -3e38), [torch.float16, torch.bfloat16, torch.float32]),  # their difference
        ((1.7e308, -1.7e308), [torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    ],
)
def test_the_dtypes_in_which_a_factor_is_not_finite_are_known(factors, unfit):
    assert [dtype for dtype, _ in unfit_dtypes(factors)] == unfit


@pytest.mark.parametrize("tap", ["score", "softmax", "packed", "projection"])
def test_a_factor_that_is_not_finite_in_the_models_dtype_is_refused_when_it_is_set(tap):
    model, name, options = model_of(tap)
    message = rf"layer '{name}', query side: parallel = 1e\+308 is not finite in torch.float32"
    with pytest.raises(ValueError, match=message):
        attach(model, SpanScale(1e308), **options)
    with attach(model, SpanScale(2.0), **options) as hooks:
        with pytest.raises(ValueError, match=message):
            hooks.groups[0]["parallel"] = 1e308
        assert hooks.groups[0]["parallel"] == 2.0
    with attach(model.half(), SpanScale(2.0), **options) as hooks:
        with pytest.raises(ValueError, match=r"key side: violation = 100000.0 .*torch.float16"):
            hooks.groups[0]["key"] = (1.0, 1e5)
    with attach(model.double(), SpanScale(1e300), **options):
        pass


@pytest.mark.parametrize("factors", [(1e5, 1.0), (1e5, 1e5)], ids=["projected", "uniform"])
@pytest.mark.parametrize("tap", ["score", "softmax", "packed", "projection"])
def test_a_factor_that_is_not_finite_under_autocast_is_refused_in_the_forward_pass(tap, factors):
    model, name, options = model_of(tap)
    with attach(model, SpanScale(*factors), **options):
        model(torch.randn(2, 3, 8))
        with (
            torch.autocast("cpu", dtype=torch.float16),
            pytest.raises(ValueError, match=f"layer '{name}'.*not finite in torch.float16"),
        ):
            model(torch.randn(2, 3, 8))


def test_a_node_refuses_numbers_that_are_not_finite_in_its_dtype():
    q = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"span_node: parallel = 1e\+308 is not finite"):
        span_node(q, 1e308, 1.0)
    span_node(q.double(), 1e300, 1.0)
