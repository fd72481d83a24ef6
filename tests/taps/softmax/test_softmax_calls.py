"""Attention by hand called in loops, functionally, checkpointed, and differentiated twice."""

import pytest
import torch
from compare import largest_error
from oracle import projector
from torch import nn
from torch.utils.checkpoint import checkpoint

from spanopt import (
    UnscaledLayerError,
    attach,
)
from taps.softmax.softmax_forms import (
    SCALE,
    SCALES,
    WEIGHTS,
    ByHand,
    assert_far,
    both_inputs,
    check,
    run,
    scores,
    tokens,
)

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
