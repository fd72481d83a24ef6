"""Schedules of the learning rate, which are torch's, and of the scales, which are ours."""

import copy
import inspect
import json
import math
import warnings

import pytest
import torch
from models import Decoder, gradients, loss_of, tokens, train
from torch.optim import SGD, AdamW, lr_scheduler
from torch.optim.swa_utils import SWALR

from spanopt import SpanScale, SpanScaledOptimizer, SpanScheduler, attach
from spanopt.schedules import chained, constant, cosine, linear, piecewise

LR = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5, 2)], optimizer=o
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=6),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=3),
}
ORDERS = {
    "on the wrapper": lambda bare, model, make: (o := wrapped(bare, model), make(o)),
    "on the wrapped, after": lambda bare, model, make: (wrapped(bare, model), make(bare)),
    "on the wrapped, before": lambda bare, model, make: (make(bare), wrapped(bare, model))[::-1],
}


def wrapped(bare, model):
    return SpanScaledOptimizer(bare, model, SpanScale(2.0, 1.0))


def test_every_scheduler_of_torch_is_here():
    known = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and value.__module__ == lr_scheduler.__name__
        if issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} <= set(LR)


def rates(model, optimizer, scheduler):
    """Learning rates and momenta of six steps, with a restart of the schedule in between."""
    result = []
    for step in range(6):
        train(model, optimizer)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        group = optimizer.param_groups[0]
        result.append((group["lr"], group["momentum"]))
        if step == 2:
            state = copy.deepcopy((scheduler.state_dict(), optimizer.state_dict()))
            scheduler.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
    return result


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", LR)
def test_learning_rates_are_those_of_the_bare_optimizer(name, order):
    model = Decoder(layers=1)
    twin = SGD(model.parameters(), lr=0.1, momentum=0.9)
    bare = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        warnings.filterwarnings("ignore", message=".*epoch parameter.*", category=UserWarning)
        expected = rates(model, twin, LR[name](twin))
        assert len(set(expected)) > 1
        assert rates(model, *order(bare, model, LR[name])) == expected


# Schedules of the scales.


@pytest.fixture
def model():
    return Decoder()


def parallels(scheduler, steps, layer="blocks.0.attn"):
    result = []
    for _ in range(steps):
        result.append(scheduler.get_last_scale()[layer].parallel)
        scheduler.step()
    return result


FORMS = {
    "constant": (constant(0.5), [2.0] * 7),
    "warm-up": (linear(4), [1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0]),
    "warm-up from more": (linear(2, 2.0, 0.0), [5.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    "cosine": (cosine(4), [1 + (1 + math.cos(math.pi * min(i, 4) / 4)) for i in range(7)]),
    "piecewise": (piecewise({0: 0.0, 2: 1.0, 5: (7.0, 1.0)}), [1.0] * 2 + [3.0] * 3 + [7.0] * 2),
    "lambda": (lambda step: step / 2, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
    "chained": (chained((linear(2), 2), (constant(), 2), cosine(2)), [1, 2, 3, 3, 3, 2, 1]),
    "a scale": (lambda step: SpanScale(step + 1.0, 1.0), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
}


@pytest.mark.parametrize(("schedule", "expected"), FORMS.values(), ids=FORMS)
def test_a_schedule_moves_the_scales_from_step_to_step(schedule, expected, model):
    optimizer = SpanScaledOptimizer(AdamW(model.parameters()), model, {"*": (3.0, 1.0)})
    scheduler = SpanScheduler(optimizer, schedule)
    assert parallels(scheduler, 7) == pytest.approx(expected)
    scheduled = scheduler.get_last_scale()
    assert {group["name"]: group.scale for group in optimizer.span_groups} == scheduled


def test_schedules_go_by_layer_and_by_head_and_side(model):
    scales = {
        "blocks.0.attn": SpanScale([2.0, 3.0, 1.0, 5.0], key=(3.0, 0.0)),
        "blocks.1.attn": SpanScale(4.0, 1.0),
    }
    optimizer = SpanScaledOptimizer(AdamW(model.parameters()), model, scales)
    schedules = {"blocks.*": constant(0.5), "blocks.1.attn": None}
    last = SpanScheduler(optimizer, schedules).get_last_scale()
    assert set(last) == {"blocks.0.attn"}
    assert last["blocks.0.attn"].side("query") == ((1.5, 2.0, 1.0, 3.0), 1.0)
    assert last["blocks.0.attn"].side("key") == (2.0, 0.5)
    assert optimizer.span_groups[1]["parallel"] == 4.0


def test_the_gradients_are_those_of_the_scheduled_scales(model):
    model.double()
    batch = tokens()
    with attach(model, SpanScale(3.0, 0.5)) as hooks:
        scheduler = SpanScheduler(hooks, linear(4))
        actual = []
        for _ in range(5):
            actual.append(gradients(model, loss_of(model(batch), batch)))
            scheduler.step()
    for step, grads in enumerate(actual):
        side = dict.fromkeys(("query", "key"), (1 + step / 2, 1 - step / 8))
        logits = model(batch, reference=dict.fromkeys(("blocks.0.attn", "blocks.1.attn"), side))
        expected = gradients(model, loss_of(logits, batch))
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12)


def test_a_warm_up_from_the_identity_compiles_once(model):
    torch.compiler.reset()
    batch = tokens()
    with attach(model, SpanScale(3.0, 0.5)) as hooks:
        scheduler = SpanScheduler(hooks, chained((linear(3), 3), cosine(3)))
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        for step in range(7):
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                actual = gradients(model, loss_of(run(batch), batch))
            expected = gradients(model, loss_of(model(batch), batch))
            for name, grad in actual.items():
                torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
            scheduler.step()
    torch.compiler.reset()


def test_a_restarted_schedule_goes_on_where_it_was(model):
    def start(model):
        optimizer = SpanScaledOptimizer(
            AdamW(model.parameters(), lr=1e-2), model, SpanScale(2.0, 1.0)
        )
        return optimizer, SpanScheduler(optimizer, {"*": linear(6), "blocks.1.*": cosine(6)})

    def steps(model, optimizer, scheduler, count):
        for step in range(count):
            torch.manual_seed(step)
            train(model, optimizer)
            scheduler.step()

    twin = copy.deepcopy(model)
    whole = start(twin)
    steps(twin, *whole, 3)
    steps(twin, *whole, 3)
    first = start(model)
    steps(model, *first, 3)
    saved = json.loads(json.dumps(first[1].state_dict()))
    state = copy.deepcopy((model.state_dict(), first[0].state_dict()))
    first[0].detach()
    model.load_state_dict(state[0])
    optimizer, scheduler = start(model)
    optimizer.load_state_dict(state[1])
    scheduler.load_state_dict(saved)
    steps(model, optimizer, scheduler, 3)
    assert scheduler.get_last_scale() == whole[1].get_last_scale()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


BAD = {
    "no schedule": ({"*": 0.5}, TypeError, r"schedule of '\*' must be a function"),
    "no such layer": ({"encoder.*": linear(3)}, ValueError, r"schedule\['encoder.\*'\] matches no"),
    "not finite": (lambda step: math.nan, ValueError, r"'blocks.0.attn' at step 0: .*finite"),
    "no scale": (lambda step: "2", ValueError, r"'blocks.0.attn' at step 0: a scale is"),
    "too few heads": (lambda step: ([1.0, 2.0], 1.0), ValueError, "2 per-head values"),
}


@pytest.mark.parametrize(("schedule", "error", "message"), BAD.values(), ids=BAD)
def test_a_bad_schedule_is_an_error_and_changes_nothing(model, schedule, error, message):
    with attach(model, {"blocks.0.attn": (2, 1), "blocks.1.attn": (3, 1)}) as hooks:
        loss_of(model(batch := tokens()), batch).backward()  # the number of heads is known
        before = copy.deepcopy(hooks.state_dict())
        with pytest.raises(error, match=message):
            SpanScheduler(hooks, schedule)
        assert hooks.state_dict() == before


def test_a_schedule_that_goes_wrong_later_leaves_the_scales_and_the_step(model):
    with attach(model, {"*": (3.0, 1.0)}) as hooks:
        scheduler = SpanScheduler(hooks, lambda step: 1.0 if step < 2 else math.inf)
        scheduler.step()
        before = hooks.state_dict(), scheduler.state_dict()
        with pytest.raises(ValueError, match=r"at step 2: parallel must be finite"):
            scheduler.step()
        assert (hooks.state_dict(), scheduler.state_dict()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "'step' >= 0"),
        ({"step": None}, "'step' >= 0"),
        ({"base_scales": []}, "other layers: .*only here: .*blocks.0.attn"),
        ({"base_scales": 3}, "scales in the checkpoint"),
    ],
)
def test_a_foreign_state_of_a_schedule_is_refused_and_changes_nothing(model, change, message):
    with attach(model, SpanScale(2.0, 1.0)) as hooks:
        scheduler = SpanScheduler(hooks, linear(4))
        scheduler.step()
        before = hooks.state_dict(), scheduler.state_dict()
        with pytest.raises(ValueError, match=message):
            scheduler.load_state_dict({**scheduler.state_dict(), **change})
        assert (hooks.state_dict(), scheduler.state_dict()) == before


def test_an_argument_that_schedules_nothing_is_an_error(model):
    with pytest.raises(TypeError, match="takes a SpanScaledOptimizer or what"):
        SpanScheduler(AdamW(model.parameters()), linear(3))
    for steps in (0, -1, 1.5, True):
        for schedule in (linear, cosine, lambda steps: chained((constant(), steps), constant())):
            with pytest.raises(ValueError, match="a whole number of at least 1"):
                schedule(steps)
    with pytest.raises(ValueError, match="a value for step 0"):
        piecewise({1: 1.0})
    with pytest.raises(TypeError, match="one schedule that goes on"):
        chained((linear(3), 3))


def test_a_schedule_by_name_is_refused_with_the_functions_there_are():
    hooks = attach(Decoder(), SpanScale(2.0, 1.0))
    with pytest.raises(TypeError, match=r"got 'linear'; spanopt\.chained, .*linear"):
        SpanScheduler(hooks, "linear")
    hooks.remove()


def test_a_strength_outside_of_0_and_1_goes_on_in_the_same_direction():
    hooks = attach(Decoder(), SpanScale(3.0, 0.5))
    scheduler = SpanScheduler(hooks, piecewise({0: 1.5, 1: -1.0}))
    scales = [next(iter(scheduler.get_last_scale().values()))]
    scheduler.step()
    scales.append(next(iter(scheduler.get_last_scale().values())))
    assert [(scale.parallel, scale.violation) for scale in scales] == [(4.0, 0.25), (-1.0, 1.5)]
    hooks.remove()


def test_a_strength_that_no_float_holds_is_refused():
    hooks = attach(Decoder(), SpanScale(3.0, 0.5))
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.attn' at step 0"):
        SpanScheduler(hooks, lambda step: 10**400)
    hooks.remove()
