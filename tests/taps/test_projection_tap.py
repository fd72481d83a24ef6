"""Attention in a kernel that nothing can see into: Q and K are what the named modules return."""

import copy
import functools
import math
import pickle
import sys

import pytest
import torch
from compare import assert_close
from models import Decoder, ScoreAttention, gradients, loss_of, oracle_hook, tokens
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from spanopt import (
    SpanScale,
    SpanScaledOptimizer,
    UnscaledLayerError,
    attach,
    find_attention,
    token_mask,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch._prims_common.check.*", "ignore:.*flex_attention called without.*"
)

WIDTH, HEADS, HEAD_DIM = 16, 4, 4
SCALES = {"query": (2.0, 0.5), "key": (3.0, 1.0)}
SCALE = SpanScale(**SCALES)
PER_HEAD = {"query": ([1.0, 2.0, 3.0, 4.0], 0.5), "key": ([3.0, 2.0], [1.0, -1.0])}


@torch.library.custom_op("spanopt_tests::attention", mutates_args=())
def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Softmax attention; nothing that watches torch functions sees into it."""
    return _weights(q, k, bias) @ v


def _weights(q, k, bias):
    return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)


@kernel.register_fake
def _(q, k, v, bias):
    return q.new_empty(q.shape)


@torch.library.custom_op("spanopt_tests::attention_backward", mutates_args=())
def kernel_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = _weights(q, k, bias)
    of_weights = grad @ v.mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_scores = of_scores / math.sqrt(q.shape[-1])
    return of_scores @ k, of_scores.mT @ q, weights.mT @ grad


@kernel_backward.register_fake
def _(q, k, v, bias, grad):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


kernel.register_autograd(
    lambda ctx, grad: (*kernel_backward(*ctx.saved_tensors, grad.contiguous()), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Attention(nn.Module):
    """Rotary attention in a kernel, with the projections in one of the usual arrangements."""

    def __init__(self, width=WIDTH, heads=HEADS, *, kv_heads=None, fused="", layout="concatenated"):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.layout = layout
        d = width // heads
        sizes = {"wq": heads * d, "wk": self.kv_heads * d, "wv": self.kv_heads * d}
        if fused:  # "wqkv", "wqk" or "wkv"
            sizes[fused] = sum(sizes.pop(f"w{letter}") for letter in fused[1:])
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(width, size))
        self.wo = nn.Linear(heads * d, width)
        self.register_buffer("angles", torch.arange(64.0)[:, None] / torch.arange(1, d // 2 + 1))

    def project(self, x):
        """Return Q, K and V by head, before rotary embedding."""
        parts = {}
        counts = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        for name, module in self.named_children():
            letters = name[1:]
            if name == "wo":
                continue
            blocks = self.kv_heads if len(letters) > 1 and self.layout == "interleaved" else 1
            own = [counts[letter] // blocks for letter in letters]
            y = module(x)
            y = y.view(*y.shape[:-1], blocks, sum(own), -1).split(own, dim=-2)
            for letter, part in zip(letters, y, strict=True):
                parts[letter] = part.flatten(-3, -2).transpose(-3, -2)
        return parts["q"], parts["k"], parts["v"]

    def rotate(self, x):
        angles = self.angles[: x.shape[-2]]
        a, b = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def attend(self, q, k, v, bias=None):
        q, k = self.rotate(q), self.rotate(k)
        if self.kv_heads != self.heads:
            k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=-3) for y in (k, v))
        bias = q.new_zeros(q.shape[-2], k.shape[-2]) if bias is None else bias
        return self.wo(kernel(q, k, v, bias).transpose(-3, -2).flatten(-2))

    def forward(self, x, bias=None):
        return self.attend(*self.project(x), bias)

    def reference(self, x, query=(2.0, 1.0), key=(2.0, 1.0)):
        q, k, v = self.project(x)
        return self.attend(oracle_hook(q * 1.0, *query), oracle_hook(k * 1.0, *key), v)


ARRANGEMENTS = {
    "separate": ("", {"query": "wq", "key": "wk"}),
    "qkv": ("wqkv", {"qkv": "wqkv"}),
    "qk": ("wqk", {"qk": "wqk"}),
    "query, kv": ("wkv", {"query": "wq", "kv": "wkv"}),
}
CASES = [
    (arrangement, layout, kv_heads)
    for arrangement in ARRANGEMENTS
    for layout in ("concatenated", "interleaved")
    for kv_heads in (HEADS, 2, 1)
    if arrangement != "separate" or layout == "concatenated"
]
every_case = pytest.mark.parametrize(("arrangement", "layout", "kv_heads"), CASES)
MAP = {"query": "wq", "key": "wk", "num_heads": HEADS}


def case(arrangement, layout, kv_heads):
    """Return a class of layers and its entry of ``qk_modules``."""
    fused, spec = ARRANGEMENTS[arrangement]
    layer = functools.partial(Attention, kv_heads=kv_heads, fused=fused, layout=layout)
    spec = {**spec, "num_heads": HEADS}
    if kv_heads != HEADS:
        spec["num_kv_heads"] = kv_heads
    if layout != "concatenated":
        spec["layout"] = layout
    return layer, spec


def decoder(layer=Attention, layers=2):
    return Decoder(attention=layer, layers=layers).double()


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def total(parts):
    parts = list(parts)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def assert_differ(actual, expected, least=1e-4):
    size = max(value.abs().max() for value in expected.values())
    assert max((actual[name] - expected[name]).abs().max() for name in expected) > least * size


def snapshot(model):
    """Everything the modules hold, hooks included."""
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def train_step(model, batch, reference=None):
    return gradients(model, loss_of(model(batch, reference), batch))


@every_case
def test_gradients_are_the_oracles(arrangement, layout, kv_heads):
    layer, spec = case(arrangement, layout, kv_heads)
    model, batch = decoder(layer), tokens()
    before, plain = model(batch), train_step(model, batch)
    expected = train_step(model, batch, {f"blocks.{i}.attn": SCALES for i in range(2)})
    with attach(model, SCALE, qk_modules={"blocks.*.attn": spec}) as hooks:
        assert torch.equal(model(batch), before)
        assert_close(train_step(model, batch), expected)
        assert hooks.unseen() == []
    found = [(site.tap, site.heads, site.kv_heads, site.head_dim) for site in hooks.sites]
    assert found == [("projection", HEADS, kv_heads, HEAD_DIM)] * 2
    assert [(site.query_length, site.key_length) for site in hooks.sites] == [(9, 9)] * 2
    assert_differ(expected, plain)


@pytest.mark.parametrize(
    "scales",
    [
        PER_HEAD,
        {"query": (2.0, 0.5), "key": (1.0, 1.0)},
        {"query": (1.0, 1.0), "key": (2.0, 0.5)},
        {"query": (2.0, 2.0), "key": (3.0, 0.5)},
        {"query": PER_HEAD["query"], "key": (0.0, 0.0)},
    ],
    ids=["per head", "query", "key", "uniform query", "no key"],
)
@pytest.mark.parametrize(
    ("arrangement", "layout"), sorted({(name, layout) for name, layout, _ in CASES})
)
def test_sides_and_heads_are_scaled_by_their_own(arrangement, layout, scales):
    layer, spec = case(arrangement, layout, 2)
    model, batch = decoder(layer, 1), tokens()
    expected = train_step(model, batch, {"blocks.0.attn": scales})
    with attach(model, SpanScale(**scales), qk_modules={"blocks.0.attn": spec}):
        assert_close(train_step(model, batch), expected)


def test_scales_of_one_leave_the_output_alone():
    layer = Attention()
    outputs = []
    with attach(layer, SpanScale(1.0, 1.0), qk_modules={"": MAP}):
        layer.wq.register_forward_hook(lambda module, args, result: outputs.append(result))
        layer(torch.randn(2, 9, WIDTH))
    assert outputs[0].grad_fn.name().startswith(("View", "UnsafeView", "Addmm"))


@pytest.mark.parametrize("shape", [(9,), (2, 3, 9)], ids=["no batch", "two batch dimensions"])
def test_any_number_of_batch_dimensions(shape):
    layer, x = Attention().double(), normal(*shape, WIDTH)
    expected = gradients(layer, layer.reference(x, **SCALES).pow(3).sum())
    with attach(layer, SCALE, qk_modules={"": MAP}):
        assert_close(gradients(layer, layer(x).pow(3).sum()), expected)


def test_the_scaled_optimizer_takes_projections_and_lets_go_of_them():
    model, batch = decoder(layers=1), tokens()
    before = snapshot(model)
    expected = train_step(model, batch, {"blocks.0.attn": SCALES})
    model.zero_grad()
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SpanScaledOptimizer(
        bare, model, SCALE, qk_modules={"blocks.*.attn": MAP}, example_inputs=(batch,)
    )
    assert "projection" in repr(optimizer)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(model(batch), batch).backward()
    optimizer.step()
    steps = {name: (start[name] - p.detach()) / 0.1 for name, p in model.named_parameters()}
    assert_close(steps, expected, 1e-9)
    optimizer.zero_grad()
    assert optimizer.detach() is bare
    assert snapshot(model) == before


def test_removal_takes_everything_off():
    model = decoder()
    before = snapshot(model)
    hooks = attach(model, SpanScale(2.0, 1.0), qk_modules={"blocks.*.attn": MAP})
    assert snapshot(model) != before
    hooks.remove()
    assert snapshot(model) == before


@pytest.mark.parametrize("factor", [0.0, 1.0, 1.5])
def test_equal_scales_project_nothing(factor):
    model, batch = decoder(), tokens()

    def flops(scale):
        with (
            attach(model, scale, qk_modules={"blocks.*.attn": MAP}),
            FlopCounterMode(display=False) as counter,
        ):
            grads = train_step(model, batch)
        return counter.get_total_flops(), grads

    plain, _ = flops(SpanScale(1.0, 1.0))
    uniform, grads = flops(SpanScale(factor, factor))
    assert uniform == plain < flops(SpanScale(factor, factor + 1))[0]
    almost = flops(SpanScale(factor, factor + 1e-13))[1]
    assert_close(grads, almost, 1e-9)


def test_without_violation_the_projection_is_all_there_is():
    model, batch = decoder(), tokens()
    grads = []
    for violation in (0.0, 1e-13):
        with attach(model, SpanScale(2.0, violation), qk_modules={"blocks.*.attn": MAP}):
            grads.append(train_step(model, batch))
    assert_close(*grads, 1e-9)


@pytest.mark.parametrize("pickled", [False, True], ids=["copied", "pickled"])
def test_a_copy_is_not_scaled_and_can_be(pickled):
    model, batch = decoder(), tokens()
    plain = train_step(model, batch)
    with attach(model, SCALE, qk_modules={"blocks.*.attn": MAP}):
        scaled = train_step(model, batch)
        twin = pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)
        assert_close(train_step(twin, batch), plain, 1e-14)
        with attach(twin, SCALE, qk_modules={"blocks.*.attn": MAP}):
            assert_close(train_step(twin, batch), scaled, 1e-14)
        assert_close(train_step(model, batch), scaled, 1e-14)
    assert not any(module._forward_hooks for module in twin.modules())
    assert_differ(scaled, plain)


@pytest.mark.parametrize("how", [("separate", "concatenated", 4), ("qkv", "interleaved", 4)])
def test_no_tensor_is_saved_that_the_kernel_does_not_save(how, monkeypatch):
    # Rotary embedding and repeated keys are copies, beside which what was projected is not kept.
    monkeypatch.setattr(Attention, "rotate", lambda self, x: x)
    layer, spec = case(*how)
    model, batch = decoder(layer), tokens()

    def saved(scale):
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with (
            attach(model, scale, qk_modules={"blocks.*.attn": spec}),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        ):
            model(batch)
            return len(storages), sum(storage.nbytes() for storage in storages.values())

    plain = saved(SpanScale(1.0, 1.0))
    assert plain[0] > 20
    assert saved(SCALE) == plain


# Padding and documents.


def bias_of(allowed):
    return torch.zeros(()).double().masked_fill(~allowed, -1e9)


@pytest.mark.parametrize("how", [("separate", "concatenated", 4), ("qkv", "interleaved", 2)])
def test_padding_and_documents_are_those_of_token_mask(how):
    layer, spec = case(*how)
    layer, x = layer().double(), normal(3, 12, WIDTH)
    documents = torch.tensor([[1] * 7 + [2] * 5, [1] * 5 + [3] * 6 + [0], [2] * 9 + [0] * 3])
    same = documents[:, None, :, None] == documents[:, None, None, :]
    single = documents.clamp(max=1)

    def run(x, real, allowed=None):
        y = layer(x) if allowed is None else layer(x, bias_of(allowed))
        return gradients(layer, y[real].pow(3).sum())

    def each_alone(documents):
        return total(
            run(x[i : i + 1, row == number], slice(None))
            for i, row in enumerate(documents)
            for number in row.unique()
            if number > 0
        )

    with attach(layer, SCALE, qk_modules={"": spec}):
        inputs = x, documents > 0, same
        expected = each_alone(documents)
        with token_mask(documents):
            assert_close(run(*inputs), expected)
        assert_differ(run(*inputs), expected)
        padded = (single > 0)[:, None, None]
        inputs, expected = (x, single > 0, padded), each_alone(single)
        for mask in (single, single > 0):
            with token_mask(mask):
                assert_close(run(*inputs), expected)
        assert_differ(run(*inputs), expected)  # the kernel's mask is not seen


# Which modules, and when.


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["blocks.0.attn", ""])
def test_a_layer_that_another_tap_sees_into_is_scaled_once(name, kv_heads):
    model = decoder(functools.partial(ScoreAttention, kv_heads=kv_heads), 1)
    batch = tokens()
    inside = "blocks.0.attn"[len(name) :].strip(".")
    inside = f"{inside}." if inside else ""
    spec = {"query": f"{inside}q_proj", "key": f"{inside}k_proj"}
    spec |= {"num_heads": 4, "num_kv_heads": kv_heads}
    expected = train_step(model, batch, {"blocks.0.attn": SCALES})
    with attach(model, SCALE, qk_modules={name: spec}) as hooks:
        assert [(site.name, site.tap) for site in hooks.sites] == [(name, "projection")]
        assert_close(train_step(model, batch), expected)


def test_layers_that_no_map_names_are_scaled_as_ever():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unseen = ScoreAttention(), Attention()

        def forward(self, x):
            return self.unseen(self.seen(x))

        def reference(self, x):
            return self.unseen.reference(self.seen.reference(x, **SCALES), **SCALES)

    model, x = Both().double(), normal(2, 9, WIDTH)
    expected = gradients(model, model.reference(x).pow(3).sum())
    with attach(model, SCALE, qk_modules={"unseen": MAP}) as hooks:
        assert_close(gradients(model, model(x).pow(3).sum()), expected)
        assert [(site.name, site.tap) for site in hooks.sites] == [
            ("seen", "score"),
            ("unseen", "projection"),
        ]
    one = {"unseen": None, "seen": SCALE}
    with attach(model, one, qk_modules={"unseen": MAP}):
        expected = model.unseen(model.seen.reference(x, **SCALES)).pow(3).sum()
        assert_close(gradients(model, model(x).pow(3).sum()), gradients(model, expected))


def test_a_projection_that_two_layers_share_is_scaled_by_each_layers_own():
    model, batch = decoder(), tokens()
    first, second = (block["attn"] for block in model.blocks)
    second.wq = first.wq
    scales = {"blocks.0.attn": SCALES, "blocks.1.attn": {"query": (4.0, 1.0), "key": (1.0, 1.0)}}
    expected = train_step(model, batch, scales)
    scale = {name: SpanScale(**sides) for name, sides in scales.items()}
    with attach(model, scale, qk_modules={"blocks.*.attn": MAP}):
        assert_close(train_step(model, batch), expected)


def test_a_projection_called_outside_its_layer_is_left_alone():
    layer, x = Attention().double(), normal(2, 9, WIDTH)
    plain = gradients(layer, layer.wq(x).pow(3).sum())
    expected = gradients(layer, (layer.reference(x, **SCALES) + layer.wq(x)).pow(3).sum())
    with attach(layer, SCALE, qk_modules={"": MAP}):
        assert_close(gradients(layer, layer.wq(x).pow(3).sum()), plain, 1e-14)
        assert_close(gradients(layer, (layer(x) + layer.wq(x)).pow(3).sum()), expected)


def test_a_layer_called_twice_is_scaled_on_each_calls_own():
    layer, x = Attention().double(), normal(2, 9, WIDTH)
    reference = layer.reference(layer.reference(x, **SCALES), **SCALES)
    expected = gradients(layer, reference.pow(3).sum())
    with attach(layer, SCALE, qk_modules={"": MAP}):
        assert_close(gradients(layer, layer(layer(x)).pow(3).sum()), expected)


def test_after_an_interrupt_a_projection_that_runs_elsewhere_is_left_alone():
    layer, x = Attention().double(), normal(2, 9, WIDTH)
    plain = gradients(layer, layer.wq(x).pow(3).sum())

    def interrupt(module, args):
        raise KeyboardInterrupt

    with attach(layer, SCALE, qk_modules={"": MAP}):
        handle = layer.wk.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            layer(x)
        handle.remove()
        assert_close(gradients(layer, layer.wq(x).pow(3).sum()), plain, 1e-14)


class Positions(Attention):
    """Adds projected positions to the keys, whose gradient is then that of two modules."""

    def __init__(self):
        super().__init__()
        self.wp = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("positions", torch.randn(9, WIDTH))

    def project(self, x, on_key=lambda k: k):
        k = on_key(self.wk(x))
        q, k, v = self.wq(x), k + self.wp(self.positions.expand_as(x)), self.wv(x)
        return tuple(y.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for y in (q, k, v))

    def reference(self, x, key):
        def on_key(k):
            by_head = oracle_hook(k.unflatten(-1, (HEADS, -1)).transpose(-3, -2) * 1.0, *key)
            return by_head.transpose(-3, -2).flatten(-2)

        return self.attend(*self.project(x, on_key))


def test_the_gradient_of_what_is_added_to_a_projection_is_left_alone():
    layer, x = Positions().double(), normal(2, 9, WIDTH)
    expected = gradients(layer, layer.reference(x, (3.0, 0.5)).pow(3).sum())
    with attach(layer, SpanScale(1.0, 1.0, key=(3.0, 0.5)), qk_modules={"": MAP}):
        assert_close(gradients(layer, layer(x).pow(3).sum()), expected)


class OneForBoth(Attention):
    """Queries and keys are the same tensor."""

    def __init__(self):
        super().__init__()
        del self.wk

    def project(self, x):
        q, v = (w(x).unflatten(-1, (HEADS, -1)).transpose(-3, -2) for w in (self.wq, self.wv))
        return q, q, v


def test_one_module_for_queries_and_keys_is_scaled_on_each_side_by_its_own_or_refused():
    layer, x = OneForBoth().double(), normal(2, 9, WIDTH)
    expected = gradients(layer, layer.reference(x, **SCALES).pow(3).sum())
    spec = {"query": "wq", "key": "wq", "num_heads": HEADS}
    try:
        hooks = attach(layer, SCALE, qk_modules={"": spec})
    except ValueError as error:
        assert "'wq'" in str(error)  # noqa: PT017
    else:
        with hooks:
            assert_close(gradients(layer, layer(x).pow(3).sum()), expected)


# Layers that are not as the map says.


class Scaling(Attention):
    """Scales the queries in place, in one of the usual ways."""

    def __init__(self, how, **options):
        super().__init__(**options)
        self.how = how

    def project(self, x):
        module = self.wqkv if hasattr(self, "wqkv") else self.wq
        handle = module.register_forward_hook(lambda module, args, y: self.how(y))
        try:
            return super().project(x)
        finally:
            handle.remove()


def times(y):
    y *= 0.5
    return y


def part(y):
    y[..., :WIDTH] *= 0.5
    return y


def view(y):
    y = y.view(*y.shape[:-1], HEADS, -1)
    y *= 0.5
    return y.flatten(-2)


@pytest.mark.parametrize(
    ("how", "fused"), [(times, ""), (view, ""), (times, "wqkv"), (part, "wqkv")]
)
def test_a_change_in_place_is_an_error_that_says_what_to_write(how, fused):
    model = nn.Sequential(Scaling(how, fused=fused)).double()
    x = normal(2, 9, WIDTH)
    plain = gradients(model, model(x).pow(3).sum())
    spec = {"qkv": "wqkv", "num_heads": HEADS} if fused else MAP
    message = r"layer '0' changes the output of a projection in place.* q = q \* scale"
    with attach(model, SCALE, qk_modules={"0": spec}):
        with pytest.raises(RuntimeError, match=message):
            model(x)
    assert_close(gradients(model, model(x).pow(3).sum()), plain, 1e-14)


@pytest.mark.parametrize(
    ("how", "fused"), [(times, ""), (view, ""), (times, "wqkv"), (part, "wqkv")]
)
def test_a_layer_that_is_said_to_change_them_in_place_gets_copies(how, fused):
    model, x = nn.Sequential(Scaling(how, fused=fused)).double(), normal(2, 9, WIDTH)
    spec = {"qkv": "wqkv", "num_heads": HEADS} if fused else MAP
    before, plain = model(x), gradients(model, model(x).pow(3).sum())
    elsewhere = nn.Sequential(Scaling(lambda y: how(y.clone()), fused=fused)).double()
    elsewhere.load_state_dict(model.state_dict())
    with attach(elsewhere, SCALE, qk_modules={"0": spec}):
        expected = gradients(elsewhere, elsewhere(x).pow(3).sum())
    with attach(model, SCALE, qk_modules={"0": {**spec, "in_place": True}}):
        assert torch.equal(model(x), before)
        actual = gradients(model, model(x).pow(3).sum())
    assert_close(actual, expected)
    of_queries, unscaled = (g[f"0.{fused or 'wq'}.weight"][:WIDTH] for g in (actual, plain))
    assert (of_queries - unscaled).abs().max() > 0.1 * unscaled.abs().max()


class TokensFirst(Attention):
    """Attention whose projections return (N, B, features)."""

    def project(self, x):
        y = x.transpose(0, 1)
        q, k, v = (
            module(y).unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3)
            for module in (self.wq, self.wk, self.wv)
        )
        return q, k, v


def test_projections_with_the_tokens_before_the_batch():
    model, x = TokensFirst().double(), normal(2, 9, WIDTH)
    expected = gradients(model, model.reference(x, **SCALES).pow(3).sum())
    real = torch.arange(9) < torch.tensor([[9], [7]])
    with attach(model, SCALE, qk_modules={"": {**MAP, "batch_first": False}}) as hooks:
        assert_close(gradients(model, model(x).pow(3).sum()), expected)
        (site,) = hooks.sites
        assert (site.heads, site.query_length) == (HEADS, 9)
        with token_mask(real):
            model(x).pow(3).sum().backward()
    with attach(model, SCALE, qk_modules={"": MAP}):
        wrong = gradients(model, model(x).pow(3).sum())
    assert (wrong["wq.weight"] - expected["wq.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("option", ["batch_first", "in_place"])
def test_options_of_the_outputs_are_true_or_false(option):
    with pytest.raises(ValueError, match=f"{option} must be True or False, got 'no'"):
        attach(Attention(), SCALE, qk_modules={"": {**MAP, option: "no"}})


class Changed(nn.Module):
    """A projection that is no ``nn.Linear``."""

    def __init__(self, linear, change):
        super().__init__()
        self.linear, self.change = linear, change

    def forward(self, x):
        return self.change(self.linear(x))


CHANGES = {
    "no multiple of the heads": (
        lambda y: y[..., :14],
        ValueError,
        r"layer '0': 'wq' has 14 output features, which do not divide into the 4 heads",
    ),
    "another head dimension": (
        lambda y: y[..., :8],
        ValueError,
        r"layer '0': the query's heads have 2 features and the key's 4; check num_heads",
    ),
    "tuple": (
        lambda y: (y, None),
        TypeError,
        r"layer '0': 'wq' must return a tensor \(..., N, features\).*, got tuple",
    ),
    "one dimension": (lambda y: y[0, 0], TypeError, r"layer '0': 'wq' must return a tensor"),
    "complex": (lambda y: y + 1j, TypeError, r"layer '0': the wq tensor must be dense.*complex"),
    "sparse": (lambda y: y.to_sparse(), TypeError, r"layer '0': the wq tensor must be dense"),
    "nested": (
        lambda y: torch.nested.as_nested_tensor(list(y.unbind())),
        TypeError,
        r"layer '0': the wq tensor must be dense.* of size nested",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_output_that_does_not_fit_is_an_error_at_the_first_forward(change):
    change, error, message = CHANGES[change]
    model, x = nn.Sequential(Attention()).double(), normal(2, 9, WIDTH)
    model[0].wq = Changed(model[0].wq, change)
    before = snapshot(model)
    with attach(model, SpanScale(2.0, 1.0), qk_modules={"0": MAP}):
        with pytest.raises(error, match=message):
            model(x)
    with pytest.raises(error, match=message):
        attach(model, SpanScale(2.0, 1.0), qk_modules={"0": MAP}, example_inputs=x)
    assert snapshot(model) == before


def test_keys_of_another_head_dimension_are_an_error_at_the_first_forward_at_the_latest():
    model = nn.Sequential(Attention(kv_heads=2)).double()
    with pytest.raises(ValueError, match=r"layer '0'.* 4 .* 2; check num_heads and num_kv_heads"):
        attach(
            model, SpanScale(2.0, 1.0), qk_modules={"0": MAP}, example_inputs=normal(2, 9, WIDTH)
        )


def test_a_wrong_number_of_per_head_values_is_an_error():
    model = nn.Sequential(Attention(kv_heads=2)).double()
    spec, scale = {**MAP, "num_kv_heads": 2}, SpanScale(query=([1, 2], 1), key=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"layer '0': 2 per-head values .* has 4 heads"):
        attach(model, scale, qk_modules={"0": spec}, example_inputs=normal(2, 9, WIDTH))


HERE = r"qk_modules\['blocks.0.attn'\]"
ONE = "blocks.0.attn"
WRONG = {
    "no dict": ([MAP], TypeError, "qk_modules must be a dict from layer names"),
    "no dict inside": ({ONE: "wq"}, TypeError, rf"{HERE} must be a dict .*, got str"),
    "unknown field": ({ONE: {**MAP, "heads": 4}}, ValueError, rf"{HERE}.*'heads'"),
    "no number of heads": (
        {ONE: {"query": "wq", "key": "wk"}},
        ValueError,
        rf"{HERE}: num_heads and num_kv_heads must be whole numbers of at least 1, got None",
    ),
    "qkv and query": ({ONE: {**MAP, "qkv": "wq"}}, ValueError, rf"{HERE} must name 'query' and"),
    "query alone": ({ONE: {"query": "wq", "num_heads": 4}}, ValueError, f"{HERE} must name"),
    "kv alone": ({ONE: {"kv": "wk", "num_heads": 4}}, ValueError, f"{HERE} must name"),
    "nothing": ({ONE: {}}, ValueError, f"{HERE} must name"),
    "missing module": (
        {ONE: {**MAP, "key": "k"}},
        ValueError,
        rf"{HERE}: 'key' names 'k', .*it has \['wq', 'wk', 'wv', 'wo'\]",
    ),
    "no name": ({ONE: {**MAP, "key": None}}, ValueError, rf"{HERE}: 'key' names None"),
    "number for a name": ({ONE: {**MAP, "key": 1}}, ValueError, rf"{HERE}: 'key' names 1"),
    "parameter": ({ONE: {**MAP, "key": "wk.weight"}}, ValueError, "'key' names 'wk.weight'"),
    "sizes": (
        {ONE: {**MAP, "num_heads": 3}},
        ValueError,
        r"layer 'blocks.0.attn': 'wq' has 16 output features, which do not divide into the 3",
    ),
    "sizes of keys": (
        {ONE: {**MAP, "num_heads": 16, "num_kv_heads": 1, "key": "long"}},
        ValueError,
        "'key' names 'long'",
    ),
    "groups": (
        {ONE: {**MAP, "num_kv_heads": 3}},
        ValueError,
        rf"{HERE}: 4 query heads do not divide into groups for 3 key heads",
    ),
    "more key heads": ({ONE: {**MAP, "num_kv_heads": 8}}, ValueError, f"{HERE}: 4 query heads"),
    **{
        f"{field}={count!r}": (
            {ONE: {**MAP, field: count}},
            ValueError,
            rf"{HERE}: num_heads and num_kv_heads must be whole",
        )
        for field in ("num_heads", "num_kv_heads")
        for count in (True, 0, -4, "8", 4.0)
    },
    "layout": ({ONE: {**MAP, "layout": "qkv"}}, ValueError, f"{HERE}: layout must be .*'qkv'"),
    "unhashable layout": ({ONE: {**MAP, "layout": []}}, ValueError, f"{HERE}: layout must be"),
    "no such layer": ({"blocks.7": MAP}, ValueError, "'blocks.7' matches no module of Decoder"),
    "no such layers": ({"*.atn": MAP}, ValueError, r"'\*.atn' .*'blocks.0.attn', 'blocks.1.attn'"),
    "matched twice": (
        {"blocks.*.attn": MAP, ONE: MAP},
        ValueError,
        "layer 'blocks.0.attn' is matched more than once",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("wrapped", [False, True], ids=["attach", "optimizer"])
def test_a_wrong_map_is_an_error_that_installs_nothing(wrong, wrapped):
    projections, error, message = WRONG[wrong]
    model = Decoder(attention=Attention)
    before = snapshot(model)
    install = attach
    if wrapped:
        install = functools.partial(
            SpanScaledOptimizer, torch.optim.SGD(model.parameters(), lr=0.1)
        )
    with pytest.raises(error, match=message):
        install(model, qk_modules=projections)
    assert snapshot(model) == before
    attach(model, SpanScale(2.0, 1.0), qk_modules={"blocks.*.attn": MAP}).remove()


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_fused_sizes_that_do_not_divide_are_an_error(layout):
    model = nn.Sequential(Attention(fused="wqkv"))  # 48 features
    spec = {"qkv": "wqkv", "num_heads": 4, "num_kv_heads": 1, "layout": layout}
    with attach(
        model, SpanScale(2.0, 1.0), qk_modules={"0": spec}
    ):  # 6 heads of 8: only the layer could tell
        pass
    spec |= {"num_heads": 5}
    message = r"layer '0': 'wqkv' has 48 output features, which do not divide into the 7 heads"
    with pytest.raises(ValueError, match=message):
        attach(model, SpanScale(2.0, 1.0), qk_modules={"0": spec})


# Without a map.


class Unnamed(Attention):
    """With projections of no name that tells."""

    def __init__(self):
        super().__init__()
        for new, old in (("a", "wq"), ("b", "wk"), ("c", "wv")):
            self.add_module(new, self._modules.pop(old))

    def project(self, x):
        parts = (module(x).unflatten(-1, (HEADS, -1)) for module in (self.a, self.b, self.c))
        return tuple(y.transpose(-3, -2) for y in parts)


def test_without_a_map_the_error_says_how_to_write_one():
    message = r"layers 'blocks.0.attn' .*'blocks.1.attn' .*qk_modules=\{layer: \{'query': "
    model, batch = decoder(), tokens()
    with attach(model, SpanScale(2.0, 1.0)), pytest.raises(UnscaledLayerError, match=message):
        model(batch)
    with pytest.raises(UnscaledLayerError, match=message):
        attach(model, SpanScale(2.0, 1.0), example_inputs=(batch,))
    unnamed = nn.Sequential(Unnamed())
    assert find_attention(unnamed) == []
    with pytest.raises(ValueError, match=r"no attention layer .*qk_modules=\{layer: "):
        attach(unnamed, SpanScale(2.0, 1.0))
    with attach(
        unnamed, SpanScale(2.0, 1.0), qk_modules={"0": {"query": "a", "key": "b", "num_heads": 4}}
    ) as hooks:
        unnamed(torch.randn(2, 9, WIDTH)).sum().backward()
        assert hooks.unseen() == []


class _Attend(torch.autograd.Function):
    """Attention with a backward of its own, written in torch."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        ctx.save_for_backward(q, k, v, bias)
        return _weights(q, k, bias) @ v

    @staticmethod
    def backward(ctx, grad):
        return *kernel_backward(*ctx.saved_tensors, grad.contiguous()), None


def test_a_function_with_its_own_backward_is_seen_into_by_no_tap_either(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "kernel", _Attend.apply)
    model, batch = decoder(), tokens()
    optimizer = SpanScaledOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, SCALE)
    with pytest.raises(UnscaledLayerError, match=r"'blocks.0.attn'.*qk_modules="):  # noqa: PT012
        loss_of(model(batch), batch).backward()  # at the forward pass or at the step
        optimizer.step()
    optimizer.detach()
    expected = train_step(model, batch, {f"blocks.{i}.attn": SCALES for i in range(2)})
    with attach(model, SCALE, qk_modules={"blocks.*.attn": MAP}):
        assert_close(train_step(model, batch), expected)


class Flex(Attention):
    def attend(self, q, k, v, bias=None):
        return self.wo(flex_attention(q, k, v).transpose(1, 2).flatten(-2))


def test_flex_attention_is_an_error_that_names_the_projection_tap():
    # Without gradients, as on a CPU it has no backward.
    model, x = nn.Sequential(Flex()).requires_grad_(False), torch.randn(2, 9, WIDTH)
    message = r"'0' \(Flex\).* flex_attention .*qk_modules=\{layer: "
    with pytest.raises(UnscaledLayerError, match=message):
        attach(model, SpanScale(2.0, 1.0), example_inputs=x)
    with attach(model, SpanScale(2.0, 1.0), qk_modules={"0": MAP}, example_inputs=x) as hooks:
        assert hooks.sites[0].tap == "projection"


# torch.compile.


@pytest.mark.parametrize(
    ("how", "bias"),
    [(("separate", "concatenated", 4), False), (("qkv", "interleaved", 2), True)],
    ids=["separate", "fused, and a second input"],
)
def test_compiled_in_one_graph_the_gradients_equal_eager_ones(how, bias):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = case(*how)[0]()

        def forward(self, *inputs):
            return self.attn(*inputs).pow(3)

    torch.compiler.reset()
    model, x = Model().double(), normal(2, 9, WIDTH)
    inputs = (x, normal(9, 9)) if bias else (x,)
    with attach(model, SCALE, qk_modules={"attn": case(*how)[1]}) as hooks:
        expected = gradients(model, model(*inputs).sum())
        hooks.forget()
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(gradients(model, run(*inputs).sum()), expected)
        assert hooks.unseen() == []
        hooks.groups[0].update(query=(5.0, -1.0))
        changed = gradients(model, model(*inputs).sum())
        with torch.compiler.set_stance("fail_on_recompile"):
            y = run(*inputs)
        assert_close(gradients(model, y.sum()), changed)
    assert_differ(changed, expected)
    torch.compiler.reset()
