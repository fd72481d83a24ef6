import math

import numpy as np
import pytest
import torch

from spanopt import SpanScale
from spanopt.scale import resolve_scales

pytestmark = pytest.mark.oldest

NAMES = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "decoder.layers.0.self_attn"]


def scaled(scales):
    return [scale and scale.parallel for scale in resolve_scales(scales, NAMES).values()]


def test_no_scales_means_the_default_on_every_layer():
    assert resolve_scales(None, NAMES) == dict.fromkeys(NAMES, SpanScale())


def test_the_default_changes_nothing_on_either_side():
    scale = SpanScale()
    assert scale.side("query") == scale.side("key") == (1.0, 1.0)


def test_one_scale_means_that_scale_on_every_layer():
    assert scaled(SpanScale(3.0)) == [3.0, 3.0, 3.0]


def test_a_pattern_matches_like_a_shell():
    assert scaled({"encoder.layers.*.self_attn": (3.0, 1.0)}) == [3.0, 3.0, None]
    assert scaled({"*.layers.[1-9].*": (3.0, 1.0)}) == [None, 3.0, None]


def test_among_patterns_the_last_match_wins():
    assert scaled({"*": (2.0, 1.0), "decoder.*": (3.0, 1.0)}) == [2.0, 2.0, 3.0]
    assert scaled({"decoder.*": (3.0, 1.0), "*": (2.0, 1.0)}) == [2.0, 2.0, 2.0]


def test_an_exact_name_beats_a_pattern_wherever_it_stands():
    assert scaled({NAMES[0]: (5.0, 1.0), "*": (2.0, 1.0)}) == [5.0, 2.0, 2.0]
    assert scaled({"*": (2.0, 1.0), NAMES[0]: None}) == [None, 2.0, 2.0]
    assert scaled({NAMES[0]: None, "*": (2.0, 1.0)}) == [None, 2.0, 2.0]


@pytest.mark.parametrize(
    "value", [SpanScale(3.0, 0.5), {"parallel": 3.0, "violation": 0.5}, (3.0, 0.5), [3.0, 0.5]]
)
def test_a_value_may_be_written_four_ways(value):
    assert set(resolve_scales({"*": value}, NAMES).values()) == {SpanScale(3.0, 0.5)}


@pytest.mark.parametrize("key", ["encoder.layers.0.selfattn", "encoders.*", "nothing"])
def test_a_key_that_matches_nothing_names_the_nearest(key):
    with pytest.raises(ValueError, match=r"matches no attention layer; the nearest names are 'e"):
        resolve_scales({key: (2.0, 1.0)}, NAMES)


@pytest.mark.parametrize(
    ("scales", "error", "message"),
    [
        ({}, ValueError, "scales is empty"),
        ({0: (1.0, 1.0)}, TypeError, "a layer name or a pattern, got 0"),
        ({"*": 2.0}, TypeError, r"scales\['\*'\]: a scale is a SpanScale"),
        ({"*": (1.0, 2.0, 3.0)}, TypeError, "got \\(1.0, 2.0, 3.0\\)"),
        ({"*": "ab"}, TypeError, "got 'ab'"),
        ({"*": {"ridge": 1.0}}, TypeError, "unknown field ridge"),
        ([(1.0, 2.0)], TypeError, "must be a dict"),
    ],
)
def test_other_values_are_errors(scales, error, message):
    with pytest.raises(error, match=message):
        resolve_scales(scales, NAMES)


@pytest.mark.parametrize(
    ("fields", "side"),
    [
        ({"parallel": [1.0] * 3, "violation": [1.0] * 4}, "query side"),
        ({"parallel": [1.0], "violation": [1.0] * 4, "query": (1.0, 1.0)}, "key side"),
        ({"key": ([1.0] * 2, [1.0] * 4)}, "key side"),
    ],
)
def test_two_sequences_of_one_side_that_differ_in_length_are_an_error(fields, side):
    with pytest.raises(ValueError, match=f"{side}: parallel has . per-head values and violation"):
        SpanScale(**fields)


def test_sequences_of_two_sides_may_differ_in_length():
    scale = SpanScale([1.0] * 3, [2.0] * 4, query=([1.0] * 4, [2.0] * 4), key=([1.0] * 2, 2.0))
    assert len(scale.side("query")[0]) == 4
    assert len(scale.side("key")[0]) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, [1.0, math.nan]])
@pytest.mark.parametrize("field", ["parallel", "violation"])
def test_a_scale_that_is_not_finite_is_an_error_that_names_it(field, bad):
    with pytest.raises(ValueError, match=f"{field} must be finite"):
        SpanScale(**{field: bad})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"parallel": []}, ValueError, "parallel is an empty sequence"),
        ({"parallel": "2"}, TypeError, "parallel must be a number"),
        ({"parallel": True}, TypeError, "got True"),
        ({"parallel": None}, TypeError, "got None"),
        ({"violation": 1j}, TypeError, "violation must be a number"),
        ({"query": 2.0}, TypeError, "query must be a"),
        ({"key": (1.0,)}, TypeError, "key must be a"),
        ({"key": (1.0, math.nan)}, ValueError, "key violation must be finite"),
        ({"parallel": [[1.0]]}, TypeError, "parallel must be a number"),
    ],
)
def test_what_is_not_a_scale_is_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        SpanScale(**arguments)


@pytest.mark.parametrize(
    "vector", [[2, 3.0], (2.0, 3.0), np.array([2.0, 3.0]), torch.tensor([2.0, 3.0])]
)
def test_per_head_values_may_be_any_sequence(vector):
    assert SpanScale(vector).parallel == (2.0, 3.0)


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0)])
def test_a_factor_may_be_any_number(number):
    assert SpanScale(number).parallel == 2.0


def test_a_side_of_its_own_overrides_the_common_factors():
    scale = SpanScale(3.0, 0.5, key=(1.0, 1.0))
    assert scale.side("query") == (3.0, 0.5)
    assert scale.side("key") == (1.0, 1.0)
    with pytest.raises(ValueError, match="got 'value'"):
        scale.side("value")


@pytest.mark.parametrize(
    "scale", [SpanScale(2.0), SpanScale([1.0, 2.0], 0.5), SpanScale(2.0, key=([1.0, 2.0], 3.0))]
)
def test_the_fields_make_an_equal_scale_again(scale):
    assert SpanScale.of(scale.fields()) == scale


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_a_number_that_no_float_holds_is_not_finite(value):
    with pytest.raises(ValueError, match="violation must be finite"):
        SpanScale(violation=value)
