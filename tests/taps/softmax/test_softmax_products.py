"""Attention by hand in every way that products, softmaxes and weights are written."""

import pytest

from taps.softmax.softmax_forms import WEIGHTS, ByHand, D, M, N, both_inputs, check


@pytest.mark.parametrize("weigh", WEIGHTS.values(), ids=WEIGHTS)
def test_gradients_are_the_oracles_however_the_weights_are_written(weigh):
    (site,) = check(ByHand(weigh).double(), *both_inputs()).sites
    assert site.tap == "softmax"
    assert (site.query_length, site.key_length, site.head_dim) == (N, M, D)
