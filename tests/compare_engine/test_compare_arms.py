"""Arms and the controls that go with them; what is done to the user's optimizer."""

import re

import numpy as np
import pytest
import torch
from toy_training import Toy, loss_of, train

from spanopt import SpanScale, SpanScaledOptimizer
from spanopt.compare import Arm
from spanopt.compare.arms import FROZEN, NEAR_NULL, PLAIN, with_controls
from spanopt.compare.trial import Task, Trial
from spanopt.compare.wrapping import Wrap


def test_every_control_is_there_without_asking():
    arms = with_controls({"(2, 1)": (2, 1)})
    assert [*arms.all] == [PLAIN, "(2, 1)", "uniform (2, 2)", NEAR_NULL, FROZEN]
    assert arms.all[PLAIN].scales is None
    assert arms.all[FROZEN].held
    assert [*with_controls({"(2, 1)": (2, 1)}, ()).all] == [PLAIN, "(2, 1)"]


@pytest.mark.parametrize(
    ("arm", "control"),
    [
        ((2, 1), (2, 2)),
        ((1, 2), (2, 2)),
        ((1, 0.5), (0.5, 0.5)),
        ((3, 0.5), (3, 3)),
        (([2.0, 3.0], 1), ([2.0, 3.0], [2.0, 3.0])),
        (([1.0, 3.0], 2), ([2.0, 3.0], [2.0, 3.0])),
    ],
)
def test_uniform_scales_everything_by_the_arms_factor(arm, control):
    arms = with_controls({"arm": {"enc.*": arm, "dec.*": None}})
    expected = {"enc.*": SpanScale(*control), "dec.*": None}
    assert arms.all[arms.uniform["arm"]].layers == expected


def test_uniform_keeps_the_sides_apart():
    arms = with_controls({"arm": {"*": SpanScale(2, 1, key=(1, 1))}})
    (scale,) = arms.all[arms.uniform["arm"]].layers.values()
    assert (scale.side("query"), scale.side("key")) == ((2.0, 2.0), (1.0, 1.0))


def test_two_arms_of_one_factor_share_a_control_and_a_uniform_arm_has_none():
    arms = with_controls({"a": (2, 1), "b": (1, 2), "c": (2, 2), "d": (0, 1)}, ["uniform"])
    assert arms.uniform == {"a": "c", "b": "c"}
    assert [*arms.all] == [PLAIN, "a", "b", "c", "d"]
    pooled = with_controls({"a": Arm((2, 1), {"projection": "pooled"})}, ["uniform"])
    assert pooled.all["uniform (2, 2)"].options == {}


@pytest.mark.parametrize(
    ("arms", "controls", "message"),
    [
        ({}, (), "there are no arms"),
        ({"plain": (2, 1)}, (), "'plain' is the name of a control"),
        ({"a": (2, 1)}, ["nul"], "no control is named 'nul'"),
        ({"a": {}}, (), "would scale no layer"),
        ({"a": (2, float("nan"))}, (), "must be finite"),
    ],
)
def test_arms_that_make_no_sense_are_refused(arms, controls, message):
    with pytest.raises(ValueError, match=message):
        with_controls(arms, controls)


def steps(optimizer, model, count=3):
    for step in range(count):
        torch.manual_seed(step)
        loss = loss_of(model, torch.randn(4, 10, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_frozen_queries_and_keys_are_equal_before_and_after_under_weight_decay(kind):
    """Without being held they are not; all else trains."""
    frozen = with_controls({"(2, 1)": (2, 1)}).all[FROZEN]
    for arm, still in ((frozen, True), (Arm((0, 0)), False)):
        torch.manual_seed(0)
        model = Toy()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        wrap = Wrap(arm)
        optimizer = wrap(kind(model.parameters(), lr=0.05, weight_decay=0.1), model)
        steps(optimizer, model)
        after = dict(model.named_parameters())
        packed = "attention.in_proj_weight"
        assert torch.equal(before[packed][:16], after[packed][:16]) == still
        assert not torch.equal(before[packed][16:], after[packed][16:])
        name = "attention.out_proj.weight"
        assert not torch.equal(before[name], after[name])
        if still:
            assert wrap.held == 16 * 8 + 16  # the weights and the biases of Q and K
        wrap.close()


def test_plain_training_gets_its_own_optimizer_back_and_hooks_go_when_a_trial_ends():
    model = Toy()
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    assert Wrap(Arm())(bare, model) is bare
    wrap = Wrap(Arm((2, 1)))
    assert isinstance(wrap(bare, model), SpanScaledOptimizer)
    wrap.close()
    assert not model.attention._forward_hooks


def test_the_time_of_a_step_is_told_in_every_arm():
    task = Task(train, with_controls({"(2, 1)": (2, 1)}).all)
    for arm in (PLAIN, "(2, 1)"):
        result = task.run(Trial(arm, 0))
        assert result["steps"] == 12
        assert result["step_ms"] > 0


def bad_return(value):
    def bad(seed, wrap):
        wrap(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), torch.nn.Linear(1, 1))
        return value

    return bad


def forgets(seed, wrap):
    return 1.0


def raises(seed, wrap):
    raise ZeroDivisionError("no data")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (forgets, r"RuntimeError: train\(\) did not call wrap"),
        (raises, "ZeroDivisionError: no data"),
        (bad_return("low"), "TypeError: .*'loss' is 'low'"),
        (bad_return({}), "returned nothing, without the metric"),
        (bad_return(-1.0), "must be above 0"),
        (bad_return({"loss": True}), "'loss' is True"),
    ],
)
def test_a_trial_that_fails_is_recorded_with_its_error(function, message):
    result = Task(function, {PLAIN: Arm()}).run(Trial(PLAIN, 0))
    assert re.search(message, result["error"])
    assert function.__name__ in result["traceback"] or "trial.py" in result["traceback"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_a_trial_that_diverges_is_recorded_as_such(value):
    result = Task(bad_return(value), {PLAIN: Arm()}).run(Trial(PLAIN, 0))
    assert result["metrics"] == {"loss": None}


def test_numbers_of_any_kind_are_taken():
    for value in (1, np.float32(1), torch.tensor(1.0), np.array(1.0)):
        assert Task(bad_return(value), {PLAIN: Arm()}).run(Trial(PLAIN, 0))["metrics"] == {
            "loss": 1
        }


def test_a_function_that_takes_other_arguments_is_refused_before_anything_runs():
    with pytest.raises(TypeError, match=r"called with the arguments seed, wrap, rate in the arm"):
        Task(train, {PLAIN: Arm()}, tuned="rate").check()
