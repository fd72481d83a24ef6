"""Optimizers that wrap optimizers, around the wrapper and inside it, and averages of the model.

Each is compared with the same thing around the bare optimizer, where tensor hooks that call the
NumPy oracle take the place of the wrapper.
"""

import copy
import functools

import pytest
import pytorch_optimizer
import schedulefree
import torch
import torch_optimizer
from compare import assert_differ, assert_same, snapshot
from compare import values_of as parameters
from models import Decoder, loss_of, tokens
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from spanopt import SpanScale, SpanScaledOptimizer, UnscaledLayerError, find_attention

PAIRS = {"query": (2.0, 0.5), "key": (0.6, 1.5)}


SCALES = {"*": SpanScale(**PAIRS)}


REFERENCE = {f"blocks.{i}.attn": PAIRS for i in range(2)}


STEPS = 5


@pytest.fixture
def model():
    return Decoder().double()


def wrap(optimizer, model):
    return SpanScaledOptimizer(optimizer, model, SCALES)


def closure_of(model, optimizer, step, reference=None):
    torch.manual_seed(step)
    batch = tokens()
    arguments = {} if reference is None else {"reference": reference}

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model(batch, **arguments), batch)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, reference=None, steps=STEPS, first=0, closures=False):
    for step in range(first, first + steps):
        closure = closure_of(model, optimizer, step, reference)
        if closures:
            assert optimizer.step(closure) is not None
        else:
            closure()
            optimizer.step()
    return parameters(model)


def sgd(parameters):
    return SGD(parameters, lr=0.1, momentum=0.9)


WRAPPERS = {
    "torch_optimizer.Lookahead": lambda o: torch_optimizer.Lookahead(o, k=2),
    "pytorch_optimizer.Lookahead": lambda o: pytorch_optimizer.Lookahead(o, k=2),
    "pytorch_optimizer.Lookahead, pullback": lambda o: pytorch_optimizer.Lookahead(
        o, k=2, pullback_momentum="pullback"
    ),
    "pytorch_optimizer.OrthoGrad": pytorch_optimizer.OrthoGrad,
    "pytorch_optimizer.ScheduleFreeWrapper": pytorch_optimizer.ScheduleFreeWrapper,
    "schedulefree.ScheduleFreeWrapper": schedulefree.ScheduleFreeWrapper,
}


ORDERS = ("around it", "inside it")


def in_train_mode(optimizer):
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def both(wrapper, model, order, make=sgd):
    """Return the wrapper around ours, or ours around the wrapper."""
    bare = make(model.parameters())
    if order == "around it":
        return in_train_mode(wrapper(wrap(bare, model)))
    return in_train_mode(wrap(wrapper(bare), model))


@pytest.mark.parametrize("closures", [False, True], ids=["backward", "closure"])
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_another_wrapper_trains_the_same_around_it_and_inside_it(model, wrapper, closures):
    twins = {order: copy.deepcopy(model) for order in (*ORDERS, "plain")}
    bare = in_train_mode(wrapper(sgd(model.parameters())))
    expected = train(model, bare, REFERENCE, closures=closures)
    plain = twins.pop("plain")
    bare = in_train_mode(wrapper(sgd(plain.parameters())))
    assert_differ(train(plain, bare, closures=closures), expected)
    for order, twin in twins.items():
        assert_same(train(twin, both(wrapper, twin, order), closures=closures), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_layer_that_was_not_seen_is_an_error_through_another_wrapper(model, wrapper, order):
    optimizer = both(wrapper, model, order)
    train(model, optimizer, steps=1)
    before = parameters(model)
    model.blocks[1]["attn"].forward = lambda x: x
    with pytest.raises(UnscaledLayerError, match=r"'blocks\.1\.attn'"):
        train(model, optimizer, steps=1, first=1)
    if order == "inside it":  # a wrapper around it may have begun its own step
        assert_same(parameters(model), before)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [name for name in WRAPPERS if not name.startswith("torch_opt")])
def test_another_wrapper_resumes_from_a_checkpoint_as_if_it_had_not_stopped(model, name, order):
    wrapper = WRAPPERS[name]
    twin, resumed = copy.deepcopy(model), Decoder().double()
    expected = train(model, both(wrapper, model, order))
    optimizer = both(wrapper, twin, order)
    train(twin, optimizer, steps=2)
    again = both(wrapper, resumed, order)
    ours = [o for o in (again, *vars(again).values()) if isinstance(o, SpanScaledOptimizer)]
    ours[0].hooks.set_scales(dict.fromkeys(REFERENCE, SpanScale(7.0, 7.0)))
    resumed.load_state_dict(twin.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(train(resumed, again, steps=STEPS - 2, first=2), expected)


# What fails without spanopt as well.


@pytest.mark.parametrize("make", [lambda o, m: o, wrap], ids=["bare", "around it"])
def test_torch_optimizers_lookahead_has_no_state_dict_in_this_version_of_torch(model, make):
    optimizer = torch_optimizer.Lookahead(make(sgd(model.parameters()), model))
    with pytest.raises(AttributeError, match=r"'Lookahead' .* '_optimizer_state_dict_pre_hooks'"):
        optimizer.state_dict()


@pytest.mark.parametrize("order", ["bare", *ORDERS])
def test_schedulefrees_wrapper_fails_around_adamw_in_the_same_way(model, order):
    # Its own entry in the state makes AdamW take that for its own, begun before.
    wrapper = schedulefree.ScheduleFreeWrapper
    optimizer = (
        in_train_mode(wrapper(AdamW(model.parameters())))
        if order == "bare"
        else both(wrapper, model, order, AdamW)
    )
    with pytest.raises(KeyError, match="exp_avg"):
        train(model, optimizer, REFERENCE if order == "bare" else None)


# Sharpness-aware minimisation takes two backward passes a step.


def sam(model, order, **options):
    """Return SAM and what the loop holds: SAM around ours, ours around SAM, or bare."""
    make = functools.partial(pytorch_optimizer.SAM, model.parameters(), rho=0.2, lr=1e-2, **options)
    if order == "around it":
        return make(base_optimizer=lambda groups, **kwargs: wrap(AdamW(groups, **kwargs), model))
    optimizer = make(base_optimizer=AdamW)
    return optimizer if order == "bare" else wrap(optimizer, model)


def train_sam(model, optimizer, use, reference=None):
    for step in range(STEPS):
        closure = closure_of(model, optimizer, step, reference)
        closure()
        if use == "closure":
            optimizer.step(closure)
        else:
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
    return parameters(model)


@pytest.mark.parametrize("use", ["closure", "first_step and second_step"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
def test_sam_takes_both_of_its_gradients_scaled(model, use, adaptive):
    plain, *twins = (copy.deepcopy(model) for _ in range(3))
    expected = train_sam(model, sam(model, "bare", adaptive=adaptive), use, REFERENCE)
    assert_differ(train_sam(plain, sam(plain, "bare", adaptive=adaptive), use), expected)
    for order, twin in zip(ORDERS, twins, strict=True):
        assert_same(train_sam(twin, sam(twin, order, adaptive=adaptive), use), expected)


@pytest.mark.parametrize("use", ["closure", "first_step and second_step"])
def test_sam_around_it_restores_the_weights_before_a_layer_that_was_not_seen_is_an_error(
    model, use
):
    optimizer = sam(model, "around it")
    train_sam(model, optimizer, use)
    before = parameters(model)
    model.blocks[1]["attn"].forward = lambda x: x
    with pytest.raises(UnscaledLayerError, match=r"'blocks\.1\.attn'"):
        train_sam(model, optimizer, use)
    assert_same(parameters(model), before)


# Schedule-free optimizers hold other weights for training than for evaluation.

SCHEDULE_FREE = {
    "AdamWScheduleFree": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2, warmup_steps=2),
    "SGDScheduleFree": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1),
    "RAdamScheduleFree": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.1),
}


def train_and_evaluate(model, optimizer, reference=None):
    """Return the weights of training and those of evaluation, between which it goes on."""
    seen = []
    for first in (0, 3):
        optimizer.train()
        seen.append(train(model, optimizer, reference, steps=3, first=first))
        optimizer.eval()
        seen.append(parameters(model))
    return seen


@pytest.mark.parametrize("make", SCHEDULE_FREE.values(), ids=SCHEDULE_FREE)
def test_a_schedule_free_optimizer_trains_and_evaluates_as_it_does_bare(model, make):
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    expected = train_and_evaluate(model, make(model.parameters()), REFERENCE)
    assert_differ(expected[2], expected[3])
    assert_differ(train_and_evaluate(plain, make(plain.parameters()))[-1], expected[-1])
    actual = train_and_evaluate(twin, wrap(make(twin.parameters()), twin))
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("make", SCHEDULE_FREE.values(), ids=SCHEDULE_FREE)
def test_a_schedule_free_optimizer_goes_on_from_a_checkpoint_in_either_mode(model, make):
    for mode in ("train", "eval"):
        optimizer, resumed = wrap(make(model.parameters()), model), Decoder().double()
        optimizer.train()
        train(model, optimizer, steps=2)
        getattr(optimizer, mode)()
        again = wrap(make(resumed.parameters()), resumed)
        resumed.load_state_dict(model.state_dict())
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.train()
        again.train()
        assert_same(train(resumed, again, first=2), train(model, optimizer, first=2))
        optimizer.detach()


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
def test_a_schedule_free_optimizer_that_is_not_in_train_mode_refuses_to_step(model, wrapped):
    optimizer = schedulefree.AdamWScheduleFree(model.parameters())
    optimizer = wrap(optimizer, model) if wrapped else optimizer
    with pytest.raises(Exception, match="not in train mode"):
        train(model, optimizer)


# Averages of the model are copies of it.


class Normalised(Decoder):
    """A decoder with running statistics to update."""

    def __init__(self):
        super().__init__()
        self.statistics = nn.BatchNorm1d(16)
        for block in self.blocks:
            block["norm"] = Transposed(self.statistics)


class Transposed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.mT).mT


def average(model, optimizer, reference=None, **options):
    """Train with a running average of the weights, then take its batch statistics."""
    averaged = AveragedModel(model, **options)
    scheduler = CosineAnnealingLR(optimizer, 2)
    swa = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
    rates = []
    for step in range(6):
        train(model, optimizer, reference, steps=1, first=step)
        rates.append(optimizer.param_groups[0]["lr"])
        if step < 2:
            scheduler.step()
        else:
            averaged.update_parameters(model)
            swa.step()
    torch.manual_seed(0)
    update_bn([tokens() for _ in range(3)], averaged)
    return averaged, rates


@pytest.mark.parametrize(
    "options",
    [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, {"use_buffers": True}],
    ids=["SWA", "EMA", "buffers"],
)
def test_an_average_of_the_weights_is_that_of_the_bare_optimizer_and_its_copy_plain(options):
    model = Normalised().double()
    twin = copy.deepcopy(model)
    expected, expected_rates = average(twin, sgd(twin.parameters()), REFERENCE, **options)
    averaged, rates = average(model, wrap(sgd(model.parameters()), model), **options)
    assert rates == expected_rates
    torch.testing.assert_close(averaged.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-11)

    batch = tokens()
    for one in (averaged.module, twin):
        one.zero_grad()
    twin.load_state_dict(averaged.module.state_dict())
    for one in (averaged, twin):
        loss_of(one(batch), batch).backward()
    for copied, own in zip(averaged.module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(copied.grad, own.grad)  # not scaled


def test_an_average_of_a_hooked_model_can_be_hooked_itself(model):
    before = snapshot(model)
    optimizer = wrap(sgd(model.parameters()), model)
    averaged = AveragedModel(model)
    names = [site.name for site in find_attention(averaged)]
    assert names == ["module.blocks.0.attn", "module.blocks.1.attn"]
    second = wrap(sgd(averaged.module.parameters()), averaged.module)
    reference = copy.deepcopy(model)
    expected = train(reference, sgd(reference.parameters()), REFERENCE)
    assert_same(train(averaged.module, second), expected)
    assert_same(train(model, optimizer), expected)
    optimizer.detach()
    assert snapshot(model) == before


@pytest.mark.parametrize("order", ["swa first", "wrapper first"])
def test_swalr_on_either_optimizer_sets_the_rates_of_both(model, order):
    bare = sgd(model.parameters())
    if order == "swa first":
        scheduler = SWALR(bare, swa_lr=0.02, anneal_epochs=2, anneal_strategy="linear")
        optimizer = wrap(bare, model)
    else:
        optimizer = wrap(bare, model)
        scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2, anneal_strategy="linear")
    rates = []
    for step in range(3):
        train(model, optimizer, steps=1, first=step)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == bare.param_groups[0]["lr"]
        rates.append(bare.param_groups[0]["lr"])
    assert rates == pytest.approx([0.06, 0.02, 0.02])
