"""Span groups: editable, checked, and read back from what a checkpoint has of them."""

import copy
import math
import pickle

import pytest

from spanopt import SpanGroup, SpanScale
from spanopt.groups import entries_of, scales_of


def test_a_group_is_edited_like_a_dict_and_reports_each_change():
    changes = []
    group = SpanGroup("a", SpanScale(2.0), changes.append)
    group["parallel"] = 3
    group.update(violation=0.5, key=(1, 1))
    group |= {"query": [2, 2]}
    assert group == {
        "name": "a",
        "parallel": 3.0,
        "violation": 0.5,
        "query": (2.0, 2.0),
        "key": (1.0, 1.0),
    }
    assert changes[-1] == group.scale == SpanScale(3.0, 0.5, (2.0, 2.0), (1.0, 1.0))
    assert len(changes) == 3


def test_a_bad_edit_raises_and_changes_nothing():
    changes = []
    group = SpanGroup("a", SpanScale(2.0), changes.append)
    before = dict(group)
    for edit, error in (
        ({"parallel": math.nan, "violation": 0.0}, ValueError),
        ({"paralel": 1.0}, TypeError),
        ({"name": "b"}, ValueError),
    ):
        with pytest.raises(error, match="a: "):
            group.update(edit)
    for removal in (group.clear, group.popitem, lambda: group.pop("parallel")):
        with pytest.raises(TypeError, match="not added or removed"):
            removal()
    with pytest.raises(TypeError, match="not added or removed"):
        del group["parallel"]
    assert group == before
    assert changes == []


def test_a_copy_of_a_group_is_a_plain_dict():
    group = SpanGroup("a", SpanScale(2.0), print)
    for clone in (copy.deepcopy(group), copy.copy(group), pickle.loads(pickle.dumps(group))):
        assert type(clone) is dict
        assert clone == group


def test_values_inside_a_group_cannot_be_changed_behind_its_back():
    group = SpanGroup("a", SpanScale([1.0, 2.0], query=([1.0, 2.0], 1.0)))
    for value in (group["parallel"], group["query"], group["query"][0]):
        with pytest.raises(TypeError, match="item assignment"):
            value[0] = 5.0


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_a_number_that_no_float_holds_is_not_finite(value):
    group = SpanGroup("attn", SpanScale(2.0, 1.0))
    with pytest.raises(ValueError, match="attn: parallel must be finite"):
        group["parallel"] = value


def test_what_groups_say_of_themselves_makes_equal_scales_again():
    scales = {"a": SpanScale([2.0, 3.0], 0.5), "b": SpanScale(2.0, key=(1.0, [0.5, 2.0]))}
    saved = [SpanGroup(name, scale).plain() for name, scale in scales.items()]
    assert scales_of(saved) == scales
    assert entries_of(saved) == list(scales.items())


@pytest.mark.parametrize(
    "groups", [None, 3, [3], [{"parallel": 2.0}], [{"name": "a", "paralel": 2.0}]]
)
def test_what_is_no_list_of_groups_is_refused(groups):
    with pytest.raises(ValueError, match="not what state_dict"):
        scales_of(groups)


def test_a_layer_with_two_entries_is_refused():
    entry = SpanGroup("a", SpanScale()).plain()
    with pytest.raises(ValueError, match="scales of layer 'a' more than once"):
        scales_of([entry, entry])
