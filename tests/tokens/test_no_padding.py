"""Masks that tell of no padding."""

import pytest
import torch
from compare import assert_close
from torch import nn

from spanopt import attach, token_mask
from tokens.token_forms import (
    HEADS,
    KINDS,
    LENGTH,
    SCALE,
    WIDTH,
    Attention,
    Model,
    alone,
    assert_differ,
    everything,
    keys,
    normal,
    padding,
    run,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch._prims_common.check.*",
    "ignore:.*enable_nested_tensor.*",
    "ignore:.*mismatched key_padding_mask and attn_mask.*",
)


# Masks that close no key to all queries tell of no padding.

slopes = torch.tensor([1e5, 0.5], dtype=torch.float64)[:, None, None]


distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).double()


by_head = torch.rand(3, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.4


by_head[:, 0, :, 4], by_head[:, 1, 5, 4] = (
    False,
    True,
)  # a key that only one query sees, in one head


NO_PADDING = {
    "causal": distance >= 0,
    "window": distance.abs() < 2,
    "sliding window": (distance >= 0) & (distance < 3),
    "alibi": -distance.abs() * slopes,
    "causal alibi": (-distance * slopes).masked_fill(distance < 0, -torch.inf),
    "relative bias": nn.Parameter(torch.linspace(-99, 99, LENGTH**2).double().view(distance.shape)),
    "by head": by_head | torch.eye(LENGTH, dtype=torch.bool) & (torch.arange(LENGTH) != 4),
}


@pytest.mark.parametrize("mask", NO_PADDING)
@pytest.mark.parametrize("kind", ["sdpa", "packed", "packed with weights", "masked_fill"])
def test_masks_that_close_no_key_to_all_queries_tell_of_no_padding(kind, mask):
    mask = NO_PADDING[mask]
    if mask.dtype != torch.bool and kind == "masked_fill":
        kind = "add"
    model, x, real = Model(KINDS[kind]).double(), normal(3, LENGTH, WIDTH), padding()
    mask = mask[(None,) * (4 - mask.ndim)].expand(3, -1, -1, -1)
    with attach(model, SCALE):
        actual = run(model, real, x, mask)
        with token_mask(everything(real)):
            assert_close(actual, run(model, real, x, mask), 1e-12)
        with token_mask(real):
            assert_differ(actual, run(model, real, x, mask))


def filled_with_zero(q, k, v, mask):
    return (q @ k.mT).masked_fill(~mask, 0.0).softmax(-1) @ v


def filled_with_another_score(q, k, v, mask):
    return torch.where(mask, q @ k.mT, torch.full((), 0.1, dtype=q.dtype)).softmax(-1) @ v


@pytest.mark.parametrize("attend", [filled_with_zero, filled_with_another_score])
def test_scores_that_are_overwritten_by_scores_tell_of_no_padding(attend):
    model, x, real = Model(lambda: Attention(attend)).double(), normal(3, LENGTH, WIDTH), padding()
    with attach(model, SCALE):
        actual = run(model, real, x, keys(real))
        with token_mask(everything(real)):
            assert_close(actual, run(model, real, x, keys(real)), 1e-12)
        with token_mask(real):
            assert_differ(actual, run(model, real, x, keys(real)))


@pytest.mark.parametrize("kind", ["sdpa", "masked_fill", "masked_fill with merged heads"])
def test_a_mask_for_the_whole_batch_that_closes_keys_is_refused(kind):
    model, x = Model(KINDS[kind]).double(), normal(3, LENGTH, WIDTH)
    real = padding(lengths=(7, 7, 7))
    with attach(model, SCALE):
        expected = alone(model, x, real, keys)
        for mask in keys(real)[:1], keys(real)[:1].expand(1, 1, LENGTH, -1):
            with pytest.raises(ValueError, match=r"'layers.0.attn': .* keys 7, 8, 9 of 10 in se"):
                model(x, mask)
            with token_mask(real):
                assert_close(run(model, real, x, mask), expected)
