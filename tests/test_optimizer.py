import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch_optimizer
from compare import equal, same_state, snapshot
from models import Decoder, ScoreAttention, gradients, loss_of, tokens, train
from models import OneOfEach as Model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spanopt import SpanScale, SpanScaledOptimizer, UnscaledLayerError, attach


@pytest.fixture
def model():
    return Decoder()


@pytest.fixture
def batch():
    return tokens()


SCALE = SpanScale(2.0, 1.0)


def wrap(model, make=lambda parameters: AdamW(parameters, lr=1e-2), scales=SCALE, **options):
    return SpanScaledOptimizer(make(model.parameters()), model, scales, **options)


MAKERS = {
    "AdamW": lambda p: AdamW(p, lr=1e-2),
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "torch_optimizer.Lamb": lambda p: torch_optimizer.Lamb(p, lr=1e-2),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("attention", ["score", "packed"])
def test_identity_scales_train_bit_for_bit_like_the_bare_optimizer(make, attention):
    class Packed(nn.MultiheadAttention):
        def __init__(self, width, heads):
            super().__init__(width, heads, batch_first=True)

        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    model = Decoder(attention=ScoreAttention if attention == "score" else Packed)
    twin = copy.deepcopy(model)
    bare = make(model.parameters())
    wrapped = wrap(twin, make, scales={"*": SpanScale(1.0, 1.0)})
    assert equal(train(model, bare, 50), train(twin, wrapped, 50))
    assert same_state(bare.state_dict(), wrapped.state_dict())


def test_without_scales_it_trains_as_before_and_warns_until_they_are_edited(model):
    twin, edited = copy.deepcopy(model), copy.deepcopy(model)
    with pytest.warns(UserWarning, match="no scales were given, .* stay as they are") as caught:
        wrapped = SpanScaledOptimizer(AdamW(twin.parameters()), twin)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later = SpanScaledOptimizer(AdamW(edited.parameters()), edited, SpanScale())
    for group in later.span_groups:
        group["parallel"] = 3.0
    plain = train(model, AdamW(model.parameters()), 3)
    assert equal(plain, train(twin, wrapped, 3))
    assert not equal(plain, train(edited, later, 3))


def test_it_is_an_optimizer_on_the_wrapped_ones_own_objects(model):
    bare = AdamW(model.parameters())
    optimizer = SpanScaledOptimizer(bare, model, SpanScale(2.0, 1.0))
    assert isinstance(optimizer, Optimizer)
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(bare, name)
    optimizer.param_groups[0]["lr"] = 0.5
    assert bare.param_groups[0]["lr"] == 0.5
    replaced = [{**bare.param_groups[0]}]
    optimizer.param_groups = replaced
    assert bare.param_groups is replaced
    optimizer.state = {}
    assert bare.state == {}
    optimizer.defaults = {"lr": 1.0}
    assert bare.defaults == {"lr": 1.0}


def test_a_learning_rate_set_on_either_is_seen_by_both_after_loading(model):
    optimizer = wrap(model)
    train(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.25
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.25
    optimizer.optimizer.param_groups[0]["lr"] = 0.125
    assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("on", ["wrapper", "wrapped"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_scheduler_gives_the_learning_rates_it_gives_unwrapped(model, on, when):
    def rates(optimizer, scheduler):
        result = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
            for _ in range(5):
                train(model, optimizer)
                scheduler.step()
                result.append(optimizer.param_groups[0]["lr"])
        return result

    twin = SGD(model.parameters(), lr=0.1)
    expected = rates(twin, CosineAnnealingLR(twin, 5))
    bare = SGD(model.parameters(), lr=0.1)
    if when == "before":
        scheduler = CosineAnnealingLR(bare, 5)
        optimizer = SpanScaledOptimizer(bare, model, SpanScale(2.0, 1.0))
    else:
        optimizer = SpanScaledOptimizer(bare, model, SpanScale(2.0, 1.0))
        scheduler = CosineAnnealingLR(optimizer if on == "wrapper" else bare, 5)
    assert rates(optimizer, scheduler) == expected


def test_every_hook_fires_once_a_step(model):
    optimizer = wrap(model)
    fired = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, a, k: fired.append(("own pre", o, a))),
        optimizer.register_step_post_hook(lambda o, a, k: fired.append(("own post", o, a))),
        optimizer.optimizer.register_step_pre_hook(lambda o, a, k: fired.append(("inner", o, a))),
        register_optimizer_step_pre_hook(lambda o, a, k: fired.append(("global pre", o, a))),
        register_optimizer_step_post_hook(lambda o, a, k: fired.append(("global post", o, a))),
    ]
    train(model, optimizer)
    names = [name for name, *_ in fired]
    assert sorted(names) == ["global post", "global pre", "inner", "own post", "own pre"]
    by_name = {name: (o, a) for name, o, a in fired}
    assert by_name["own pre"] == (optimizer, (optimizer,))
    for handle in handles:
        handle.remove()
    train(model, optimizer)
    assert len(fired) == 5


@pytest.mark.parametrize("how", ["", "scheduled", "nested", "no torch optimizer"])
def test_step_hooks_run_in_the_order_of_the_bare_optimizer(model, how):
    inner = AdamW(model.parameters())
    scales = {"blocks.0.attn": (2.0, 1.0)}
    if how == "no torch optimizer":
        inner = torch_optimizer.Lookahead(inner)
    if how == "nested":
        inner = SpanScaledOptimizer(inner, model, {"blocks.1.attn": (2.0, 1.0)})
    optimizer = SpanScaledOptimizer(inner, model, scales)
    if how == "scheduled":
        LambdaLR(inner, lambda step: 1.0)
    fired = []

    def note(name):
        return lambda o, args, kwargs: fired.append(name)

    handles = [
        optimizer.register_step_pre_hook(note("local pre")),
        optimizer.register_step_post_hook(note("local post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    if how == "nested":
        handles += [
            inner.register_step_pre_hook(note("inner pre")),
            inner.register_step_post_hook(note("inner post")),
        ]
    train(model, optimizer, 2)
    for handle in handles:
        handle.remove()
    inside = {"nested": ["inner pre", "inner post"]}.get(how, [])
    expected = ["global pre", "local pre", *inside, "local post", "global post"]
    if how == "no torch optimizer":  # it takes no hooks, and what is in it runs the global ones
        expected = ["local pre", "global pre", "global post", "local post"]
    assert fired == 2 * expected
    train(model, optimizer)
    assert len(fired) == 2 * len(expected), "no hook is left behind"


def test_a_step_pre_hook_can_replace_the_closure(model, batch):
    optimizer = wrap(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model(batch), batch)
        loss.backward()
        return loss

    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), kwargs))
    assert optimizer.step() > 0


def test_state_dict_hooks_fire_once_and_may_change_it(model):
    optimizer = wrap(model)
    fired = []
    optimizer.register_state_dict_pre_hook(lambda o: fired.append(("pre", o)))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: fired.append(("load", o)))
    optimizer.register_load_state_dict_post_hook(lambda o: fired.append(("loaded", o)))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert fired == [("pre", optimizer), ("load", optimizer), ("loaded", optimizer)]


def test_zero_grad_and_add_param_group_reach_the_wrapped_one(model):
    extra = nn.Linear(2, 2)
    optimizer = wrap(model)
    train(model, optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimizer.add_param_group({"params": extra.parameters(), "lr": 0.5})
    assert optimizer.optimizer.param_groups[1]["lr"] == 0.5


def test_a_closure_is_run_and_its_loss_returned(model, batch):
    optimizer = wrap(model, lambda p: torch.optim.LBFGS(p, max_iter=3))
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model(batch), batch)
        loss.backward()
        calls.append(loss.item())
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure=closure)
    assert len(calls) > 2
    assert second < first


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_trains_its_own_model_the_same_way(model, how):
    optimizer = wrap(model, scales={"blocks.0.attn": (3.0, 0.5)}, on_missing="warn")
    train(model, optimizer, 2)
    pair = (model, optimizer)
    twin, clone = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert clone.model is twin
    assert clone.span_groups == optimizer.span_groups
    assert clone.param_groups[0]["params"][0] is next(twin.parameters())
    assert equal(train(model, optimizer, 3), train(twin, clone, 3))


def test_a_copy_of_a_detached_optimizer_is_detached(model):
    optimizer = wrap(model)
    optimizer.detach()
    clone = copy.deepcopy(optimizer)
    train(clone.model, clone)
    assert "detached" in repr(clone)
    assert not clone.model.blocks[0]["attn"]._forward_hooks


def test_it_wraps_and_is_wrapped_by_another_wrapper(model):
    twin = copy.deepcopy(model)
    inside = torch_optimizer.Lookahead(wrap(model, lambda p: SGD(p, 0.1)), k=2)
    outside = wrap(twin, lambda p: torch_optimizer.Lookahead(SGD(p, 0.1), k=2))
    assert equal(train(model, inside, 5), train(twin, outside, 5))


def test_two_optimizers_may_split_a_model_and_two_wrappers_may_nest(model):
    twin, triplet = copy.deepcopy(model), copy.deepcopy(model)
    scales = {"blocks.0.attn": (3.0, 1.0), "blocks.1.attn": (2.0, 0.5)}
    expected = train(model, wrap(model, scales=scales), 5)

    first, second = ({name: value} for name, value in scales.items())
    nested = SpanScaledOptimizer(wrap(twin, scales=first), twin, second)
    assert equal(train(twin, nested, 5), expected)
    state = nested.state_dict()
    assert [group["name"] for group in state["span_groups"]] == list(scales)
    nested.load_state_dict(state)

    parts = [triplet.blocks[1]["attn"].parameters()]
    own = {id(p) for p in triplet.blocks[1]["attn"].parameters()}
    parts.append([p for p in triplet.parameters() if id(p) not in own])
    pair = [
        SpanScaledOptimizer(AdamW(part, lr=1e-2), triplet, scale)
        for part, scale in zip(parts, (second, first), strict=True)
    ]

    class Both:
        def zero_grad(self):
            [optimizer.zero_grad() for optimizer in pair]

        def step(self):
            [optimizer.step() for optimizer in pair]

    assert equal(train(triplet, Both(), 5), expected)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_the_wrapped_optimizers_implementation_is_kept(model, options):
    twin = copy.deepcopy(model)
    optimizer = wrap(model, lambda p: AdamW(p, lr=1e-2, **options))
    scales = [group.scale for group in optimizer.span_groups]
    reference = wrap(
        twin,
        lambda p: AdamW(p, lr=1e-2, **options),
        scales=dict.fromkeys([group["name"] for group in optimizer.span_groups], scales[0]),
    )
    assert equal(train(model, optimizer, 3), train(twin, reference, 3))
    assert optimizer.param_groups[0] is optimizer.optimizer.param_groups[0]


def test_capturable_is_the_wrapped_optimizers_own_matter(model):
    # Without an accelerator the bare optimizer refuses it, and so does the wrapped one.
    errors = []
    for wrapped in (False, True):
        bare = AdamW(model.parameters(), capturable=True)
        optimizer = SpanScaledOptimizer(bare, model, SpanScale(2.0, 1.0)) if wrapped else bare
        try:
            train(model, optimizer)
            errors.append(None)
        except Exception as error:
            errors.append(str(error))
        if wrapped:
            optimizer.detach()
    assert errors[0] == errors[1]


@pytest.mark.parametrize("fused", [True, False])
def test_a_grad_scaler_scales_and_skips_as_with_the_bare_optimizer(fused, batch):
    def run(scales):
        torch.manual_seed(0)
        model = Decoder()
        optimizer = AdamW(model.parameters(), lr=1e-2, fused=fused)
        if scales is not None:
            optimizer = SpanScaledOptimizer(optimizer, model, scales)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        history = []
        for step in range(6):
            optimizer.zero_grad()
            loss = loss_of(model(batch), batch)
            if step == 3:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history += [scaler.get_scale(), *(p.detach().clone() for p in model.parameters())]
        return history

    bare, identity, scaled = run(None), run({"*": (1.0, 1.0)}), run({"*": (2.0, 1.0)})
    size = len(bare) // 6
    assert equal(map(torch.as_tensor, bare), map(torch.as_tensor, identity))
    assert [bare[i * size] for i in range(6)] == [scaled[i * size] for i in range(6)]
    skipped = slice(3 * size + 1, 4 * size), slice(2 * size + 1, 3 * size)
    assert equal(*(scaled[part] for part in skipped)), "the overflow step must change nothing"
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in scaled)


def test_adahessian_trains_through_the_nodes(model, batch):
    optimizer = wrap(model, lambda p: torch_optimizer.Adahessian(p, lr=1e-2))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(model(batch), batch)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # create_graph=True warns of a reference cycle
                loss.backward(create_graph=True)
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_span_groups_are_edited_like_param_groups(model, batch):
    optimizer = wrap(model, scales={"*": (2.0, 1.0)})
    assert [group["name"] for group in optimizer.span_groups] == ["blocks.0.attn", "blocks.1.attn"]
    for group in optimizer.span_groups:
        group["parallel"] = 1.0
    changed = gradients(model, loss_of(model(batch), batch))
    optimizer.detach()
    plain = gradients(model, loss_of(model(batch), batch))
    assert all(torch.equal(changed[name], plain[name]) for name in plain)


def test_a_span_group_that_is_replaced_is_an_error_not_ignored(model):
    optimizer = wrap(model)
    optimizer.span_groups[0] = {"name": "blocks.0.attn", "parallel": 1.0, "violation": 1.0}
    with pytest.raises(ValueError, match=r"span_groups.*fields"):
        train(model, optimizer)
    with pytest.raises(AttributeError):
        optimizer.span_groups = []


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_checkpoint_restores_the_scales_and_the_optimizer(model):
    twin = copy.deepcopy(model)
    optimizer = wrap(model, scales={"*": (2.0, 1.0)})
    train(model, optimizer, 2)
    optimizer.span_groups[0].update(parallel=[1.0, 2.0, 3.0, 4.0], key=(1.0, 0.5))
    train(model, optimizer, 1)
    state = saved(optimizer.state_dict())
    twin.load_state_dict(model.state_dict())
    resumed = wrap(twin, scales={"*": (7.0, 7.0)})
    resumed.load_state_dict(state)
    assert resumed.span_groups == optimizer.span_groups
    assert equal(train(model, optimizer, 3), train(twin, resumed, 3))


def test_a_bare_checkpoint_loads_so_that_wrapping_can_start_mid_training(model):
    twin = copy.deepcopy(model)
    bare = AdamW(model.parameters(), lr=1e-2)
    train(model, bare, 2)
    twin.load_state_dict(model.state_dict())
    optimizer = wrap(twin, scales={"*": (1.0, 1.0)})
    optimizer.load_state_dict(saved(bare.state_dict()))
    assert [group["parallel"] for group in optimizer.span_groups] == [1.0, 1.0]
    assert equal(train(model, bare, 3), train(twin, optimizer, 3))


def test_the_wrapped_optimizers_part_loads_without_the_wrapper(model):
    twin = copy.deepcopy(model)
    optimizer = wrap(model, scales={"*": (1.0, 1.0)})
    train(model, optimizer, 2)
    state = saved(optimizer.state_dict())
    del state["span_groups"]
    twin.load_state_dict(model.state_dict())
    bare = AdamW(twin.parameters(), lr=1.0)
    bare.load_state_dict(state)
    assert equal(train(model, optimizer, 3), train(twin, bare, 3))


def test_a_checkpoint_of_other_layers_is_refused_and_changes_nothing(model):
    other = wrap(Decoder(layers=3)).state_dict()
    optimizer = wrap(model)
    train(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"only in the checkpoint: \['blocks.2.attn'\]"):
        optimizer.load_state_dict(other)
    broken = copy.deepcopy(before)
    broken["span_groups"][0]["parallel"] = 5.0
    broken["param_groups"].append(broken["param_groups"][0])
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(broken)
    wrong = copy.deepcopy(before)
    wrong["span_groups"][1]["parallel"] = [1.0, 2.0]
    with pytest.raises(ValueError, match="2 per-head values"):
        optimizer.load_state_dict(wrong)
    assert same_state(optimizer.state_dict(), before)
    assert optimizer.state_dict()["span_groups"] == before["span_groups"]


def test_print_shows_what_was_decided(model, batch):
    optimizer = wrap(model, scales={"blocks.0.attn": SpanScale(3.0, 0.5, key=(1.0, 1.0))})
    model(batch)
    lines = str(optimizer).splitlines()
    assert lines[0] == "SpanScaledOptimizer ("
    row = "blocks.0.attn  ScoreAttention  score  4      4         3.0, 0.5          1.0, 1.0"
    assert row in lines
    assert any(line.startswith("blocks.1.attn") and "left alone" in line for line in lines)
    assert "AdamW (" in lines


def test_print_puts_equal_layers_in_one_line_and_explains_the_taps():
    model = Decoder(layers=4)
    optimizer = wrap(model)
    lines = str(optimizer).splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == [
        "layer",
        "blocks.0.attn to blocks.3.attn",
    ]
    assert lines[3].startswith("tap: where Q and K are reached. score: in the call of scaled_dot")
    optimizer.span_groups[3]["parallel"] = 5.0
    lines = str(optimizer).splitlines()
    assert [line.split("  ")[0] for line in lines[2:4]] == [
        "blocks.0.attn to blocks.2.attn",
        "blocks.3.attn",
    ]


@pytest.mark.parametrize("scales", [(3.0, 0.5), [3.0, 0.5]])
def test_a_pair_for_scales_is_for_all_layers(model, scales):
    optimizer = wrap(model, scales=scales)
    assert {(g["parallel"], g["violation"]) for g in optimizer.span_groups} == {(3.0, 0.5)}
    optimizer.detach()
    with attach(model, scales) as hooks:
        assert len(hooks.groups) == len(optimizer.model.blocks)


def test_detach_gives_model_and_optimizer_back(batch):
    model = Decoder()
    twin = copy.deepcopy(model)
    before = snapshot(model)
    bare = AdamW(model.parameters(), lr=1e-2)
    optimizer = SpanScaledOptimizer(bare, model, SpanScale(2.0, 1.0))
    assert optimizer.detach() is bare
    assert snapshot(model) == before
    assert equal(train(model, bare, 3), train(twin, AdamW(twin.parameters(), lr=1e-2), 3))
    train(model, optimizer)  # the detached wrapper goes on as the bare optimizer


def test_a_shallow_copy_shares_groups_state_and_hooks_as_a_bare_copy_does(model):
    optimizer = wrap(model)
    train(model, optimizer)
    copied = copy.copy(optimizer)
    assert type(copied) is SpanScaledOptimizer
    assert copied.optimizer is not optimizer.optimizer
    assert copied.state is optimizer.state
    assert copied.param_groups is optimizer.param_groups
    copied.step()  # the gradients that are there are of no new backward pass
    copied.span_groups[0]["parallel"] = 3.0
    assert optimizer.span_groups[0]["parallel"] == 3.0
    other = Decoder()
    other.load_state_dict(model.state_dict())
    reference = wrap(other)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert equal(train(model, copied), train(other, reference))


def test_the_hooks_stay_until_the_last_shallow_copy_is_dropped(model):
    optimizer = wrap(model)
    copied = copy.copy(optimizer)
    del optimizer
    gc.collect()
    train(model, copied)
    assert any(module._forward_hooks for module in model.modules())
    del copied
    gc.collect()
    assert not any(module._forward_hooks for module in model.modules())


def test_print_shows_the_scales_in_force_when_an_entry_was_replaced(model):
    optimizer = wrap(model)
    shown = str(optimizer)
    optimizer.span_groups[0] = {"name": "made up"}
    assert str(optimizer) == shown


def test_a_dropped_optimizer_leaves_the_model_clean(model):
    before = snapshot(model)
    optimizer = wrap(model)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    reference = weakref.ref(optimizer)
    del optimizer, scheduler
    gc.collect()
    assert reference() is None
    assert snapshot(model) == before


def test_unknown_attributes_are_the_wrapped_optimizers(model):
    optimizer = wrap(model, lambda p: torch_optimizer.Lookahead(SGD(p, 0.1), k=7))
    assert optimizer.k == 7
    with pytest.raises(AttributeError, match="nonsense"):
        optimizer.nonsense  # noqa: B018


def test_an_attribute_of_the_wrapped_optimizer_is_set_on_it(model):
    class Moody(SGD):
        mood = "calm"

    optimizer = wrap(model, lambda p: Moody(p, 0.1))
    optimizer.mood = "wild"
    assert optimizer.optimizer.mood == "wild"
    optimizer.note = "mine"
    assert not hasattr(optimizer.optimizer, "note")


def test_what_is_no_closure_reaches_the_wrapped_step_as_it_is(model, batch):
    class Odd(SGD):
        def step(self, loss=None, *, closure=None):
            self.got = (loss, closure and closure())
            super().step()

    optimizer = wrap(model, lambda p: Odd(p, 0.1))
    loss = loss_of(model(batch), batch)
    loss.backward()
    optimizer.step(loss)
    assert optimizer.optimizer.got == (loss, None)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model(batch), batch)
        loss.backward()
        return loss

    optimizer.step(closure=closure)
    assert optimizer.optimizer.got[1] > 0


def test_a_copy_made_beside_a_detached_wrapper_of_the_same_model(model):
    old = wrap(model)
    old.detach()
    new = wrap(model)
    new_copy, old_copy = copy.deepcopy((new, old))
    assert "detached" in repr(old_copy)
    assert "detached" not in repr(new_copy)
    train(new_copy.model, new_copy)
    old_copy.load_state_dict(old.state_dict())


# What must never go wrong silently.


class Skipping(Decoder):
    skip = False

    def forward(self, tokens):
        blocks = self.blocks
        if self.skip:
            self.blocks = blocks[:1]
        try:
            return super().forward(tokens)
        finally:
            self.blocks = blocks


def test_a_layer_that_was_not_seen_is_an_error_before_anything_is_updated(batch):
    model = Skipping()
    optimizer = wrap(model)
    train(model, optimizer)
    model.skip = True
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model(batch), batch).backward()
    with pytest.raises(UnscaledLayerError, match=r"layer 'blocks.1.attn'.*on_missing"):
        optimizer.step()
    assert equal(before, [p.detach() for p in model.parameters()])
    model.skip = False
    train(model, optimizer)


def test_a_layer_that_was_not_seen_in_a_closure_is_an_error(batch):
    model = Skipping()
    model.skip = True
    optimizer = wrap(model)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        loss = loss_of(model(batch), batch)
        loss.backward()
        return loss

    with pytest.raises(UnscaledLayerError, match=r"'blocks.1.attn'"):
        optimizer.step(closure)
    assert equal(before, [p.detach() for p in model.parameters()])


def test_a_layer_whose_forward_is_called_directly_is_an_error(batch):
    class Direct(Decoder):
        def forward(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks:
                x = x + block["attn"].forward(x)
            return self.head(x)

    model = Direct()
    optimizer = wrap(model)
    loss_of(model(batch), batch).backward()
    with pytest.raises(UnscaledLayerError, match="call the module instead"):
        optimizer.step()


def test_a_skipped_layer_may_be_allowed(batch):
    model = Skipping()
    model.skip = True
    optimizer = wrap(model, on_missing="ignore")
    train(model, optimizer, 2)
    optimizer.detach()
    optimizer = wrap(model, on_missing="warn")
    with pytest.warns(UserWarning, match="'blocks.1.attn'"):
        train(model, optimizer, 2)


def test_a_skipped_layer_beside_sparse_gradients_is_found(batch):
    model = Skipping()
    model.embed = nn.Embedding(11, 16, sparse=True)
    model.skip = True
    optimizer = wrap(model, lambda p: SGD(p, 0.1))
    loss_of(model(batch), batch).backward()
    with pytest.raises(UnscaledLayerError):
        optimizer.step()


def test_a_step_without_a_backward_pass_passes(model):
    optimizer = wrap(model)
    optimizer.step()
    for parameter in model.parameters():  # as torch.distributed.checkpoint does
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    train(model, optimizer)
    optimizer.step()  # the gradients of the last step are still there
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


def test_a_stale_gradient_that_changed_counts_as_a_backward_pass(batch):
    model = Skipping()
    optimizer = wrap(model)
    loss_of(model(batch), batch).backward()
    optimizer.step()
    model.skip = True
    loss_of(model(batch), batch).backward()  # accumulates into the old gradients
    with pytest.raises(UnscaledLayerError):
        optimizer.step()


def test_micro_batches_accumulate_rescaled_gradients(model):
    optimizer = wrap(model.double(), scales={"*": (2.0, 0.5)})
    batches = [tokens() for _ in range(3)]
    parts = [gradients(model, loss_of(model(batch), batch)) for batch in batches]
    optimizer.zero_grad()
    for batch in batches:
        loss_of(model(batch), batch).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, sum(part[name] for part in parts))
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scales": {"nothing": (1.0, 1.0)}}, ValueError, "matches no attention layer"),
        ({"scales": {"*": (float("nan"), 1.0)}}, ValueError, "must be finite"),
        ({"ridge": -1e-3}, ValueError, "at least 0"),
        ({"on_missing": "skip"}, ValueError, "'skip'"),
        ({"scales": {"*": {"scale": 1.0}}}, TypeError, "unknown field scale"),
    ],
)
def test_a_bad_argument_is_an_error_and_installs_nothing(model, options, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        wrap(model, **options)
    assert snapshot(model) == before


def test_a_scaled_layer_that_is_not_in_the_optimizer_is_an_error(model):
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"layer 'blocks.0.attn'.*none of its trainable parameters"
    ):
        SpanScaledOptimizer(AdamW(model.head.parameters()), model, SpanScale(2.0, 1.0))
    assert snapshot(model) == before
    SpanScaledOptimizer(AdamW([model.blocks[0]["attn"].k_proj.bias]), model, {"blocks.0*": (2, 1)})


def test_something_that_is_no_optimizer_is_an_error(model):
    with pytest.raises(TypeError, match="got Decoder without param_groups, state, step"):
        SpanScaledOptimizer(model, model, SpanScale(2.0, 1.0))


def test_swapped_arguments_or_a_model_without_attention_are_errors(model):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        SpanScaledOptimizer(
            AdamW(model.parameters()), AdamW(model.parameters()), SpanScale(2.0, 1.0)
        )
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no attention layer found"):
        wrap(plain)


def test_wrapping_twice_is_an_error_that_says_how_to_go_on(model):
    first = wrap(model)
    with pytest.raises(ValueError, match=r"scaled already.*detach\(\)"):
        wrap(model)
    first.detach()
    wrap(model)


def test_example_inputs_find_what_only_a_forward_pass_can_tell(model, batch):
    optimizer = wrap(model, example_inputs=(batch,))
    assert "blocks.0.attn  ScoreAttention  score  4      4" in str(optimizer)
    optimizer.detach()
    before = snapshot(model)
    with pytest.raises(ValueError, match="5 per-head values"):
        wrap(model, scales=SpanScale([1.0] * 5), example_inputs=(batch,))
    assert snapshot(model) == before


def test_both_kinds_of_layer_train_together():
    model = Model()
    optimizer = wrap(model)
    x = torch.randn(2, 7, 16)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    assert optimizer.hooks.unseen() == ["score", "packed"]  # forgotten after each step


def test_an_optimizer_of_another_copy_of_the_model_is_told_so():
    model = torch.nn.TransformerEncoderLayer(16, nhead=2)
    other = copy.deepcopy(model)
    bare = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"another copy of this one.* a TransformerEncoderLayer"):
        SpanScaledOptimizer(bare, model, (2.0, 1.0))
    SpanScaledOptimizer(bare, other, (2.0, 1.0))
