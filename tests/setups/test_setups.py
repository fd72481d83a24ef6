"""Each projection setup against its formula by NumPy, with an SVD."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from models import gradients
from oracle import rescaled
from torch import nn
from torch.nn import functional as F

from spanopt import SpanScale, SpanScaledOptimizer, attach, span_node, token_mask
from spanopt.projection import orthonormal, project
from spanopt.setups import SETUPS, Setup, registry, setup

SHAPES = [(9, 4), (3, 9, 4), (2, 3, 9, 4), (2, 3, 4, 7)]


def orth(x):
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-9 * max(s.max(initial=0), 1e-300)]


def by_span(g, q, k):
    return orth(q) @ (orth(q).T @ g)


def by_cross(g, q, k):
    return orth(k) @ (orth(k).T @ g)


def by_oblique(g, q, k):
    onto, along = orth(q), orth(k)
    u, c, vt = np.linalg.svd(along.T @ onto)
    weights = np.diag(c / (c**2 + 1 / 256))
    return onto @ (vt.T[:, : len(c)] @ weights @ u[:, : len(c)].T) @ (along.T @ g)


def by_radial(g, q, k):
    sizes = (q**2).sum(1, keepdims=True)
    return np.where(sizes > 0, (g * q).sum(1, keepdims=True) / np.where(sizes > 0, sizes, 1) * q, 0)


def by_feature(g, q, k):
    _, s, vt = np.linalg.svd(k)
    energy = np.cumsum(s**2)
    r = int(np.searchsorted(energy, 0.9 * energy[-1] * (1 - 1e-12))) + 1
    return g @ vt[:r].T @ vt[:r]


ORACLES = {
    "span": by_span,
    "cross": by_cross,
    "oblique": by_oblique,
    "radial": by_radial,
    "feature": by_feature,
}


def per_matrix(oracle, *tensors):
    """Apply an oracle to each matrix of tensors (..., N, d)."""
    flat = [x.reshape(-1, *x.shape[-2:]).numpy() for x in tensors]
    parts = np.stack([oracle(*matrices) for matrices in zip(*flat, strict=True)])
    return torch.as_tensor(parts).reshape(tensors[0].shape)


def inputs(shape):
    return (torch.randn(shape, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_a_setup_equals_its_formula(name, shape):
    g, q, k = inputs(shape)
    actual = SETUPS[name](g, q, k)
    torch.testing.assert_close(actual, per_matrix(ORACLES[name], g, q, k), rtol=1e-9, atol=1e-11)
    single = SETUPS[name](*(x.float() for x in (g, q, k)))
    assert single.dtype == torch.float32
    assert (single - actual).abs().max() < 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_the_pooled_setup_is_one_span_over_the_batch(masked):
    g, q, k = inputs((3, 2, 5, 4))
    mask = torch.rand(3, 1, 5) < 0.7 if masked else None
    actual = SETUPS["pooled"](g, q, k, mask=mask)
    real = torch.ones(3, 1, 5, dtype=torch.bool) if mask is None else mask
    for head in range(2):
        rows, basis = ((x[:, head] * real[:, 0, :, None]).flatten(0, 1).numpy() for x in (g, q))
        expected = torch.as_tensor(by_span(rows, basis, None)).view(3, 5, 4)
        torch.testing.assert_close(actual[:, head], expected, rtol=1e-9, atol=1e-11)
    for shape in ((5, 4), (1, 2, 5, 4)):
        g, q, k = inputs(shape)
        torch.testing.assert_close(SETUPS["pooled"](g, q, k), project(q, g))


@pytest.mark.parametrize("name", SETUPS)
def test_padding_changes_nothing_and_gets_nothing(name):
    g, q, k = inputs((2, 3, 9, 4))
    mask = torch.arange(9) < 6
    mask = mask.expand(2, 1, 9)
    junk = torch.randn(2, 3, 3, 4, dtype=torch.float64) * 100
    padded = [torch.cat([x[..., :6, :], junk], dim=-2) for x in (g, q)]
    # Features are those of the other side, whose padding is cut off by its own mask.
    other = k[..., :6, :] if name == "feature" else torch.cat([k[..., :6, :], junk], dim=-2)
    actual = SETUPS[name](*padded, other, mask=mask)
    alone = SETUPS[name](*(x[..., :6, :] for x in (g, q, k)))
    torch.testing.assert_close(actual[..., :6, :], alone, rtol=1e-9, atol=1e-11)
    assert not actual[..., 6:, :].any()


@pytest.mark.parametrize("power", [-120, 120])
@pytest.mark.parametrize("name", SETUPS)
def test_a_setup_takes_tensors_of_any_magnitude(name, power):
    g, q, k = (x.float() for x in inputs((2, 3, 9, 4)))
    expected = SETUPS[name](g, q, k)
    assert expected.any()
    torch.testing.assert_close(
        SETUPS[name](g, q * 2.0**power, k * 2.0**power), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("power", [-100, 100])
def test_a_gradient_of_any_magnitude_keeps_its_norm(power):
    g, q, _ = (x.float() for x in inputs((2, 3, 9, 4)))
    q.requires_grad_()
    scale = 2.0**power
    one, other = (
        torch.autograd.grad(span_node(q, 2.0, 0.5, preserve_norm=True), q, x)[0]
        for x in (g, g * scale)
    )
    torch.testing.assert_close(other / scale, one)
    torch.testing.assert_close(one.norm(dim=(-2, -1)), g.norm(dim=(-2, -1)))


# The properties that hold for a setup; those of the span hold for all that follow it.
PROJECTORS = ("span", "cross", "radial", "feature", "pooled")
OF_A_SUBSPACE = ("span", "cross", "oblique", "pooled")


@pytest.mark.parametrize("name", SETUPS)
def test_a_setup_is_linear_and_finite_for_degenerate_tensors(name):
    g, q, k = inputs((2, 3, 9, 4))
    other = torch.randn_like(g)
    split = SETUPS[name]
    together = split(2 * g - other, q, k)
    torch.testing.assert_close(together, 2 * split(g, q, k) - split(other, q, k))
    for basis in (q * 0, torch.cat([q[..., :2], q[..., :2]], -1)):
        for one, two in ((basis, k), (q, basis), (basis, basis)):
            assert torch.isfinite(split(g, one, two)).all()
    assert not torch.isfinite(split(g * torch.nan, q, k)).any()


@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors_are_idempotent_symmetric_and_pythagorean(name):
    g, q, k = inputs((2, 3, 9, 4))
    other = torch.randn_like(g)
    split = SETUPS[name]
    parallel = split(g, q, k)
    torch.testing.assert_close(split(parallel, q, k), parallel)
    torch.testing.assert_close((other * parallel).sum(), (split(other, q, k) * g).sum())
    total = parallel.square().sum() + (g - parallel).square().sum()
    torch.testing.assert_close(total, g.square().sum())


@pytest.mark.parametrize("name", OF_A_SUBSPACE)
def test_what_goes_by_the_column_space_is_the_same_for_any_basis_of_it(name):
    g, q, k = inputs((2, 3, 9, 4))
    mixed = torch.randn(3, 4, 4, dtype=torch.float64)  # one for each head, as pooling asks for
    torch.testing.assert_close(
        SETUPS[name](g, q @ mixed, k @ mixed), SETUPS[name](g, q, k), rtol=1e-6, atol=1e-8
    )


def test_the_oblique_part_is_bounded_and_nearly_the_spans_where_the_spans_agree():
    g, q, k = inputs((4, 9, 4))
    largest = max(
        torch.linalg.vector_norm(SETUPS["oblique"](torch.randn_like(g), q, k))
        / torch.linalg.vector_norm(g)
        for _ in range(50)
    )
    assert 1 < largest < 8
    same = SETUPS["oblique"](g, q, q @ torch.randn(4, 4, dtype=torch.float64))
    torch.testing.assert_close(same, project(q, g) / (1 + 1 / 256), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["cross", "oblique"])
def test_a_setup_that_needs_as_many_keys_as_queries_says_so(name):
    g, q, _ = inputs((2, 9, 4))
    with pytest.raises(ValueError, match=f"'{name}' needs queries and keys of equal number"):
        SETUPS[name](g, q, torch.randn(2, 8, 4))


def test_an_orthonormal_basis_spans_the_same():
    g, q, _ = inputs((2, 9, 4))
    u = orthonormal(q)
    torch.testing.assert_close(u.mT @ u, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    torch.testing.assert_close(u @ (u.mT @ g), project(q, g))
    deficient = torch.cat([q[..., :2], q[..., :2]], -1)
    u = orthonormal(deficient)
    torch.testing.assert_close(u @ (u.mT @ g), project(deficient, g))
    expected = torch.as_tensor(rescaled(g.numpy(), q.numpy(), 1.0, 0.0))
    torch.testing.assert_close(orthonormal(q) @ (orthonormal(q).mT @ g), expected)


# In a model.

A, B = 3.0, 0.5
HEADS, WIDTH = 4, 16


def split(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, tap, kv_heads=HEADS):
        super().__init__()
        self.tap = tap
        d = WIDTH // HEADS
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, kv_heads * d) for _ in range(2))

    def forward(self, x, context=None, hook=None):
        context = x if context is None else context
        q = split(self.q_proj(x))
        k, v = (
            y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for y in (self.k_proj(context), self.v_proj(context))
        )
        if hook is not None:
            q, k = hook(q * 1.0, k * 1.0)
        if hook is None and self.tap == "score":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1])
        return (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v


class Packed(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(WIDTH, HEADS, batch_first=True)
        self.out_proj.weight.data = torch.eye(WIDTH)

    def forward(self, x, hook=None):
        if hook is None:
            return split(super().forward(x, x, x, need_weights=False)[0])
        q, k, v = map(split, F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        q, k = hook(q * 1.0, k * 1.0)
        y = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        return split(self.out_proj(y.transpose(1, 2).flatten(-2)))


def oracle_hook(name, preserve_norm=False):
    """Return what puts hooks by NumPy on Q and K."""

    def rescale(g, x, other):
        if name == "pooled":
            flat = (y.transpose(0, 1).flatten(1, 2) for y in (g, x, other))
            p = per_matrix(by_span, *flat).unflatten(1, g.shape[::2][:2]).transpose(0, 1)
        else:
            p = per_matrix(ORACLES[name], g, x, other)
        scaled = B * g + (A - B) * p
        if preserve_norm:
            scaled = scaled * (g.norm(dim=(-2, -1)) / scaled.norm(dim=(-2, -1)))[..., None, None]
        return scaled

    def hook(q, k):
        one, other = q.detach(), k.detach()
        q.register_hook(lambda g: rescale(g, one, other))
        k.register_hook(lambda g: rescale(g, other, one))
        return q, k

    return hook


def build(tap):
    return (Packed() if tap == "packed" else Attention(tap)).double()


def assert_same(actual, expected, tolerance=1e-8):
    for name, value in expected.items():
        size = max(value.abs().max(), 1e-9)
        if name != "k_proj.bias":
            assert (actual[name] - value).abs().max() <= tolerance * size, name


def assert_other(actual, plain):
    assert any((actual[name] - plain[name]).abs().max() > 1e-3 for name in plain)


@pytest.mark.parametrize("preserve_norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("tap", ["score", "softmax", "packed"])
def test_every_tap_rescales_by_every_setup(tap, name, preserve_norm):
    layer, x = build(tap), torch.randn(3, 9, WIDTH, dtype=torch.float64)
    reference = gradients(layer, layer(x, hook=oracle_hook(name, preserve_norm)).pow(3).sum())
    plain = gradients(layer, layer(x).pow(3).sum())
    options = {"projection": name, "preserve_norm": preserve_norm}
    with attach(layer, SpanScale(A, B), **options) as hooks:
        actual = gradients(layer, layer(x).pow(3).sum())
        assert hooks.unseen() == []
    assert_same(actual, reference)
    assert_other(actual, plain)


@pytest.mark.parametrize("name", ["span", "radial", "pooled"])
def test_the_projection_tap_takes_the_setups_of_one_side(name):
    layer, x = build("softmax"), torch.randn(3, 9, WIDTH, dtype=torch.float64)
    reference = gradients(layer, layer(x, hook=oracle_hook(name, True)).pow(3).sum())
    spec = {"": {"query": "q_proj", "key": "k_proj", "num_heads": HEADS}}
    options = {"qk_modules": spec, "preserve_norm": True}
    with attach(layer, SpanScale(A, B), projection=name, **options):
        assert_same(gradients(layer, layer(x).pow(3).sum()), reference)
    with pytest.raises(ValueError, match="layer '': the projection 'cross' needs queries and keys"):
        attach(layer, SpanScale(A, B), projection="cross", **options)
    assert not layer._forward_hooks


@pytest.mark.parametrize("tap", ["score", "softmax", "packed"])
@pytest.mark.parametrize(
    "name",
    ["cross", *(pytest.param(name, marks=pytest.mark.long) for name in ("feature", "oblique"))],
)
def test_compiled_in_one_graph_a_setup_gives_the_gradients_of_eager_code(tap, name):
    torch.compiler.reset()
    layer, x = build(tap), torch.randn(3, 9, WIDTH, dtype=torch.float64)
    model = nn.Sequential(layer)
    with attach(model, SpanScale(A, B), projection=name, preserve_norm=True):
        eager = gradients(model, model(x).pow(3).sum())
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(gradients(model, run(x).pow(3).sum()), eager)
    torch.compiler.reset()


def halves(grad, basis, other, *, ridge=None, mask=None):
    """A setup of one's own: the first half of the tokens."""
    first = torch.arange(grad.shape[-2]) < grad.shape[-2] // 2
    return grad * first[:, None]


def test_setups_go_by_layer_and_may_be_ones_own():
    model = nn.Sequential(*(build("score") for _ in range(3)))
    inputs = [torch.randn(3, 9, WIDTH, dtype=torch.float64) for _ in model]

    def loss(*hooks):
        outputs = (f(x, hook=h) for f, x, h in zip(model, inputs, hooks, strict=True))
        return sum(y.pow(3).sum() for y in outputs)

    def own(q, k):
        for x in (q, k):
            x.register_hook(lambda g, x=x: B * g + (A - B) * halves(g, x, x))
        return q, k

    plain = gradients(model, loss(None, None, None))
    reference = gradients(model, loss(oracle_hook("cross", True), own, oracle_hook("span")))
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        SpanScale(A, B),
        projection={"*": "span", "0": "cross", "1": halves},
        preserve_norm={"0": True},
    )
    for _ in range(2):
        actual = gradients(model, loss(None, None, None))
        assert_same(actual, reference)
        assert_other(actual, plain)
        optimizer = copy.deepcopy(optimizer)
        model = optimizer.model


WRONG = {
    "no such": (
        {"projection": "spam"},
        ValueError,
        "no projection is named 'spam': there are span,",
    ),
    "no layer": ({"projection": {"x.*": "cross"}}, ValueError, r"projection\['x.\*'\] matches no"),
    "a number": ({"projection": 3}, TypeError, "a projection is one of span"),
    "no flag": ({"preserve_norm": 1}, TypeError, "preserve_norm is True or False"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_setup_is_an_error_and_installs_nothing(options, error, message):
    layer = build("score")
    with pytest.raises(error, match=message):
        attach(layer, SpanScale(A, B), **options)
    assert not layer._forward_hooks


@pytest.mark.parametrize("violation", [0.0, 0.5])
@pytest.mark.parametrize("name", SETUPS)
def test_a_node_takes_numbers_as_it_takes_tensors(name, violation):
    g, q, k = inputs((2, 3, 9, 4))
    grads = []
    for factor in (float, lambda value: torch.tensor(value, dtype=torch.float64)):
        x = q.clone().requires_grad_()
        node = span_node(x, factor(2.0), factor(violation), projection=name, other=k)
        grads += torch.autograd.grad(node, x, g)
    parallel = SETUPS[name](g, q, k)
    torch.testing.assert_close(grads[0], 2 * parallel + violation * (g - parallel))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tap", ["score", "softmax"])
def test_a_setup_that_does_not_go_with_a_layer_is_an_error_that_names_it(tap):
    model = nn.ModuleDict({"attn": Attention(tap).double()})
    x, context = (torch.randn(2, n, WIDTH, dtype=torch.float64) for n in (9, 7))
    with attach(model, SpanScale(2.0, 1.0), projection="cross"):
        with pytest.raises(ValueError, match="layer 'attn': the projection 'cross' needs as many"):
            model["attn"](x, context)
        model["attn"](x)
    with attach(model, SpanScale(2.0, 1.0), projection="feature"):
        model["attn"](x, context).sum().backward()
        documents = torch.tensor([[1] * 4 + [2] * 5] * 2)
        with token_mask(documents), pytest.raises(ValueError, match="layer 'attn': token_mask"):
            model["attn"](x)
    grouped = Attention("score", kv_heads=2).double()
    with (
        attach(grouped, SpanScale(2.0, 1.0), projection="oblique"),
        pytest.raises(ValueError, match="as many heads"),
    ):
        grouped(x)


# Setups of one's own.


def spec(tap):
    """Return the arguments that have a layer's Q and K reached by this tap."""
    fields = {"query": "q_proj", "key": "k_proj", "num_heads": HEADS}
    return {"qk_modules": {"": fields}} if tap == "projection" else {}


def own_hook(function):
    def hook(q, k):
        for x in (q, k):
            x.register_hook(lambda g, x=x: B * g + (A - B) * function(g, x, None))
        return q, k

    return hook


TAPS = ["score", "softmax", "packed", "projection"]


@pytest.fixture
def first_half():
    """A setup that is registered by a few lines outside of the package."""
    setup("first half", needs_other=False)(halves)
    yield "first half"
    del SETUPS["first half"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tap", TAPS)
def test_a_registered_setup_is_used_by_name_in_every_tap(first_half, tap, compiled):
    torch.compiler.reset()
    layer, x = build(tap), torch.randn(3, 9, WIDTH, dtype=torch.float64)
    reference = gradients(layer, layer(x, hook=own_hook(halves)).pow(3).sum())
    with attach(layer, SpanScale(A, B), projection=first_half, **spec(tap)):
        run = torch.compile(layer, backend="aot_eager") if compiled else layer
        assert_same(gradients(layer, run(x).pow(3).sum()), reference)


def test_a_name_is_given_to_one_setup():
    with pytest.raises(ValueError, match="a projection is named 'cross' already"):
        setup("cross", needs_other=False)(halves)
    assert SETUPS["cross"].needs_other


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tap", TAPS)
def test_a_function_is_carried_by_value_through_every_tap(tap, compiled):
    torch.compiler.reset()
    layer, x = build(tap), torch.randn(3, 9, WIDTH, dtype=torch.float64)
    for factor in (0.5, 0.25):

        def part(grad, basis, other, *, ridge=None, mask=None, factor=factor):
            return factor * grad

        own = Setup("part", part, needs_other=False)
        reference = gradients(layer, layer(x, hook=own_hook(part)).pow(3).sum())
        with attach(layer, SpanScale(A, B), projection=own, **spec(tap)):
            run = torch.compile(layer, backend="aot_eager") if compiled else layer
            assert_same(gradients(layer, run(x).pow(3).sum()), reference)


def test_functions_leave_the_registry_as_it_was():
    before = dict(SETUPS)
    gc.collect()
    alive = len(registry._carried)
    for i in range(50):
        layer = build("score")
        part = lambda g, x, other, i=i, **_: g * i  # noqa: E731
        with attach(layer, SpanScale(A, B), projection=part):
            gradients(layer, layer(torch.randn(1, 3, WIDTH, dtype=torch.float64)).sum())
    assert before == SETUPS
    del layer, part
    gc.collect()
    assert len(registry._carried) <= alive + 1  # the last one may be held by a frame


def test_a_setup_is_copied_and_pickled_as_what_it_stands_for():
    own = Setup("own", halves, needs_other=False)
    assert copy.deepcopy(own) is own
    assert pickle.loads(pickle.dumps(SETUPS["cross"])) is SETUPS["cross"]
    again = pickle.loads(pickle.dumps(own))
    assert (again.name, again.function, again.needs_other) == ("own", halves, False)


@pytest.mark.parametrize(
    "name", ["cross", "oblique", "feature", pytest.param(halves, id="function")]
)
def test_a_node_that_needs_the_other_side_refuses_to_go_without(name):
    with pytest.raises(ValueError, match=r"span_node.*needs the other side's tensor"):
        span_node(torch.ones(5, 2), 2.0, 1.0, projection=name)
    with pytest.raises(ValueError, match="needs the other side's tensor"):
        Setup.of(name)(torch.ones(5, 2), torch.ones(5, 2))


def test_where_sides_are_seen_one_by_one_a_function_must_say_that_it_reads_one():
    layer, x = build("softmax"), torch.randn(3, 9, WIDTH, dtype=torch.float64)
    others = []

    def spy(grad, basis, other, *, ridge=None, mask=None):
        others.append(other)
        return grad * 0

    with pytest.raises(ValueError, match=r"layer '': .*spy' needs queries and keys at once"):
        attach(layer, SpanScale(A, B), projection=spy, **spec("projection"))
    assert not layer._forward_hooks
    own = Setup("spy", spy, needs_other=False)
    with attach(layer, SpanScale(A, B), projection=own, **spec("projection")):
        gradients(layer, layer(x).pow(3).sum())
    assert others == [None, None]
