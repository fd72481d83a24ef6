"""Training loops, each compared with the same loop on gradients that an oracle rescales."""

import copy

import pytest
import torch
from compare import assert_same_training as assert_same
from models import LAYER_SCALES as SCALES
from models import Decoder, Reference, ScoreAttention, gradients, loss_of, tokens
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from spanopt import SpanScale, SpanScaledOptimizer, UnscaledLayerError, attach


def scales(of=SCALES):
    return {name: SpanScale(**sides) for name, sides in of.items()}


def pair(make=lambda p: AdamW(p, lr=1e-2), dtype=torch.float64, **options):
    """A wrapped optimizer with its model, and the bare one with a reference of it."""
    model = Decoder(**options).to(dtype)
    reference = Reference(copy.deepcopy(model))
    optimizer = SpanScaledOptimizer(make(model.parameters()), model, scales())
    return (model, optimizer), (reference, make(reference.parameters()))


def assert_changes_something(loop):
    """So that a test which finds parameters equal says something."""
    (model, optimizer), (reference, bare) = pair()
    reference.of = {}
    loop(model, optimizer)
    loop(reference, bare)
    with pytest.raises(AssertionError):
        assert_same(model, reference, 1e-4)


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(11, (3, 9), generator=generator) for _ in range(count)]


def accumulate(model, optimizer):
    for step in range(3):
        optimizer.zero_grad()
        for batch in batches(3, step):
            (loss_of(model(batch), batch) / 3).backward()
        optimizer.step()


def accumulate_forward_first(model, optimizer):
    for step in range(3):
        optimizer.zero_grad()
        losses = [loss_of(model(batch), batch) for batch in batches(3, step)]
        for loss in losses:
            loss.backward()
        optimizer.step()


def clip_by_norm(model, optimizer):
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def clip_by_value(model, optimizer):
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        clip_grad_value_(model.parameters(), 1e-3)
        optimizer.step()


def several_losses(model, optimizer):
    for batch in batches(3):
        optimizer.zero_grad()
        logits = model(batch)
        loss_of(logits, batch).backward(retain_graph=True)
        logits.square().mean().backward(retain_graph=True)
        logits.logsumexp(-1).mean().backward()
        optimizer.step()


def by_autograd_grad(model, optimizer):
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch in batches(3):
        loss = loss_of(model(batch), batch)
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        optimizer.step()


def a_loss_that_is_dropped(model, optimizer):
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(model(batch), batch)
        loss_of(model(batch[:1]), batch[:1]).backward()
        optimizer.step()


def a_closure(model, optimizer):
    for batch in batches(3):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model(batch), batch)
            loss.backward()
            return loss

        optimizer.step(closure)


def frozen_and_unfrozen(model, optimizer):
    decoder = getattr(model, "model", model)
    first = decoder.blocks[0]
    for step, batch in enumerate(batches(6)):
        if step in (1, 3):  # a whole block and what is before it, then Q and K of the other alone
            decoder.embed.requires_grad_(step == 3)
            first.requires_grad_(step == 3)
        if step in (4, 5):
            decoder.blocks[1]["attn"].q_proj.requires_grad_(step == 5)
            decoder.blocks[1]["attn"].k_proj.requires_grad_(step == 5)
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        optimizer.step()


def evaluation_between(model, optimizer):
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        model.eval()
        with torch.no_grad():
            model(batch)
        with torch.inference_mode():
            model(batch)
        model.train()
        optimizer.step()


LOOPS = [
    accumulate,
    accumulate_forward_first,
    clip_by_norm,
    clip_by_value,
    several_losses,
    by_autograd_grad,
    a_loss_that_is_dropped,
    a_closure,
    frozen_and_unfrozen,
    evaluation_between,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_loop_ends_where_it_does_on_the_oracles_gradients(loop):
    (model, optimizer), (reference, bare) = pair()
    loop(model, optimizer)
    loop(reference, bare)
    assert_same(model, reference)
    assert_changes_something(loop)


def test_micro_batches_give_the_sum_of_their_rescaled_gradients():
    (model, optimizer), _ = pair()
    parts = []
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        parts.append([p.grad.clone() for p in model.parameters()])
    optimizer.zero_grad()
    for batch in batches(3):
        loss_of(model(batch), batch).backward()
    for parameter, *grads in zip(model.parameters(), *parts, strict=True):
        torch.testing.assert_close(parameter.grad, sum(grads), rtol=1e-12, atol=1e-14)


def test_several_optimizers_over_one_model_scale_a_layer_each():
    (model, optimizer), (reference, _) = pair()
    optimizer.detach()
    parts = {name: model.get_submodule(name) for name in ("blocks.0", "blocks.1")}
    first, second = (
        SpanScaledOptimizer(
            make(parts[name].parameters()), model, {f"{name}.attn": scales()[f"{name}.attn"]}
        )
        for name, make in (
            ("blocks.0", lambda p: AdamW(p, lr=1e-2)),
            ("blocks.1", lambda p: SGD(p, lr=0.1, momentum=0.9)),
        )
    )
    bare = (
        AdamW(reference.model.blocks[0].parameters(), lr=1e-2),
        SGD(reference.model.blocks[1].parameters(), lr=0.1, momentum=0.9),
    )
    for batch in batches(3):
        loss_of(model(batch), batch).backward()
        loss_of(reference(batch), batch).backward()
        for optimizer in (first, second, *bare):
            optimizer.step()
        model.zero_grad()
        reference.zero_grad()
    assert_same(model, reference)
    with pytest.raises(ValueError, match=r"layer 'blocks.0.attn' is scaled already"):
        SpanScaledOptimizer(AdamW(model.parameters()), model, scales())


class Growing(Decoder):
    def grow(self):
        grown = Decoder(layers=1).to(self.head.weight.dtype)
        self.blocks.append(grown.blocks[0])
        return list(grown.blocks[0].parameters())


@pytest.mark.parametrize("copied", [False, True])
def test_layers_that_come_with_add_param_group_are_scaled_as_the_patterns_say(copied):
    model = Growing(layers=2).double()
    reference = Reference(copy.deepcopy(model))
    of = {f"blocks.{i}.attn": {"query": (2.0, 0.5), "key": (2.0, 0.5)} for i in range(3)}
    reference.of = of | {"blocks.1.attn": {"query": (1.0, 1.0), "key": (1.0, 1.0)}}
    optimizer = SpanScaledOptimizer(
        AdamW(model.parameters(), lr=1e-2), model, {"*": (2.0, 0.5), "*.1.*": None}
    )
    if copied:
        optimizer = copy.deepcopy(optimizer)
        model = optimizer.model
    bare = AdamW(reference.parameters(), lr=1e-2)
    for step, batch in enumerate(batches(4)):
        if step == 2:
            torch.manual_seed(7)
            new = model.grow()
            torch.manual_seed(7)
            optimizer.add_param_group({"params": new, "lr": 1e-3})
            bare.add_param_group({"params": reference.model.grow(), "lr": 1e-3})
        for one, other in ((model, optimizer), (reference, bare)):
            other.zero_grad()
            loss_of(one(batch), batch).backward()
            other.step()
    assert_same(model, reference)
    assert [group["name"] for group in optimizer.span_groups] == ["blocks.0.attn", "blocks.2.attn"]
    assert len(optimizer.state_dict()["span_groups"]) == 2


def test_a_new_layer_is_scaled_once_its_parameters_are_trained_and_not_after_detaching():
    model = Growing().double()
    optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-2), model, SpanScale(2.0, 1.0))
    model.grow()
    other = nn.Linear(2, 2)
    optimizer.add_param_group({"params": other.weight})
    assert len(optimizer.span_groups) == 2
    optimizer.add_param_group({"params": model.blocks[2].parameters()})
    assert len(optimizer.span_groups) == 3
    detached = optimizer.detach()
    optimizer.add_param_group({"params": other.bias})
    assert detached.param_groups[-1]["params"] == [other.bias]
    assert optimizer.span_groups == []


def test_a_layer_that_is_frozen_is_no_missed_one_and_one_that_is_skipped_is():
    class Skipping(Decoder):
        def forward(self, batch, skip=False):
            x = self.embed(batch)
            for i, block in enumerate(self.blocks):
                if not (skip and i == 1):
                    x = x + block["attn"](block["norm"](x))
            return self.head(x)

    model, batch = Skipping(), tokens()
    optimizer = SpanScaledOptimizer(AdamW(model.parameters()), model, scales())
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    loss_of(model(batch), batch).backward()
    optimizer.step()
    loss_of(model(batch, skip=True), batch).backward()
    with pytest.raises(UnscaledLayerError, match=r"'blocks.1.attn' \(scaled: 'blocks.0.attn'"):
        optimizer.step()


# Precision.


def test_a_full_bfloat16_model_trains_as_the_oracle_within_rounding():
    make = lambda p: SGD(p, lr=0.1)  # noqa: E731
    (model, optimizer), (reference, bare) = pair(make, torch.bfloat16)
    for one, other in ((model, optimizer), (reference, bare)):
        accumulate(one, other)
    assert_same(model, reference, 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rescales_the_gradients_of_the_low_precision_tensors(dtype):
    (model, _optimizer), (reference, _) = pair(dtype=torch.float32)
    errors = {}
    for one in (model, reference):
        batch = batches(1)[0]
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(one(batch), batch)
        loss.backward()
    there = dict(reference.model.named_parameters())
    plain = copy.deepcopy(reference)
    plain.of = {}
    plain.zero_grad()
    loss_of(plain(batch), batch).backward()
    unscaled = dict(plain.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            size = there[name].grad.abs().max()
            errors[name] = float((parameter.grad - there[name].grad).abs().max() / size)
            if "0.attn" in name:
                assert (unscaled[name].grad - there[name].grad).abs().max() > 0.12 * size
    assert max(errors.values()) < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_an_overflow_is_skipped_as_without_the_wrapper_and_nothing_is_corrupted():
    (model, optimizer), (reference, bare) = pair()
    ends = []
    for one, other in ((model, optimizer), (reference, bare)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        history = []
        for step, batch in enumerate(batches(5)):
            other.zero_grad()
            loss = scaler.scale(loss_of(one(batch), batch))
            if step == 2:
                loss = loss * torch.inf
            loss.backward()
            scaler.unscale_(other)
            clip_grad_norm_(one.parameters(), 1.0)
            scaler.step(other)
            scaler.update()
            history.append(scaler.get_scale())
        ends.append(history)
    assert ends[0] == ends[1]
    assert ends[0][2] == ends[0][1] / 2
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert_same(model, reference)


# Activation checkpointing.


class Checkpointed(Decoder):
    """Each block runs again in the backward pass; or a part of the attention layer does."""

    how: tuple[str, bool] = ("block", False)

    def forward(self, batch, reference=None):
        x = self.embed(batch)
        where, reentrant = self.how
        for i, block in enumerate(self.blocks):
            scale = (reference or {}).get(f"blocks.{i}.attn")

            def run(x, block=block, scale=scale):
                y = block["norm"](x)
                y = block["attn"](y) if scale is None else block["attn"].reference(y, **scale)
                x = x + y
                return x + block["mlp"](x)

            if where == "block":
                x = checkpoint(run, x, use_reentrant=reentrant)
            elif where == "layer" and scale is None:
                y = checkpoint(block["attn"], block["norm"](x), use_reentrant=reentrant)
                x = x + y
                x = x + block["mlp"](x)
            else:
                x = run(x)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("where", ["block", "layer"])
def test_with_activation_checkpointing_each_gradient_is_rescaled_once(where, reentrant):
    model = Checkpointed().double()
    model.how = (where, reentrant)
    reference = Reference(copy.deepcopy(model))
    reference.model.how = ("nowhere", False)
    optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-2), model, scales())
    accumulate(model, optimizer)
    accumulate(reference, AdamW(reference.parameters(), lr=1e-2))
    assert_same(model, reference)


class InParts(nn.Module):
    """An attention layer that checkpoints its own attention."""

    def __init__(self, how, reentrant=False):
        super().__init__()
        self.how, self.reentrant = how, reentrant
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def attend(self, q, k, v):
        q, k, v = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in (q, k, v))
        if self.how == "score":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return y.transpose(1, 2).flatten(-2)

    def forward(self, x, whole=False):
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if whole:
            return self.attend(*parts)
        return checkpoint(self.attend, *parts, use_reentrant=self.reentrant)


@pytest.mark.parametrize("how", ["score", "softmax"])
def test_a_layer_that_checkpoints_a_part_of_itself_is_rescaled_once_or_an_error(how):
    layer = nn.Sequential(InParts(how)).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    plain = gradients(layer, layer(x).pow(3).sum())
    with attach(layer, SpanScale(3.0, 0.5)) as hooks:
        expected = gradients(layer, layer[0](x, whole=True).pow(3).sum())
        hooks.forget()
        actual = gradients(layer, layer(x).pow(3).sum())
        assert not hooks.unseen()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)
        name = "0.q_proj.weight"
        assert (expected[name] - plain[name]).abs().max() > 0.1 * plain[name].abs().max()
    layer[0].reentrant = True
    optimizer = SpanScaledOptimizer(SGD(layer.parameters(), lr=0.1), layer, SpanScale(3.0, 0.5))
    layer(x.requires_grad_()).pow(3).sum().backward()
    with pytest.raises(UnscaledLayerError, match=r"layer '0'.*checkpoint"):
        optimizer.step()


def saved_bytes(model, batch):
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(batch)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for at, storage in storages.items() if at not in own)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing_keeps_as_little_as_without_the_wrapper(reentrant):
    model, batch = Checkpointed(), tokens()
    model.how = ("block", reentrant)
    plain = saved_bytes(model, batch)
    with attach(model, scales()):
        assert saved_bytes(model, batch) == plain
    model.how = ("nowhere", False)
    assert saved_bytes(model, batch) > plain


def test_new_layers_may_come_one_group_at_a_time_and_with_names():
    model = Growing().double()
    bare = AdamW(model.named_parameters(), lr=1e-2)
    optimizer = SpanScaledOptimizer(bare, model, {"*": (2.0, 0.5)})
    model.grow()
    model.grow()
    for i in (2, 3):
        optimizer.add_param_group({"params": model.blocks[i].named_parameters(), "lr": 0.1**i})
        assert len(optimizer.span_groups) == i + 1
    accumulate(model, optimizer)
    with pytest.raises(TypeError, match="ordered"):
        optimizer.add_param_group({"params": set(nn.Linear(2, 2).parameters())})


def test_a_layer_that_was_replaced_or_removed_is_let_go():
    model = Growing(layers=3).double()
    given = {"blocks.*": (2.0, 0.5), "blocks.2.attn": (3.0, 1.0)}
    optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-2), model, given)
    del model.blocks[2]
    old, model.blocks[1] = model.blocks[1], Decoder(layers=1).double().blocks[0]
    optimizer.add_param_group({"params": model.blocks[1].parameters()})
    assert [group["name"] for group in optimizer.span_groups] == ["blocks.0.attn", "blocks.1.attn"]
    assert not old["attn"]._forward_hooks
    accumulate(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    SpanScaledOptimizer(AdamW(old.parameters()), old, SpanScale(2.0, 1.0)).detach()


REFUSED = {
    "another number of heads": (
        lambda model: model.blocks.append(Decoder(heads=2, layers=1).blocks[0]),
        {"*": SpanScale([2.0, 1.0, 3.0, 1.0])},
        "4 per-head values",
    ),
    "a name that was another's": (
        lambda model: model.blocks.insert(0, Decoder(layers=1).blocks[0]),
        {"*": (2.0, 1.0)},
        "a new layer is named 'blocks.0.attn', as one that is scaled already was",
    ),
}


@pytest.mark.parametrize(("change", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_a_group_that_is_refused_adds_nothing(change, given, message):
    model = Growing()
    model.blocks = nn.ModuleList(
        nn.ModuleDict({"norm": b["norm"], "attn": nn.MultiheadAttention(16, 4), "mlp": b["mlp"]})
        for b in model.blocks
    )
    optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-2), model, given)
    change(model)
    heads = 2 if "heads" in message or "per-head" in message else 4
    index = len(model.blocks) - 1 if heads == 2 else 0
    model.blocks[index]["attn"] = nn.MultiheadAttention(16, heads)
    parameters = list(model.blocks[index].parameters())
    before = len(optimizer.param_groups), optimizer.hooks.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters})
    assert (len(optimizer.param_groups), optimizer.hooks.state_dict()) == before
    assert not model.blocks[index]["attn"]._forward_hooks


def test_a_group_that_the_wrapped_optimizer_refuses_installs_nothing():
    model = Growing().double()
    optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-2), model, SpanScale(2.0, 1.0))
    new = model.grow()
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [*new, model.head.weight]})
    assert len(optimizer.span_groups) == 2
    assert not model.blocks[2]["attn"]._forward_hooks
    optimizer.add_param_group({"params": new})
    assert len(optimizer.span_groups) == 3


class Repeated(ScoreAttention):
    """Checkpoints its own method, or that of its base class."""

    def __init__(self, how, *args):
        super().__init__(*args)
        self.how = how

    def _forward(self, x):
        return ScoreAttention.forward(self, x)

    def forward(self, x):
        run = {"a method": self._forward, "super": super().forward}[self.how]
        return checkpoint(run, x, use_reentrant=False)


class RepeatedPacked(nn.MultiheadAttention):
    def forward(self, x):
        return checkpoint(super().forward, x, x, x, need_weights=False, use_reentrant=False)[0]


@pytest.mark.parametrize("how", ["a method", "super", "packed"])
def test_a_layer_that_checkpoints_its_own_forward_is_rescaled_once(how):
    if how == "packed":
        layer = RepeatedPacked(16, 4, batch_first=True).double()
        plain = nn.MultiheadAttention(16, 4, batch_first=True).double()
        once = lambda x: plain(x, x, x, need_weights=False)[0]  # noqa: E731
    else:
        layer, plain = Repeated(how).double(), ScoreAttention().double()
        once = plain
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with attach(plain, SpanScale(3.0, 0.5)):
        expected = gradients(plain, once(x).pow(3).sum())
    with attach(layer, SpanScale(3.0, 0.5)) as hooks:
        actual = gradients(layer, layer(x).pow(3).sum())
        assert not hooks.unseen()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)
