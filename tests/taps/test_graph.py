"""What the autograd graph tells of tensors that no mode saw, and of scores that are lost."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spanopt import UnscaledLayerError, attach
from spanopt.taps.graph import Trail, is_elementwise
from spanopt.traits import scripts_of

B, H, N, D = 2, 2, 9, 4


class Known:
    """Scores of one product, or of none."""

    def __init__(self, *products):
        self.products = products


def scores():
    q, k = (torch.randn(B, N, D, requires_grad=True) for _ in range(2))
    return q @ k.mT


def trail_of(x, known):
    trail = Trail()
    trail.note(x, known)
    return trail


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 2,
        lambda x: (x / 3).tanh() * 3,
        lambda x: (x * 1).div_(2).relu_(),
        lambda x: -(x.abs().sqrt() ** 3),
        lambda x: x.clamp(-1, 1) * torch.ones(N, requires_grad=True).sigmoid(),
    ],
)
def test_scores_are_found_behind_functions_of_single_entries(change):
    x, known = scores(), Known("product")
    assert trail_of(x, known).through_elementwise(change(x), nn.Identity()) is known


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.cumsum(-1),
        lambda x: x + 1,  # what is added may be a mask
        lambda x: x.flip(-1).tanh(),
        lambda x: x.sum(-1) * 2,
        lambda x: x[:, :3] * 2,
        lambda x: torch.randn(B, N, N, requires_grad=True).tanh(),
    ],
)
def test_scores_are_not_found_behind_anything_else(change):
    x = scores()
    changed = change(x)
    assert trail_of(x, Known("product")).through_elementwise(changed, nn.Identity()) is None


def test_nothing_is_found_where_nothing_is_noted_or_any_more():
    x = scores()
    trail = Trail()
    assert trail.through_elementwise(x * 2, nn.Identity()) is None
    assert trail.lost_at(x.flip(-1)) is None
    trail.note(x, Known("product"))
    trail.close()
    assert trail.through_elementwise(x * 2, nn.Identity()) is None


LOSSES = {
    "flip": lambda x: x.flip(-1) * 2,
    "pad": lambda x: F.pad(x, (1, 1)).softmax(-1)[..., 1:],
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "slice": lambda x: x[:, :3].tanh(),
}


@pytest.mark.parametrize("operation", LOSSES)
def test_the_first_operation_after_the_scores_is_named(operation):
    x = scores()
    trail = trail_of(x, Known("product"))
    assert trail.lost_at(LOSSES[operation](x)) == operation
    assert trail.lost_at(LOSSES[operation](x * 1.0)) == "mul"


def test_what_comes_after_a_softmax_is_no_loss():
    x = scores()
    weights = x.softmax(-1)
    trail = trail_of(x, Known("product"))
    trail.note(weights, Known())
    assert trail.lost_at(weights.flip(-1)) is None


def script(body):
    return torch.jit.CompilationUnit(f"def f(x):\n    return {body}\n").f


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("(x / 2.0).tanh() * 2.0", True),
        ("x.relu().neg().abs()", True),
        ("x.softmax(-1)", False),
        ("x + 1.0", False),
        ("x.cumsum(0) * 2.0", False),
    ],
)
def test_a_script_is_elementwise_by_its_graph(body, expected):
    assert is_elementwise(script(body).inlined_graph) is expected


@torch.jit.script
def soft_cap(x):
    return (x / 2.0).tanh() * 2.0


def capped_by_a_global(x):
    return soft_cap(x)


class ByGlobal(nn.Module):
    def forward(self, x):
        return capped_by_a_global(x)


class ByAttribute(nn.Module):
    def __init__(self, cap):
        super().__init__()
        self.cap = cap

    def forward(self, x):
        return self.cap(x)


def test_the_scripts_of_a_layer_are_found_in_its_code_its_attributes_and_its_parts():
    assert scripts_of(nn.Linear(2, 2)) == []
    for layer in (ByGlobal(), ByAttribute(soft_cap), ByAttribute(capped_by_a_global)):
        for model in (layer, nn.Sequential(nn.Linear(2, 2), layer)):
            assert scripts_of(model) == [soft_cap]


class Layer(nn.Module):
    """One attention for each way from scores to weights, by name."""

    def __init__(self, *ways):
        super().__init__()
        self.ways = ways
        self.wq, self.wk = (nn.Linear(H * D, H * D) for _ in range(2))
        self.mix, self.talk = nn.Parameter(torch.randn(H, H)), nn.Linear(H, H)

    def forward(self, x):
        for name in self.ways:
            q, k = (w(x).unflatten(-1, (H, D)).transpose(1, 2) for w in (self.wq, self.wk))
            weights = WAYS[name](self, q @ k.transpose(-2, -1)).softmax(-1)
            x = x + (weights @ k).transpose(1, 2).flatten(2)
        return x


WAYS = {
    "script": lambda layer, x: soft_cap(x),
    "heads mixed": lambda layer, x: torch.einsum("bhij,hg->bgij", x, layer.mix),
    "linear": lambda layer, x: layer.talk(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "rows and columns": lambda layer, x: by_rows_and_columns(x),
    "sums": lambda layer, x: x.cumsum(-1),
    "two products": lambda layer, x: torch.cat([x[..., :4] * 2, (x * 3)[..., 4:]], -1),
}


def by_rows_and_columns(x):
    return (x.view(B, H, 3, 3, 3, 3) + torch.ones(3, 3, 1, 3)).view(B, H, N, N)


def test_compiled_in_one_graph_the_ways_are_followed_as_they_are_in_eager_code():
    torch.compiler.reset()
    model = nn.Sequential(Layer("script", "heads mixed", "linear", "rows and columns")).double()
    x = torch.randn(B, N, H * D, dtype=torch.float64)

    def gradient(run):
        model.zero_grad()
        run(x).pow(3).sum().backward()
        return model[0].wq.weight.grad.clone()

    plain = gradient(model)
    with attach(model, {"*": (3.0, 3.0)}) as hooks:  # equal factors compile fast
        eager = gradient(model)
        compiled = gradient(torch.compile(model, fullgraph=True, backend="eager"))
        hooks.check()
    torch.compiler.reset()
    assert torch.allclose(compiled, eager, rtol=1e-10)
    assert (eager - plain).abs().max() > 0.1 * plain.abs().max()


@pytest.mark.parametrize(("way", "operation"), [("sums", "cumsum"), ("two products", "slice")])
@pytest.mark.parametrize("order", [1, -1])
def test_a_layer_of_which_one_attention_is_lost_beside_another_is_an_error(way, operation, order):
    model = nn.Sequential(Layer(*["heads mixed", way][::order])).double()
    message = f"'0': Q and K were seen in a part of its attention only.* softmax: at {operation}"
    with attach(model, {"*": (2.0, 1.0)}) as hooks:
        model(torch.randn(B, N, H * D, dtype=torch.float64)).sum().backward()
        assert hooks.unseen() == ["0"]
        with pytest.raises(UnscaledLayerError, match=message):
            hooks.check()


class Routed(Layer):
    """Attention, linear attention without a softmax, and routers of what comes out of both."""

    def __init__(self):
        super().__init__("heads mixed")
        self.router = nn.Linear(H * D, 3)

    def forward(self, x):
        x = super().forward(x)
        linear = self.wq(x) @ self.wk(x).mT @ x / N
        gates = (self.router(x).softmax(-1), self.router(linear).softmax(-1))
        return torch.cat([x, linear, *gates], -1)


def test_a_softmax_of_what_an_attention_returned_is_no_lost_product():
    model = nn.Sequential(Routed()).double()
    with attach(model, {"*": (2.0, 1.0)}) as hooks:
        model(torch.randn(B, N, H * D, dtype=torch.float64)).sum().backward()
        hooks.check()
