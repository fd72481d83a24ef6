"""Attention by hand under torch.compile."""

import pytest
import torch
from compare import largest_error
from torch import nn
from torch._dynamo.exc import Unsupported

from spanopt import (
    SpanScaledOptimizer,
    UnscaledLayerError,
    attach,
)
from taps.softmax.softmax_forms import (
    MASKS,
    PADDED_KEYS,
    SCALE,
    UNIFORM,
    WEIGHTS,
    WINDOW,
    B,
    D,
    H,
    M,
    N,
    assert_far,
    masked_by_itself,
    normalised_both_ways,
    run,
    scores,
    tokens,
)

# torch.compile.


class Bare(nn.Module):
    """Weights of Q and K, each way of its own, in a layer that has projections by name only."""

    def __init__(self, *ways):
        super().__init__()
        self.ways = ways
        self.q_proj, self.k_proj = (nn.Parameter(torch.ones(())) for _ in range(2))

    def forward(self, q, k):
        weights = [way(*x) for way, *x in zip(self.ways, q.unbind(), k.unbind(), strict=True)]
        return torch.stack(weights)

    def inputs(self):
        options = {"dtype": torch.float64, "requires_grad": True}
        return (torch.randn(len(self.ways), B, H, length, D, **options) for length in (N, M))


def closed_keys(mask):
    """Weights with a mask of that kind which closes some keys to all."""
    closed = (WINDOW | PADDED_KEYS).expand(B, H, N, M)
    return lambda q, k: MASKS[mask](scores(q, k), closed).softmax(-1)


COMPILED = {
    "a product": ([WEIGHTS["q @ k.transpose"]], SCALE),
    "a mask": ([closed_keys("masked_fill")], SCALE),
    "products": (
        [
            WEIGHTS[name]
            for name in ("torch.bmm", "torch.baddbmm", "einsum, tokens first", "k @ q.mT, permuted")
        ],
        UNIFORM,
    ),
    "masks shaped after the scores and computed from them": (
        [closed_keys("zeros_like"), masked_by_itself("topk threshold")],
        SCALE,
    ),
    "both ways": ([normalised_both_ways(-1)], UNIFORM),
    "ways": (
        [WEIGHTS[name] for name in ("mul_", "cast by softmax", "with a sink")],
        UNIFORM,
    ),
}


def check_compiled(model, run_compiled, scale):
    inputs = [*model.inputs()]
    _, plain = run(model, *inputs)
    with attach(model, scale) as hooks:
        _, eager = run(model, *inputs)
        for _ in range(2):
            hooks.forget()
            _, actual = run(run_compiled, *inputs)
            assert hooks.unseen() == [], "every compiled call must report"
    for i in range(len(model.ways)):
        one = [{side: g[side][i] for side in "01"} for g in (actual, eager, plain)]
        assert largest_error(*one[:2]) < 1e-10
        assert_far(one[1], one[2], "01")


@pytest.mark.parametrize(("ways", "scale"), COMPILED.values(), ids=COMPILED)
def test_compiled_in_one_graph_the_gradients_equal_eager_ones(ways, scale, compiled):
    model = Bare(*ways)
    check_compiled(model, compiled(model), scale)


@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*")
@pytest.mark.parametrize(
    ("weigh", "scale"),
    [("q @ k.transpose", SCALE), ("k @ q.mT over -2", UNIFORM)],
    ids=["a product", "reversed"],
)
def test_compiled_by_inductor(weigh, scale, compiled):
    model = Bare(WEIGHTS[weigh])
    check_compiled(model, compiled(model, "inductor"), scale)


def test_a_change_of_scale_acts_without_a_new_compilation(compiled):
    model = Bare(WEIGHTS["k @ q.mT over -2"])
    inputs = [*model.inputs()]
    with attach(model, SCALE) as hooks:
        run_compiled = compiled(model)
        run(run_compiled, *inputs)
        for factor in (3.0, 0.25, -1.0):
            hooks.groups[0].update(query=(factor, 0.5), key=(0.5, factor))
            _, eager = run(model, *inputs)
            with torch.compiler.set_stance("fail_on_recompile"):
                _, actual = run(run_compiled, *inputs)
            assert largest_error(actual, eager) < 1e-10


class Turned(nn.Module):
    """Attention that torch.compile hides from the tap: a property turns the scores."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(D, D))

    def forward(self, x):
        q, k = (project(x) for project in self.children())
        return (k @ q.mT).mT.softmax(-1) @ x


@pytest.mark.parametrize("names", [("q_proj", "k_proj"), ("theta", "phi")])
def test_what_is_lost_when_compiled_is_an_error_and_never_silent(names, compiled):
    model, x = nn.Sequential(Turned(*names)), tokens(width=D, dtype=torch.float32)
    scales = {"*": (3.0, 3.0)}
    with attach(model, scales) as hooks:
        model(x)
        assert hooks.sites[0].query_length == N, "seen in eager code"
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, scales=scales
    )

    def train():
        run(compiled(model, "eager"), x)
        optimizer.step()

    with pytest.raises((UnscaledLayerError, Unsupported), match="not scaled"):
        train()
