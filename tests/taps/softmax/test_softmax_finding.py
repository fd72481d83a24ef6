"""Which layers with a product and a softmax are attention."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spanopt import (
    SpanScale,
    SpanScaledOptimizer,
    UnscaledLayerError,
    attach,
    find_attention,
)
from taps.softmax.softmax_forms import (
    SCALE,
    WEIGHTS,
    ByHand,
    D,
    H,
    M,
    N,
    Numbered,
    both_inputs,
    check,
    run,
    scores,
    tokens,
)

# Finding the layers.


class NonLocal(nn.Module):
    """The non-local block of vision models."""

    def __init__(self, width=H * D):
        super().__init__()
        self.theta, self.phi, self.g, self.W = (nn.Conv1d(width, width, 1) for _ in range(4))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, hook=None):
        y = x.mT
        theta, phi = self.theta(y).mT, self.phi(y).mT
        if hook is not None:
            theta, phi = hook(theta, phi)
        f = torch.matmul(theta, phi.permute(0, 2, 1))
        return x + self.W(torch.matmul(self.softmax(f), self.g(y).permute(0, 2, 1)).mT).mT


class InProj(nn.Module):
    def __init__(self, width=H * D):
        super().__init__()
        self.in_proj, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, hook=None):
        q, k, v = self.in_proj(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        if hook is not None:
            q, k = hook(q, k)
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        return self.out(torch.einsum("bhij,bhjd->bihd", weights, v).flatten(-2))


class PositionsInside(nn.Module):
    """An attention core with parameters of its own, that are no projections."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(N * M, H)

    def forward(self, q, k):
        bias = self.bias(torch.arange(N * M).view(N, M)).movedim(-1, 0)
        return (scores(q, k) + bias).softmax(-1)


class TalkingInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = (nn.Conv2d(H, H, 1, bias=False) for _ in range(2))

    def forward(self, q, k):
        x = scores(q, k)
        return self.after((x + self.before(x)).softmax(-1))


@pytest.mark.parametrize("core", [PositionsInside, TalkingInside])
def test_a_core_with_parameters_is_scaled_as_a_part_of_the_layer_around_it(core):
    model = nn.ModuleDict({"layer": ByHand(core()).double()})
    assert [site.name for site in find_attention(model)] == ["layer"]
    check(model["layer"], *both_inputs())


UNUSUAL = {
    NonLocal: (1, ("theta.weight", "phi.weight")),
    Numbered: (1, ("w1", "w2")),
    InProj: (H, ("in_proj.weight",)),
}


@pytest.mark.parametrize("layer", UNUSUAL)
def test_layers_with_unusual_names_are_found_and_scaled(layer):
    heads, weights = UNUSUAL[layer]
    model = nn.ModuleDict({"layer": layer().double()})
    (site,) = find_attention(model)
    assert (site.name, site.tap, site.certain, site.heads) == ("layer", "softmax", False, None)
    model = model["layer"]
    with attach(model, SCALE) as hooks:
        model(tokens())
        (site,) = hooks.sites
        assert (site.tap, site.heads, site.kv_heads) == ("softmax", heads, heads)
        assert site.head_dim == H * D // heads
        assert (site.query_length, site.key_length) == (N, N)
        hooks.forget()
        assert hooks.unseen() == [""], "once seen, it must be seen in each step"
    check(model, tokens(), names=weights)


class Router(nn.Module):
    """A mixture of experts: multiplies and takes a softmax, and is no attention."""

    def __init__(self, width=H * D, experts=5):
        super().__init__()
        self.gate, self.up = nn.Linear(width, experts), nn.Linear(width, experts * width)

    def forward(self, x):
        weights = F.softmax(self.gate(x), dim=-1)
        experts = self.up(x).unflatten(-1, (weights.shape[-1], -1))
        return (weights.unsqueeze(-2) @ experts).squeeze(-2)


class Sigmoid(ByHand):
    def __init__(self):
        super().__init__(lambda q, k: scores(q, k).sigmoid())


def test_a_layer_that_is_no_attention_is_dropped_in_silence():
    model = nn.Sequential(Router(), NonLocal(), Router()).double()
    assert [site.certain for site in find_attention(model)] == [False] * 3
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, SpanScale(2.0, 1.0)
    )
    before = model[1].theta.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        run(model, tokens())
        optimizer.step()
    assert not torch.equal(model[1].theta.weight, before)
    assert [site.heads for site in optimizer.hooks.sites] == [None, 1, None]


def test_a_model_of_layers_none_of_which_is_attention_is_an_error_at_the_step():
    model, x = nn.Sequential(Router(), Router()).double(), tokens()
    assert [site.certain for site in find_attention(model)] == [False] * 2
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, SpanScale(2.0, 1.0)
    )
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        run(model, x)
        with pytest.raises(UnscaledLayerError, match=r"layers '0', '1' \(scaled: none\)"):
            optimizer.step()
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_router_alone_has_the_gradients_of_plain_code():
    model, x = nn.Sequential(Router(), NonLocal()).double(), tokens()
    _, plain = run(model, x)
    with attach(model, SCALE):
        _, actual = run(model, x)
    late = [name for name in plain if name.startswith(("1.g", "1.W"))]
    assert all(torch.equal(actual[name], plain[name]) for name in late)
    alone, y = Router().double(), tokens()
    _, plain = run(alone, y)
    with attach(alone, SCALE):
        _, actual = run(alone, y)
    assert all(torch.equal(actual[name], plain[name]) for name in plain)


def test_sigmoid_attention_is_an_error_that_names_it_and_the_layers_that_are_scaled():
    model = nn.Sequential(ByHand(WEIGHTS["einsum"]), Sigmoid(), NonLocal(), Router()).double()
    message = r"not scaled: layer '1' \(Sigmoid\); scaled: '0' \(ByHand\), '2' \(NonLocal\)\. "
    with attach(model, SpanScale(2.0, 1.0)), pytest.raises(UnscaledLayerError, match=message):
        model(tokens())
    with attach(model, {"*": SCALE, "1": None}) as hooks:
        run(model, tokens())
        assert hooks.unseen() == []


class Indexer(nn.Module):
    """Chooses keys for each query by a product of its own, as in sparse attention."""

    def __init__(self, width=H * D, trained=False):
        super().__init__()
        self.wq, self.wk = nn.Linear(width, D), nn.Linear(width, D)
        self.trained = trained

    def forward(self, x):
        chosen = self.wq(x) @ self.wk(x).transpose(-2, -1)
        return chosen.relu() if self.trained else chosen.detach().topk(5).indices


class Indexed(ByHand):
    def __init__(self, **options):
        super().__init__(None)
        self.indexer = Indexer(**options)

    def forward(self, x, hook=None):
        chosen = self.indexer(x)
        if self.indexer.trained:
            self.weigh = lambda q, k: (scores(q, k) + chosen[:, None]).softmax(-1)
        else:
            closed = torch.ones(len(x), 1, N, N, dtype=torch.bool).scatter(3, chosen[:, None], 0)
            closed[..., 0] = False  # so that no key is closed to all
            self.weigh = lambda q, k: scores(q, k).masked_fill(closed, -torch.inf).softmax(-1)
        return super().forward(x, hook=hook)


def test_an_indexer_that_returns_no_gradient_is_no_attention_that_must_be_scaled():
    model, x = nn.Sequential(Indexed()).double(), tokens()
    assert [site.name for site in find_attention(model)] == ["0", "0.indexer"]
    check(model[0], x)
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, {"*": (2.0, 1.0)}
    )
    model(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(x)
    model(x).sum().backward()
    optimizer.step()


def test_an_indexer_that_is_named_or_trained_must_be_scaled():
    message = r"not scaled: layer '0.indexer' \(Indexer\); scaled: '0' \(Indexed\)"
    model = nn.Sequential(Indexed()).double()
    scales = {"*": SCALE, "0.indexer": (2.0, 1.0)}
    with attach(model, scales), pytest.raises(UnscaledLayerError, match=message):
        model(tokens())
    model = nn.Sequential(Indexed(trained=True)).double()
    with attach(model, SCALE), pytest.raises(UnscaledLayerError, match=message):
        model(tokens())


def test_a_frozen_layer_that_cannot_be_scaled_is_still_an_error():
    model = nn.Sequential(Sigmoid()).double().requires_grad_(False)
    with attach(model, SCALE), pytest.raises(UnscaledLayerError, match="not scaled: layer '0'"):
        model(tokens(requires_grad=False))
