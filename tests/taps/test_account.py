"""What gets past the hooks of a layer beside calls that are seen is an error at the next step."""

import contextlib

import pytest
import torch
from models import ScoreAttention
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from spanopt import SpanScaledOptimizer, UnscaledLayerError


class Packed(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(16, 4, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class PackedWithWeights(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(16, 4, batch_first=True, kdim=16, vdim=16)

    def forward(self, x):
        return super().forward(x, x, x)[0]


class ByHand(ScoreAttention):
    def forward(self, x):
        q, k, v = self.project(x)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(-2))


class Kernel(torch.autograd.Function):
    """An attention kernel that can't be seen into."""

    @staticmethod
    def forward(ctx, *tensors):
        with torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_() for x in tensors]
            ctx.output = F.scaled_dot_product_attention(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.autograd.grad(ctx.output, ctx.inputs, grad)


class Either(ScoreAttention):
    """Attends in a kernel of its own, or not at all, when told so."""

    how = "score"

    def forward(self, x):
        q, k, v = self.project(x)
        if self.how == "kernel":
            with torch._C.DisableTorchFunction():
                y = Kernel.apply(q, k, v)
        elif self.how == "score":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = v
        return self.out_proj(y.transpose(1, 2).flatten(-2))


class OwnWeight(nn.Module):
    """Projects with a parameter of its own, where no module's call shows it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(48, 16) / 4)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(-2)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class OwnWeightByHand(OwnWeight):
    def attend(self, q, k, v):
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class UsesWeight(ScoreAttention):
    """Has modules that project, and uses their weights without calling them."""

    def project(self, x, context=None):
        projections = self.q_proj, self.k_proj, self.v_proj
        return (F.linear(x, p.weight).unflatten(-1, (4, -1)).transpose(1, 2) for p in projections)


LAYERS = {"score": ScoreAttention, "packed": Packed, "softmax": ByHand}
WITHOUT_CALLS = {
    "packed": Packed,
    "weights": PackedWithWeights,
    "own": OwnWeight,
    "own by hand": OwnWeightByHand,
    "used": UsesWeight,
}


def wrapped(*layers, **options):
    model = nn.Sequential(*layers)
    optimizer = SpanScaledOptimizer(
        SGD(model.parameters(), lr=0.01), model, {"*": (2.0, 0.5)}, **options
    )
    return model, optimizer


def batch():
    return torch.randn(2, 5, 16)


def compiled(run):
    return torch.compile(run, fullgraph=True, backend="aot_eager")


@contextlib.contextmanager
def refused(optimizer, name, what):
    """Expect an error at the step that names a layer, and a next step that is well."""
    before = [p.detach().clone() for p in optimizer.model.parameters()]
    yield
    with pytest.raises(UnscaledLayerError, match=f"'{name}'.*{what}"):
        optimizer.step()
    assert all(map(torch.equal, before, optimizer.model.parameters()))
    optimizer.zero_grad()
    optimizer.model(batch()).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_forward_pass_that_is_dropped_does_not_cover_a_direct_one(layer):
    model, optimizer = wrapped(layer())
    with refused(optimizer, "0", "directly|around"):
        model(batch())
        model[0].forward(batch()).sum().backward()


@pytest.mark.parametrize("layer", [ScoreAttention, ByHand])
@pytest.mark.parametrize("mode", ["eager", "compiled", "checkpointed"])
def test_a_direct_forward_beside_a_call_is_an_error(layer, mode):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = layer()

        def forward(self, x, direct=False):
            x = self.attn(x)
            if not direct:
                return x
            if mode == "checkpointed":
                return checkpoint(self.attn.forward, x, use_reentrant=False)
            return self.attn.forward(x)

    model, optimizer = wrapped(Twice())
    run = compiled(model[0]) if mode == "compiled" else model[0]
    with refused(optimizer, "0.attn", "directly"):
        run(batch(), direct=True).sum().backward()


def name_of(value):
    return value.__name__


def directly(layer):
    return layer.forward


def checkpointed(layer):
    return lambda x: checkpoint(layer.forward, x, use_reentrant=False)


def reentrant(layer):
    return lambda x: checkpoint(layer.forward, x, use_reentrant=True)


@pytest.mark.parametrize("layer", {**LAYERS, **WITHOUT_CALLS}.values(), ids=name_of)
@pytest.mark.parametrize("second", [directly, checkpointed, reentrant])
@pytest.mark.parametrize("order", ["before", "after", "in another graph"])
def test_a_second_use_past_the_hooks_is_an_error(layer, second, order):
    model, optimizer = wrapped(layer())
    with refused(optimizer, "0", "directly"):
        if order == "before":
            model(second(model[0])(batch().requires_grad_())).sum().backward()
        elif order == "after":
            second(model[0])(model(batch())).pow(2).sum().backward()
        else:
            second(model[0])(batch().requires_grad_()).pow(2).sum().backward()
            model(batch()).pow(2).sum().backward()


@pytest.mark.parametrize("layer", {**LAYERS, **WITHOUT_CALLS}.values(), ids=name_of)
def test_other_gradients_of_the_weights_are_no_use_past_the_hooks(layer):
    """Penalties, in the loss and apart, and hooks of others on the same parameters."""
    model, optimizer = wrapped(layer(), nn.Linear(16, 16))
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad * 2)
    for _ in range(2):
        optimizer.zero_grad()
        penalty = sum(p.pow(2).sum() for p in model.parameters())
        (model(batch()).softmax(-1).pow(2).sum() + penalty).backward()
        sum(
            (p @ p.mT).softmax(-1).square().sum() for p in model.parameters() if p.ndim > 1
        ).backward()
        sum(p.abs().sum() for p in model.parameters()).backward()
        optimizer.step()


@pytest.mark.parametrize("layer", {**LAYERS, **WITHOUT_CALLS}.values(), ids=name_of)
def test_several_calls_checkpoints_and_another_model_are_no_use_past_the_hooks(layer):
    model, optimizer = wrapped(layer())
    teacher = layer()
    for step in range(2):
        optimizer.zero_grad()
        x = model[0](model[0](batch()))
        x = checkpoint(model[0], x, use_reentrant=True)
        x = checkpoint(model, x, use_reentrant=False)
        if step:
            x = model[0](teacher.forward(model[0](x)))
        x.pow(2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("layer", WITHOUT_CALLS.values(), ids=name_of)
@pytest.mark.parametrize("scaled", [True, False])
def test_tied_weights_are_no_use_past_the_hooks(layer, scaled):
    model = nn.Sequential(layer(), layer())
    for module, other in zip(model[0].modules(), model[1].modules(), strict=True):
        module._parameters.update(other._parameters)
    optimizer = SpanScaledOptimizer(
        SGD(model.parameters(), lr=0.01),
        model,
        {"0": (2.0, 0.5), "1": (2.0, 0.5) if scaled else None},
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(batch()).pow(2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("layer", {**LAYERS, **WITHOUT_CALLS}.values(), ids=name_of)
def test_calls_at_scales_that_change_nothing_are_no_use_past_the_hooks(layer):
    model, optimizer = wrapped(layer())
    for factor in (1.0, 2.0, 1.0):
        for group in optimizer.span_groups:
            group.update(parallel=factor, violation=1.0)
        model(batch()).pow(2).sum().backward()
    optimizer.step()
    for group in optimizer.span_groups:
        group.update(query=(1.0, 1.0), key=(2.0, 1.0))
    optimizer.zero_grad()
    model(batch()).pow(2).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("layer", WITHOUT_CALLS.values(), ids=name_of)
@pytest.mark.parametrize("part", ["all", "first"])
def test_weights_that_are_frozen_for_a_while_train(layer, part):
    model, optimizer = wrapped(nn.Linear(16, 16), layer())
    frozen = [*model[1].parameters()][: None if part == "all" else 1]
    for requires_grad in (True, False, True):
        for parameter in frozen:
            parameter.requires_grad_(requires_grad)
        optimizer.zero_grad()
        for _ in range(2):
            model(batch()).pow(2).sum().backward()
        optimizer.step()
    with refused(optimizer, "1", "directly"):
        model[1].forward(model(batch())).pow(2).sum().backward()


def test_weights_that_are_cast_or_run_without_values_are_used_as_they_are():
    model, optimizer = wrapped(Packed())
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(batch())
    model(batch())
    model.double()
    model(batch().double()).sum().backward()
    optimizer.step()
    assert all(type(parameter.grad) is torch.Tensor for parameter in model.parameters())
    assert all(parameter.grad.dtype is torch.float64 for parameter in model.parameters())


def test_nothing_is_left_on_parameters_when_the_hooks_go():
    model, optimizer = wrapped(Packed(), OwnWeight())
    model(batch()).sum().backward()
    optimizer.step()
    optimizer.detach()
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize(
    ("order", "mode"),
    [
        (("score", "kernel"), "eager"),
        (("kernel", "score"), "eager"),
        (("score", "kernel"), "compiled"),
    ],
)
def test_a_micro_batch_through_a_kernel_beside_one_that_is_seen_is_an_error(order, mode):
    model, optimizer = wrapped(Either())
    model(batch()).sum().backward()
    optimizer.step()
    run = compiled(model) if mode == "compiled" else model
    with refused(optimizer, "0", "in some of its calls only"):
        for how in order:
            model[0].how = how
            (model if how == "kernel" else run)(batch()).sum().backward()
        model[0].how = "score"


def test_a_call_in_a_kernel_that_is_not_trained_on_is_none():
    model, optimizer = wrapped(Either())
    for _ in range(2):
        model(batch()).sum().backward()
        model[0].how = "kernel"
        model(batch())
        with torch.no_grad():
            model(batch())
        model[0].how = "score"
        optimizer.step()


def test_a_call_without_attention_is_none_that_was_missed():
    model, optimizer = wrapped(Either(), nn.Linear(16, 16), Either())
    for how in ("score", "nothing", "score", "nothing"):
        model(batch()).sum().backward()
        model[0].how = model[2].how = how
        model(batch()).sum().backward()
        model[0].how = model[2].how = "score"
        optimizer.step()


class Times(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.attn = layer()
        self.times = 1

    def forward(self, x):
        for _ in range(self.times):
            x = x + self.attn(x)
        return x


@pytest.mark.parametrize("mode", ["eager", "compiled", "checkpointed", "reentrant", "packed"])
def test_layers_called_any_number_of_times_train(mode):
    first, second = (Times(Packed if mode == "packed" else ScoreAttention) for _ in range(2))
    model, optimizer = wrapped(first, second)
    run = model
    if mode == "compiled":
        run = compiled(model)
    elif mode in ("checkpointed", "reentrant"):
        run = lambda x: checkpoint(  # noqa: E731
            model, x.requires_grad_(), use_reentrant=mode == "reentrant"
        )
    for times in ((1, 1), (2, 3), (1, 2)):
        first.times, second.times = times
        optimizer.zero_grad()
        for _ in range(2):
            run(batch()).sum().backward()
            with torch.no_grad():
                model(batch())
        model(batch())  # a validation pass that forgets no_grad
        optimizer.step()


def test_layers_that_are_frozen_or_not_in_the_loss_train():
    class Exits(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = ScoreAttention(), ScoreAttention()

        def forward(self, x, both=True):
            y = self.first(x)
            z = self.second(y)
            return z if both else y

    model, optimizer = wrapped(Exits())
    for both in (True, False, True, False):
        optimizer.zero_grad()
        model[0](batch(), both).sum().backward()
        optimizer.step()
    for part in (model[0].first.q_proj, model[0].first):
        part.requires_grad_(False)
        optimizer.zero_grad()
        model(batch()).sum().backward()
        optimizer.step()


def test_parts_of_a_layer_may_run_outside_of_it():
    model, optimizer = wrapped(ScoreAttention())
    for _ in range(2):
        optimizer.zero_grad()
        x = batch()
        (model(x).sum() + model[0].q_proj(x).pow(2).sum()).backward()
        optimizer.step()


def test_gradients_of_a_penalty_alone_are_no_way_around():
    model, optimizer = wrapped(ScoreAttention())
    model(batch())
    model[0].out_proj.weight.pow(2).sum().backward()
    optimizer.step()


def test_with_on_missing_warn_or_ignore_it_is_as_told():
    model, optimizer = wrapped(Packed(), on_missing="warn")
    model(batch())
    model[0].forward(batch()).sum().backward()
    with pytest.warns(UserWarning, match="'0': it got gradients"):
        optimizer.step()
    model, optimizer = wrapped(Packed(), on_missing="ignore")
    model(batch())
    model[0].forward(batch()).sum().backward()
    optimizer.step()
