"""Products with weights that are no keys: routers, banks and experts."""

import pytest
import torch
from compare import largest_error
from torch import nn
from torch.nn import functional as F

from spanopt import (
    attach,
)
from taps.softmax.softmax_forms import (
    SCALE,
    UNIFORM,
    WEIGHTS,
    B,
    ByHand,
    D,
    H,
    M,
    N,
    assert_far,
    both_inputs,
    check,
    run,
    scores,
    split,
    tokens,
)


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
