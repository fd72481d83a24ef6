"""Names of layers and patterns for them."""

import pytest

from spanopt.patterns import check_same_layers, matching, pattern_for

NAMES = ["enc.0.attn", "enc.1.attn", "dec.0.attn", "dec.0.cross"]


def test_the_last_pattern_and_any_exact_name_win():
    values = {"enc.0.attn": 1, "*": 2, "dec.*": 3}
    assert matching(values, NAMES, "values") == dict(zip(NAMES, (1, 2, 3, 3), strict=True))


def test_layers_that_no_key_matches_have_no_value():
    assert matching({"*.cross": 1}, NAMES, "values") == {"dec.0.cross": 1}


def test_a_key_is_a_string_that_matches():
    with pytest.raises(TypeError, match="a key of values is a layer name or a pattern, got 3"):
        matching({3: 1}, NAMES, "values")
    with pytest.raises(
        ValueError, match=r"values\['dec.1.attn'\] matches no .* names are .*'dec.0.attn'"
    ):
        matching({"dec.1.attn": 1}, NAMES, "values")


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["dec.0.cross"], "dec.0.cross"),
        (["enc.0.attn", "enc.1.attn"], "enc.*.attn"),
        (["enc.0.attn", "enc.1.attn", "dec.0.attn"], "*.attn"),
        (["enc.0.attn", "dec.0.cross"], "enc.0.attn"),
        (["3", "4"], "*"),
    ],
)
def test_a_pattern_matches_the_layers_and_no_others(names, pattern):
    others = [name for name in NAMES if name not in names] if names[0] in NAMES else []
    assert pattern_for(names, others) == pattern


def test_layers_of_a_checkpoint_and_a_model_that_differ_are_named():
    check_same_layers(["a", "b"], ["b", "a"])
    message = r"only in the checkpoint: \['c'\]; only in the model: \['b'\]\. Do this$"
    with pytest.raises(ValueError, match=message):
        check_same_layers(["a", "c"], ["a", "b"], "Do this")
