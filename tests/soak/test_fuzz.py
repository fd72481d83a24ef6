"""The public interface under generated arguments: right, or an error that is documented."""

import contextlib
import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import Decoder, loss_of
from oracle import rescaled
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from spanopt import (
    SpanScale,
    SpanScaledOptimizer,
    SpanScheduler,
    attach,
    decompose,
    find_attention,
    project,
    rescale,
    token_mask,
)
from spanopt.schedules import constant, linear, piecewise

LAYERS = ("blocks.0.attn", "blocks.1.attn")


def finite(bound=4.0):
    return st.floats(-bound, bound, allow_nan=False, width=32)


# The tensor functions.


@st.composite
def matrices(draw):
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(0, 9)))
    d = draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    basis = torch.randn(*shape, d, generator=generator, dtype=torch.float64)
    kind = draw(
        st.sampled_from(["full", "zero", "repeated column", "zero column", "large", "small"])
    )
    if kind == "zero":
        basis = basis * 0
    elif kind == "repeated column":
        basis[..., -1] = basis[..., 0]
    elif kind == "zero column":
        basis[..., 0] = 0
    elif kind in ("large", "small"):
        basis = basis * (1e3 if kind == "large" else 1e-3)
    x = torch.randn(*shape, d, generator=generator, dtype=torch.float64)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < 0.7
    return basis.to(dtype), x.to(dtype), mask


@given(matrices(), finite(), finite())
def test_rescaling_equals_the_oracle_for_any_shape_dtype_and_mask(given, a, b):
    basis, grad, mask = given
    actual = rescale(grad, basis, parallel=a, violation=b, mask=mask)
    assert actual.shape == grad.shape
    assert actual.dtype == grad.dtype
    masked = basis if mask is None else basis * mask[..., None]
    expected = torch.as_tensor(
        rescaled(grad.double().numpy(), masked.double().numpy(), a, b), dtype=torch.float64
    )
    size = grad.double().abs().max() if grad.numel() else torch.tensor(0.0)
    tolerance = {
        torch.float64: 1e-7,  # of a basis with repeated columns
        torch.float32: 2e-4,
        torch.bfloat16: 5e-2,
        torch.float16: 1e-2,
    }[grad.dtype] * (1 + abs(a) + abs(b))
    if grad.numel():
        assert (actual.double() - expected).abs().max() <= tolerance * size
    parallel, violation = decompose(grad, basis, mask=mask)
    torch.testing.assert_close(parallel + violation, grad, rtol=0.05, atol=0.05)
    again = project(basis, parallel, mask=mask)
    if grad.numel() and grad.dtype == torch.float64:
        assert (again - parallel).abs().max() <= 1e-7 * size


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
    st.just(torch.ones(2, 3)),
    st.just(torch.ones(3, 2, dtype=torch.complex64)),
    st.just(torch.ones(3, 2, dtype=torch.int64)),
    st.just(torch.ones(3, 2).to_sparse()),
)


@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_tensor_functions_refuse_what_is_no_such_thing(first, second, number, mask):
    for call in (
        lambda: project(first, second, ridge=number, mask=mask),
        lambda: rescale(first, second, parallel=number, violation=1.0, mask=mask),
    ):
        with contextlib.suppress(TypeError, ValueError):
            call()


# Scales.

FACTORS = st.one_of(finite(), st.lists(finite(), min_size=4, max_size=4), st.integers(-3, 3))
PAIRS = st.tuples(FACTORS, FACTORS)
SCALES = st.one_of(
    PAIRS,
    st.builds(SpanScale, FACTORS, FACTORS),
    st.builds(SpanScale, FACTORS, FACTORS, query=PAIRS, key=st.one_of(st.none(), PAIRS)),
    st.fixed_dictionaries({"parallel": FACTORS, "violation": FACTORS}),
    st.none(),
)
KEYS = st.sampled_from(["*", "blocks.*", "*.0.*", "blocks.[01].attn", "blocks.?.attn", *LAYERS])


def of_layer(scales, layer):
    """The rules of the dict, written once more."""
    if layer in scales:
        return scales[layer]
    patterns = {
        "*": LAYERS,
        "blocks.*": LAYERS,
        "*.0.*": LAYERS[:1],
        "blocks.[01].attn": LAYERS,
        "blocks.?.attn": LAYERS,
    }
    for key in reversed(scales):
        if layer in patterns.get(key, ()):
            return scales[key]
    return None


def in_oracles_terms(scale):
    sides = SpanScale.of(scale) if scale is not None else SpanScale(1.0, 1.0)
    return {side: sides.side(side) for side in ("query", "key")}


def by_head(x, pair):
    """Return a hook by the oracle, which takes numbers, with those of each head."""
    pairs = [tuple(f[h] if isinstance(f, tuple) else f for f in pair) for h in range(4)]

    def hook(grad):
        heads = (
            torch.as_tensor(rescaled(grad[:, h].numpy(), x[:, h].detach().numpy(), *pair))
            for h, pair in enumerate(pairs)
        )
        return torch.stack(list(heads), dim=1)

    return hook


def reference_gradients(model, batch, scales):
    x = model.embed(batch)
    for i, block in enumerate(model.blocks):
        sides = in_oracles_terms(of_layer(scales, LAYERS[i]))
        attn = block["attn"]
        q, k, v = attn.project(block["norm"](x))
        q, k = q * 1.0, k * 1.0
        q.register_hook(by_head(q, sides["query"]))
        k.register_hook(by_head(k, sides["key"]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attn.out_proj(y.transpose(1, 2).flatten(-2))
        x = x + block["mlp"](x)
    model.zero_grad()
    loss_of(model.head(x), batch).backward()
    return [p.grad.clone() for p in model.parameters()]


@given(
    st.dictionaries(KEYS, SCALES, min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(0, 1000),
)
def test_any_dict_of_scales_gives_the_oracles_gradients(scales, batch, length, seed):
    torch.manual_seed(seed)
    model = Decoder().double()
    batch = torch.randint(11, (batch, length))
    with attach(model, scales):
        model.zero_grad()
        loss_of(model(batch), batch).backward()
        actual = [p.grad.clone() for p in model.parameters()]
    expected = reference_gradients(model, batch, scales)
    size = max(grad.abs().max() for grad in expected)
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).abs().max() <= 1e-8 * size


BAD_KEYS = st.one_of(st.text(max_size=12), st.integers(), st.none(), KEYS)


@pytest.mark.filterwarnings("ignore:no scales were given")
@given(st.one_of(ANYTHING, st.dictionaries(BAD_KEYS, st.one_of(ANYTHING, SCALES), max_size=3)))
def test_what_is_no_dict_of_scales_is_refused_and_installs_nothing(scales):
    model = Decoder()
    bare = SGD(model.parameters(), lr=0.1)
    try:
        optimizer = SpanScaledOptimizer(bare, model, scales)
    except (TypeError, ValueError):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        return
    pair = isinstance(scales, (tuple, list)) and len(scales) == 2  # the same for all layers
    assert scales is None or pair or isinstance(scales, (dict, SpanScale))
    for group in optimizer.span_groups:
        assert math.isfinite(torch.as_tensor(group["parallel"]).sum())
    batch = torch.zeros(2, 5, dtype=torch.long)
    try:
        loss_of(model(batch), batch).backward()
    except ValueError as error:
        assert "per-head values" in str(error)  # noqa: PT017
    optimizer.detach()


# Masks.


@st.composite
def token_masks(draw):
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    kind = draw(st.sampled_from(["bool", "documents", "int8"]))
    low, high = {"bool": (0, 1), "documents": (0, 3), "int8": (0, 1)}[kind]
    values = draw(
        st.lists(
            st.lists(st.integers(low, high), min_size=length, max_size=length),
            min_size=rows,
            max_size=rows,
        )
    )
    dtype = {"bool": torch.bool, "documents": torch.int64, "int8": torch.int8}[kind]
    return torch.tensor(values).to(dtype)


class Bare(nn.Module):
    """Attention without projections, so that the gradients of Q and K are those of the inputs."""

    def __init__(self, softmax):
        super().__init__()
        self.softmax = softmax
        self.q_proj = self.k_proj = nn.Identity()

    def forward(self, q, k, v):
        if self.softmax:
            return (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


@given(token_masks(), st.integers(1, 4), st.booleans(), finite(), finite(), st.integers(0, 999))
def test_any_token_mask_gives_each_document_its_own_span(mask, d, softmax, a, b, seed):
    torch.manual_seed(seed)
    rows, length = mask.shape
    q, k, v = (torch.randn(rows, 2, length, d, dtype=torch.float64) for _ in range(3))
    model, plain = Bare(softmax), []
    for x in (q, k):
        x.requires_grad_()
    model(q * 1, k * 1, v).pow(3).sum().backward()
    plain = [x.grad.clone() for x in (q, k)]
    q.grad = k.grad = None
    with attach(model, SpanScale(a, b)), token_mask(mask):
        model(q * 1, k * 1, v).pow(3).sum().backward()
    for x, grad in zip((q, k), plain, strict=True):
        expected = b * grad
        for row in range(rows):
            for number in range(1, int(mask.max()) + 1):
                at = mask[row] == number
                if at.any():
                    g, basis = (y[row][:, at].detach().numpy() for y in (grad, x))
                    expected[row][:, at] = torch.as_tensor(rescaled(g, basis, a, b))
        size = grad.abs().max() + 1e-6
        assert (x.grad - expected).abs().max() <= 1e-8 * size * (1 + abs(a) + abs(b))


@given(st.one_of(ANYTHING, token_masks(), st.dictionaries(BAD_KEYS, token_masks(), max_size=2)))
def test_what_is_no_token_mask_is_refused(mask):
    model = Decoder()
    batch = torch.zeros(2, 5, dtype=torch.long)
    with attach(model, SpanScale(2.0, 1.0)) as hooks:
        try:
            with token_mask(mask):
                loss_of(model(batch), batch).backward()
        except (TypeError, ValueError):
            pass
        loss_of(model(batch), batch).backward()
        assert hooks.unseen() == []


# Orders of calls.


class Orders(RuleBasedStateMachine):
    """A model, its optimizer, and an account of what the scales must be by now."""

    @initialize(seed=st.integers(0, 99))
    def start(self, seed):
        torch.manual_seed(seed)
        self.model = Decoder(layers=2)
        self.optimizer = self.scheduler = self.saved = None
        self.bare = SGD(self.model.parameters(), lr=0.01)
        self.scales = {}

    def wrapped(self):
        return self.optimizer is not None

    @precondition(lambda self: not self.wrapped())
    @rule(scales=st.dictionaries(st.sampled_from(["*", *LAYERS]), SCALES, min_size=1, max_size=3))
    def wrap(self, scales):
        self.optimizer = SpanScaledOptimizer(self.bare, self.model, scales)
        self.scales = {
            layer: SpanScale.of(of_layer(scales, layer))
            for layer in LAYERS
            if of_layer(scales, layer) is not None
        }

    @precondition(lambda self: self.wrapped())
    @rule()
    def detach(self):
        self.optimizer.detach()
        self.optimizer = self.scheduler = None
        self.scales = {}

    @precondition(lambda self: self.wrapped())
    @rule()
    def wrap_once_more(self):
        try:
            SpanScaledOptimizer(self.bare, self.model, SpanScale(2.0, 1.0))
        except ValueError as error:
            assert "scaled already" in str(error)  # noqa: PT017
        else:
            assert not self.scales
            self.optimizer.detach()
            self.optimizer = self.scheduler = None

    @precondition(lambda self: self.wrapped() and self.scales)
    @rule(data=st.data(), field=st.sampled_from(["parallel", "violation"]), value=finite())
    def edit(self, data, field, value):
        group = data.draw(st.sampled_from(self.optimizer.span_groups))
        group[field] = value
        self.scales[group["name"]] = group.scale

    @precondition(lambda self: self.wrapped() and self.scales)
    @rule(
        data=st.data(), value=st.sampled_from([math.nan, math.inf, "2", [], [1.0] * 3, (1, 2, 3)])
    )
    def edit_badly(self, data, value):
        group = data.draw(st.sampled_from(self.optimizer.span_groups))
        side = data.draw(st.sampled_from(["parallel", "query"]))
        try:
            group[side] = value
        except (TypeError, ValueError):
            return
        self.scales[group["name"]] = group.scale  # a number of heads that is not known yet
        group[side] = 1.0 if side == "parallel" else None
        self.scales[group["name"]] = group.scale

    @rule(rows=st.integers(1, 3), length=st.integers(1, 6))
    def train(self, rows, length):
        batch = torch.randint(11, (rows, length))
        optimizer = self.optimizer or self.bare
        optimizer.zero_grad()
        loss_of(self.model(batch), batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()

    @rule()
    def step_without_a_backward_pass(self):
        (self.optimizer or self.bare).zero_grad()
        (self.optimizer or self.bare).step()

    @rule()
    def evaluate(self):
        with torch.no_grad():
            self.model(torch.zeros(1, 4, dtype=torch.long))

    @precondition(lambda self: self.wrapped())
    @rule()
    def save(self):
        self.saved = (set(self.scales), copy.deepcopy(self.optimizer.state_dict()))
        self.saved_scales = dict(self.scales)

    @precondition(lambda self: self.wrapped() and self.saved is not None)
    @rule()
    def load(self):
        layers, state = self.saved
        try:
            self.optimizer.load_state_dict(state)
        except ValueError:
            assert layers != set(self.scales)
        else:
            # With no scaled layer it is a bare optimizer's state, which leaves scales as they are.
            if layers:
                assert layers == set(self.scales)
                self.scales = dict(self.saved_scales)

    @precondition(lambda self: self.wrapped() and self.scales and self.scheduler is None)
    @rule(schedule=st.sampled_from([constant(0.5), linear(3), piecewise({0: (2.0, 1.0), 2: 0.0})]))
    def schedule(self, schedule):
        self.scheduler = SpanScheduler(self.optimizer, schedule)
        self.scales |= self.scheduler.get_last_scale()

    @precondition(lambda self: self.scheduler is not None)
    @rule()
    def step_the_schedule(self):
        self.scheduler.step()
        self.scales |= self.scheduler.get_last_scale()

    @rule()
    def copy_the_model(self):
        twin = copy.deepcopy(self.model)
        assert not any(m._forward_hooks for m in twin.modules() if len(m._forward_hooks) > 1)
        assert [site.name for site in find_attention(twin)] == list(LAYERS)

    @invariant()
    def scales_are_as_accounted_for(self):
        if getattr(self, "optimizer", None) is not None:
            groups = self.optimizer.span_groups
            assert {group["name"]: group.scale for group in groups} == self.scales

    @invariant()
    def no_mode_is_entered(self):
        assert torch.overrides._get_current_function_mode_stack() == []

    def teardown(self):
        if getattr(self, "optimizer", None) is not None:
            self.optimizer.detach()
        if hasattr(self, "model"):
            assert not any(m._forward_hooks for m in self.model.modules())


TestOrders = Orders.TestCase
