"""State dicts of the wrapper: what is refused, by which name, and what is left as it was."""

import pytest
import torch
import torch_optimizer
from torch import nn
from torch.optim import SGD, AdamW

from spanopt import SpanScaledOptimizer


def attention():
    return nn.MultiheadAttention(8, num_heads=2)


def wrap(model, make=AdamW, scales=(2.0, 1.0)):
    return SpanScaledOptimizer(make(model.parameters(), lr=1e-2), model, {"*": scales})


def train(model, optimizer):
    x = torch.randn(5, 3, 8)
    model(x, x, x)[0].pow(2).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("value", [None, 3, [("state", {})]])
def test_what_is_no_dict_is_no_state_dict(value, attached):
    optimizer = wrap(attention())
    if not attached:
        optimizer.detach()
    with pytest.raises(ValueError, match=f"not a state dict of AdamW.* but {type(value).__name__}"):
        optimizer.load_state_dict(value)


def test_a_layer_that_is_named_twice_is_refused_and_nothing_changes():
    optimizer = wrap(attention())
    state = optimizer.state_dict()
    state["span_groups"] = [*state["span_groups"], {**state["span_groups"][0], "parallel": 7.0}]
    with pytest.raises(ValueError, match="scales of layer '' more than once"):
        optimizer.load_state_dict(state)
    assert optimizer.span_groups[0]["parallel"] == 2.0


def test_wrappers_of_two_models_with_the_same_layer_names_each_get_their_scales():
    first, second = attention(), attention()
    both = AdamW([*first.parameters(), *second.parameters()])
    inner = SpanScaledOptimizer(both, first, {"*": (3.0, 1.0)}, on_missing="ignore")
    outer = SpanScaledOptimizer(inner, second, {"*": (5.0, 1.0)}, on_missing="ignore")
    state = outer.state_dict()
    for wrapper in (inner, outer):
        wrapper.span_groups[0]["parallel"] = 9.0
    outer.load_state_dict(state)
    assert [wrapper.span_groups[0]["parallel"] for wrapper in (inner, outer)] == [3.0, 5.0]


@pytest.mark.parametrize(
    ("make", "key"),
    [(AdamW, "exp_avg"), (torch_optimizer.Lamb, "exp_avg_sq")],
    ids=["AdamW", "Lamb"],
)
@pytest.mark.parametrize("trained", [True, False])
def test_state_of_another_shape_is_refused_by_the_name_of_its_parameter(make, key, trained):
    model = attention()
    optimizer = wrap(model, make)
    train(model, optimizer)
    state = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    place = names.index("out_proj.weight")
    state["state"][place] = {**state["state"][place], key: torch.zeros(1, 8)}
    if not trained:
        optimizer.detach()
        optimizer = wrap(model, make)
    before = optimizer.state_dict()["state"]
    message = rf"out_proj.weight: {key} has the shape \(1, 8\) .* must have \(8, 8\)"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict()["state"].keys() == before.keys()


def test_state_that_has_a_shape_of_its_own_is_loaded():
    model = attention()
    optimizer = wrap(model, torch.optim.Adafactor)
    train(model, optimizer)
    state = optimizer.state_dict()
    optimizer.detach()
    again = wrap(model, torch.optim.Adafactor)
    again.load_state_dict(state)
    again.load_state_dict(state)
    assert len(again.state) == len(optimizer.state)


def test_state_of_fewer_parameters_is_left_to_the_optimizer():
    model = attention()
    optimizer = wrap(model, SGD)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
