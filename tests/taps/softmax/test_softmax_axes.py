"""Axes of scores, against a score matrix whose entries say which query and key they are of."""

import pytest
import torch

from spanopt.taps.softmax.axes import PLAIN, in_order, permuted, reshaped, tail, turned

B, H, N, M = 2, 3, 6, 4


def numbered():
    """Scores (B, H, N, M), in each entry the number of its query and key."""
    queries, keys = torch.arange(N).view(N, 1), torch.arange(M)
    return (queries * M + keys).expand(B, H, N, M).contiguous()


def assert_known(x, axes):
    """That these axes are those of queries and keys, in the order of their tokens."""
    assert torch.equal(in_order(x, axes, x.shape).flatten(0, -3), numbered().flatten(0, -3))


SHAPES = {
    "the same": (B, H, N, M),
    "heads merged": (B * H, N, M),
    "queries by rows and columns": (B, H, 2, 3, M),
    "both by rows and columns": (B, H, 3, 2, 2, 2),
    "a dimension of size 1 in between": (B, H, N, 1, M),
    "a dimension of size 1 at the end": (B, H, N, M, 1),
    "heads apart": (B, 1, H, N, M),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_view_keeps_the_tokens_of_each_side_and_back_again(shape):
    x = numbered().view(shape)
    axes = reshaped(PLAIN, (B, H, N, M), shape)
    assert_known(x, axes)
    assert reshaped(axes, shape, (B, H, N, M)) == PLAIN


@pytest.mark.parametrize(
    "shape", [(B, H, N * M), (B, H * N, M), (B, H * 2, 3 * M), (B, H, 4, 6), (B * H * N * M,)]
)
def test_a_view_that_mixes_tokens_with_others_keeps_nothing(shape):
    assert reshaped(PLAIN, (B, H, N, M), shape) is None


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (2, 3, 0, 1), (3, 0, 1, 2), (0, 2, 1, 3)])
def test_a_permutation_moves_the_tokens(order):
    assert_known(numbered().permute(order), permuted(PLAIN, list(order)))


def test_tokens_whose_rows_and_columns_change_places_are_not_put_together_wrongly():
    axes = reshaped(PLAIN, (B, H, N, M), (B, H, 2, 3, M))
    order = [0, 1, 3, 2, 4]
    x = numbered().view(B, H, 2, 3, M).permute(order)
    axes = permuted(axes, order)
    assert_known(x, axes)
    assert reshaped(axes, x.shape, (B, H, N, M)) is None


def test_one_query_is_followed_too():
    shape = (B, H, 1, M)
    axes = reshaped(PLAIN, shape, (B, H, 1, 1, 2, 2))
    assert reshaped(axes, (B, H, 1, 1, 2, 2), shape) is not None
    assert in_order(torch.ones(B, H, 1, 1, 2, 2), axes, (B, H, 1, 1, 2, 2)).shape[-2:] == (1, M)


def test_a_mask_takes_the_size_of_the_scores_only_where_dimensions_become_one():
    axes = reshaped(PLAIN, (B, H, N, M), (B, H, 2, 3, M))
    shape = (B, H, 2, 3, M)
    assert in_order(torch.ones(B, 1, 1, 1, M), axes, shape).shape == (B, 1, 1, M)
    assert in_order(torch.ones(2, 1, M), axes, shape).shape == (1, 1, N, M)


def test_heads_before_the_batch_come_after_it():
    x = numbered() + 100 * torch.arange(B).view(B, 1, 1, 1)
    axes = (-2,), (-1,), (-4,)
    assert torch.equal(in_order(x.transpose(0, 1), axes, (H, B, N, M)), x)
    assert tail(axes) == 4
    assert turned(axes) == ((-1,), (-2,), (-4,))
