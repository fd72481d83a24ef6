"""Attention functions that the library does not know, declared from this one file."""

import pytest
import torch
from models import ScoreAttention, gradients
from torch import nn
from torch.nn import functional as F

from spanopt import SpanScale, UnscaledLayerError, attach, find_attention
from spanopt.declarations import declared, withdraw
from spanopt.inspection import inspect_model
from spanopt.taps import register

SCALE = SpanScale(query=(2.0, 0.5), key=(3.0, 1.0))


@torch.library.custom_op("spanopt_tests::toy_attention", mutates_args=())
def toy_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _backward(ctx, grad):
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        y = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
    return torch.autograd.grad(y, inputs, grad)


toy_attention.register_fake(lambda q, k, v: torch.empty_like(q))
toy_attention.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def flash_attention(q, k, v):
    """Stands for a kernel with tokens before heads, in a function that no mode sees."""
    with torch._C.DisableTorchFunction():
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return y.transpose(1, 2)


kernels = {"flash_attention": flash_attention}


class Toy(ScoreAttention):
    def forward(self, x):
        q, k, v = self.project(x)
        return self.out_proj(toy_attention(q, k, v).transpose(1, 2).flatten(-2))


class Packet(ScoreAttention):
    def forward(self, x):
        q, k, v = self.project(x)
        y = torch.ops.spanopt_tests.toy_attention(q, k=k, v=v)
        return self.out_proj(y.transpose(1, 2).flatten(-2))


class Flash(ScoreAttention):
    def forward(self, x):
        q, k, v = (x.transpose(1, 2) for x in self.project(x))
        return self.out_proj(kernels["flash_attention"](q, k, v).flatten(-2))


LAYERS = {
    "operator": (Toy, toy_attention, {}),
    "packet": (Packet, torch.ops.spanopt_tests.toy_attention, {}),
    "function": (Flash, flash_attention, {"tokens_first": True}),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    """Return the class of a layer whose attention function is declared."""
    cls, function, options = LAYERS[request.param]
    kernels["flash_attention"] = flash_attention
    kernels["flash_attention"] = seen = register(function, "toy", **options)
    if cls is not Flash:
        assert seen is function
    yield cls
    withdraw("toy")


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_declared_function_is_scaled(layer, kv_heads, mode):
    model = nn.Sequential(layer(kv_heads=kv_heads, causal=False)).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    scales = {"query": SCALE.query, "key": SCALE.key}
    if kv_heads == 4:
        expected = gradients(model, model[0].reference(x, **scales).pow(3).sum())
    plain = gradients(model, model(x).pow(3).sum())
    with attach(model, SCALE) as hooks:
        eager = gradients(model, model(x).pow(3).sum())
        run = model
        if mode == "compiled":
            torch.compiler.reset()
            run = torch.compile(model, fullgraph=True, backend="aot_eager")
        hooks.forget()
        actual = gradients(model, run(x).pow(3).sum())
        assert hooks.unseen() == []
        assert (hooks.sites[0].tap, hooks.sites[0].kv_heads) == ("toy", kv_heads)
        assert "toy: in the call of" in str(hooks)
    for name, value in eager.items():
        torch.testing.assert_close(actual[name], value)
        if kv_heads == 4:
            torch.testing.assert_close(value, expected[name])
    assert not torch.allclose(plain["0.q_proj.weight"], eager["0.q_proj.weight"])


def test_sites_and_inspection_know_a_declared_function(layer):
    model = nn.Sequential(layer(), nn.Linear(16, 16))
    (site,) = find_attention(model)
    assert (site.name, site.certain) == ("0", True)
    report = inspect_model(model, torch.randn(2, 5, 16))
    assert "toy" in str(report)


def test_without_a_declaration_it_is_an_error():
    kernels["flash_attention"] = flash_attention
    for cls in (Toy, Flash):
        with pytest.raises(UnscaledLayerError, match="called no attention"):
            attach(nn.Sequential(cls()), SCALE, example_inputs=torch.randn(2, 5, 16))


def test_a_bad_declaration_changes_nothing():
    before = dict(declared)
    for function, name, options, message in (
        (flash_attention, "score", {}, "its name is taken"),
        (F.multi_head_attention_forward, "mine", {"query": "query", "key": "key"}, "handled"),
        (flash_attention, "mine", {"query": "queries"}, "no argument 'queries'; it has q, k, v"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            register(function, name, **options)
    assert declared == before


@pytest.mark.parametrize("layer", ["function"], indirect=True)
def test_packed_sequences_are_refused(layer):
    class Varlen(layer):
        def forward(self, x):
            q, k, v = (y.transpose(1, 2).flatten(0, 1) for y in self.project(x))
            return kernels["flash_attention"](q, k, v)

    with attach(Varlen(), SCALE) as hooks, pytest.raises(ValueError, match="4 dimensions"):
        hooks.sites[0].module(torch.randn(2, 5, 16))


def test_the_error_about_a_layer_without_attention_names_registered_functions():
    class Recurrent(ScoreAttention):
        def forward(self, x):
            q, k, v = self.project(x)
            return self.out_proj((q * k * v).cumsum(-2).transpose(1, 2).flatten(-2))

    register(flash_attention, "flash for an error")
    model = Recurrent()
    try:
        with attach(model, {"": SCALE}), pytest.raises(UnscaledLayerError) as raised:
            model(torch.randn(2, 5, 16))
        assert "nor flash_attention, and it took no softmax" in str(raised.value)
    finally:
        withdraw("flash for an error")
