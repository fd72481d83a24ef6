"""Interrupted forward passes, and models of others that run inside a layer."""

import copy
import signal

import pytest
import torch
from compare import assert_same as assert_equal
from models import Decoder, ScoreAttention, gradients, loss_of, tokens
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spanopt import SpanScale, UnscaledLayerError, attach

SCALE = SpanScale(2.0, 0.5)


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """Have Ctrl-C interrupt also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    with attach(ScoreAttention(), SCALE) as hooks:  # takes off what an interrupt has left
        hooks.sites[0].module(torch.randn(1, 2, 16))


class ByHand(ScoreAttention):
    def forward(self, x):
        q, k, v = self.project(x)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(-2))


class Packed(nn.MultiheadAttention):
    def __init__(self, width, heads):
        super().__init__(width, heads, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


LAYERS = {"score": ScoreAttention, "packed": Packed, "softmax": ByHand}


def ctrl_c(*args):
    signal.raise_signal(signal.SIGINT)


def interrupt(model, batch, at="v_proj"):
    """Press Ctrl-C in a forward pass, and keep the exception, as a notebook does."""
    module = model.blocks[0]["attn"]
    module = getattr(module, at) if hasattr(module, "q_proj") else module
    handle = module.register_forward_pre_hook(ctrl_c)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            model(batch)
    finally:
        handle.remove()
    return caught


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "reset",
    [pytest.param(False, id=""), pytest.param(True, id="reset", marks=pytest.mark.long)],
)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_after_an_interrupt_a_model_that_is_compiled_next_is_not_scaled(layer, reset):
    model, batch = Decoder(attention=layer, layers=1).double(), tokens()
    control = copy.deepcopy(model)
    plain = gradients(control, loss_of(control(batch), batch))
    with attach(model, SCALE):
        scaled = gradients(model, loss_of(model(batch), batch))
        kept = interrupt(model, batch)
        if reset:  # which takes the compiler's callbacks off
            torch.compiler.reset()
        run = compiled(control)
        assert_equal(gradients(control, loss_of(run(batch), batch)), plain)
        assert_equal(gradients(model, loss_of(model(batch), batch)), scaled)
        assert_equal(gradients(control, loss_of(run(batch), batch)), plain)
        assert_equal(gradients(model, loss_of(compiled(model)(batch), batch)), scaled)
    assert (scaled["embed.weight"] - plain["embed.weight"]).abs().max() > 1e-6
    assert kept.value is not None


def test_a_compiled_function_is_not_scaled_after_an_interrupt():
    batch = tokens()
    model = Decoder(layers=1).double()
    q, k, v = (torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def gradient(attend):
        return torch.autograd.grad(attend(q, k, v).pow(3).sum(), q)[0]

    with attach(model, SCALE):
        interrupt(model, batch)
        attend = compiled(lambda *x: F.scaled_dot_product_attention(*x))
        torch.testing.assert_close(gradient(attend), gradient(F.scaled_dot_product_attention))


class Calling(ScoreAttention):
    """Calls compiled code for its attention, and is not compiled itself."""

    attend = None
    fail = False

    def forward(self, x):
        q, k, v = self.project(x)
        y = self.attend(q, k, v)
        if self.fail:
            ctrl_c()
        return self.out_proj(y.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("first", ["layer", "interrupted", "other"])
def test_code_compiled_for_a_layer_is_not_run_scaled_for_others_after_an_interrupt(first):
    attend = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    model, x = Calling().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    other = copy.deepcopy(model)
    model.attend = other.attend = F.scaled_dot_product_attention
    plain = gradients(other, other(x).pow(3).sum())
    with attach(model, SCALE) as hooks:
        scaled = gradients(model, model(x).pow(3).sum())
        model.attend = other.attend = attend
        for turn in range(3):
            if turn or first == "layer":
                assert_equal(gradients(model, model(x).pow(3).sum()), scaled)
            if turn or first == "other":
                assert_equal(gradients(other, other(x).pow(3).sum()), plain)
            model.fail = True
            with pytest.raises(KeyboardInterrupt):
                model(x)
            model.fail = False
            q = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
            with torch._C.DisableTorchFunction():
                expected = F.scaled_dot_product_attention(q, q, q).pow(3).sum()
            (actual,) = torch.autograd.grad(attend(q, q, q).pow(3).sum(), q)
            torch.testing.assert_close(actual, torch.autograd.grad(expected, q)[0])
        hooks.forget()
        assert_equal(gradients(model, model(x).pow(3).sum()), scaled)
        assert hooks.unseen() == []


class Breaking(ScoreAttention):
    """Has a graph break, at which it may be interrupted."""

    error = None

    def forward(self, x):
        self.pause(x)
        return super().forward(x)

    @torch.compiler.disable
    def pause(self, x):
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_at_a_graph_break_leaves_the_next_compiled_model_alone(error):
    model, batch = Decoder(attention=Breaking, layers=1).double(), tokens()
    control = copy.deepcopy(model)
    plain = gradients(control, loss_of(control(batch), batch))
    with attach(model, SCALE) as hooks:
        scaled = gradients(model, loss_of(model(batch), batch))
        run, run_control = (torch.compile(m, backend="aot_eager") for m in (model, control))
        assert_equal(gradients(model, loss_of(run(batch), batch)), scaled)
        for _ in range(2):
            model.blocks[0]["attn"].error = error
            with pytest.raises(error):
                run(batch)
            model.blocks[0]["attn"].error = None
            assert_equal(gradients(control, loss_of(run_control(batch), batch)), plain)
            hooks.forget()
            assert_equal(gradients(model, loss_of(run(batch), batch)), scaled)
            assert hooks.unseen() == []
            assert_equal(gradients(control, loss_of(run_control(batch), batch)), plain)


def test_a_layer_that_goes_on_after_an_interrupt_inside_it_is_scaled():
    class Stubborn(ScoreAttention):
        def __init__(self):
            super().__init__()
            self.inner = ScoreAttention()

        def forward(self, x):
            try:
                self.inner(x)
            except KeyboardInterrupt:
                return super().forward(x)

    model, x = Stubborn().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    expected = gradients(model, model.reference(x).pow(3).sum())
    model.inner.out_proj.register_forward_pre_hook(ctrl_c)
    with attach(model, {"": (2.0, 1.0), "inner": (5.0, 5.0)}, on_missing="ignore") as hooks:
        for run in (model, model, torch.compile(model, backend="aot_eager")):
            hooks.forget()
            assert_equal(gradients(model, run(x).pow(3).sum()), expected)
            assert "" not in hooks.unseen()


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_an_interrupt_while_checkpointing_repeats_a_layer(reentrant):
    model = ScoreAttention().double()
    control = copy.deepcopy(model)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    plain = gradients(control, control(x).pow(3).sum())
    with attach(model, SCALE):
        scaled = gradients(model, model(x).pow(3).sum())
        loss = checkpoint(model, x, use_reentrant=reentrant).pow(3).sum()
        handle = model.out_proj.register_forward_pre_hook(ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
        handle.remove()
        assert_equal(gradients(control, compiled(control)(x).pow(3).sum()), plain)
        again = checkpoint(model, x, use_reentrant=reentrant).pow(3).sum()
        assert_equal(gradients(model, again), scaled)


# A model of others that runs inside a layer.


class Teacher(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attn = attention(16, 4)

    def forward(self, x):
        return self.attn(x)

    def attend(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def taught(attention, teacher, how):
    """Return an attention layer that runs a teacher inside its own forward pass."""
    if how == "list":
        ask = [teacher]
        run = lambda x: ask[0](x)  # noqa: E731
    elif how == "method":
        run = teacher.forward
    elif how == "checkpointed":
        run = lambda x: checkpoint(teacher, x, use_reentrant=False)  # noqa: E731
    else:
        run = lambda x: teacher(x)  # noqa: E731

    class Layer(attention):
        def forward(self, x):
            return super().forward(x) + run(x)

    return Layer(16, 4)


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("eager", "list"),
        ("eager", "closure"),
        ("eager", "method"),
        ("eager", "checkpointed"),
        ("compiled", "closure"),
        ("teacher compiled", "closure"),
    ],
)
@pytest.mark.parametrize("layer", ["score", "softmax"])
def test_a_model_of_others_inside_a_layer_is_left_alone(layer, mode, how):
    attention = LAYERS[layer]
    teacher = Teacher(attention).double()
    model = taught(attention, teacher, how).double()
    alone = attention(16, 4).double()
    alone.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 16, dtype=torch.float64)
    plain = gradients(teacher, (teacher(x) * weight).sum())
    with attach(alone, SCALE):
        expected = gradients(alone, (alone(x) * weight).sum())
    run = compiled(model) if mode == "compiled" else model
    if mode == "teacher compiled":
        teacher.compile(fullgraph=True, backend="aot_eager")
    with attach(model, SCALE) as hooks:
        for _ in range(2):
            teacher.zero_grad()
            assert_equal(gradients(model, (run(x) * weight).sum()), expected)
            assert_equal({n: p.grad for n, p in teacher.named_parameters()}, plain)
        assert hooks.unseen() == []


def test_a_layer_whose_only_attention_is_that_of_others_is_an_error():
    teacher = Teacher(ScoreAttention)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return teacher(self.q_proj(x) + self.k_proj(x))

    model = nn.Sequential(Layer())
    with attach(model, SCALE), pytest.raises(UnscaledLayerError, match="layer '0'"):
        model(torch.randn(2, 5, 16))


class Core(nn.Module):
    """A function in the shape of a module."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("how", ["submodule", "list", "global", "parent"])
def test_modules_that_are_the_layers_own_are_scaled(how, mode):
    core = Core()

    class Layer(ScoreAttention):
        def forward(self, x):
            q, k, v = self.project(x)
            run = self.run[0] if how in ("list", "parent") else core
            return self.out_proj(run(q, k, v).transpose(1, 2).flatten(-2))

    class Parent(nn.Sequential):
        def attend(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    layer = Layer(causal=False).double()
    model = Parent(layer)
    layer.run = [core] if how == "list" else [model.attend]
    if how == "submodule":
        layer.core = core
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    scales = {"query": SCALE.side("query"), "key": SCALE.side("key")}
    expected = gradients(model, layer.reference(x, **scales).pow(3).sum())
    with attach(model, {"0": SCALE}) as hooks:
        run = compiled(model) if mode == "compiled" else model
        assert_equal(gradients(model, run(x).pow(3).sum()), expected)
        assert hooks.unseen() == []
