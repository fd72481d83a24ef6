"""Masks of attention by hand: what they tell of padding."""

import pytest
import torch
from compare import largest_error
from torch import nn

from spanopt import (
    attach,
    token_mask,
)
from taps.softmax.softmax_forms import (
    MASKS,
    OF_SCORES,
    PADDED_KEYS,
    SCALE,
    SCALES,
    WINDOW,
    B,
    ByHand,
    D,
    H,
    M,
    N,
    bias,
    both_inputs,
    check,
    masked_by_itself,
    merged,
    mixed,
    normalised_both_ways,
    oracle,
    padded_oracle,
    rows_first,
    run,
    scores,
    split,
    tokens,
    tokens_first,
)


@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_are_passed_and_padded_keys_found_in_them(mask, padded):
    closed = (WINDOW | PADDED_KEYS) if padded else WINDOW.expand(B, 1, N, M)
    model = ByHand(lambda q, k: mask(scores(q, k), closed).softmax(-1)[..., :M]).double()
    real = ~PADDED_KEYS.squeeze(2) if padded else torch.tensor(True)
    check(model, *both_inputs(), hook=padded_oracle(True, real.numpy()))


@pytest.mark.parametrize(
    "product", ["bmm", "baddbmm", "reversed", "einsum", "heads first", "rows and columns", "mixed"]
)
def test_padding_is_found_whatever_the_product(product):
    closed = WINDOW | PADDED_KEYS
    mask = bias(closed).expand(B, H, N, M)
    weigh = {
        "bmm": lambda q, k: (split(torch.bmm(merged(q), merged(k).mT)) + mask).softmax(-1),
        "baddbmm": lambda q, k: split(
            torch.baddbmm(merged(mask), merged(q), merged(k).mT).softmax(-1)
        ),
        "reversed": lambda q, k: (k @ q.mT).masked_fill(closed.mT, -torch.inf).softmax(-2).mT,
        "einsum": lambda q, k: (
            (torch.einsum("ibnd,jbnd->ijbn", tokens_first(q), tokens_first(k)))
            .add(mask.permute(2, 3, 0, 1))
            .softmax(1)
            .permute(2, 3, 0, 1)
        ),
        "heads first": lambda q, k: (
            torch.einsum("rinhd,rjnhd->hnij", rows_first(q), rows_first(k))
            .masked_fill(closed[:, 0], -1e4)
            .softmax(-1)
            .transpose(0, 1)
        ),
        "rows and columns": lambda q, k: (
            scores(q, k)
            .view(B, H, 3, 3, 1, M)
            .masked_fill(PADDED_KEYS[:, :, None, None], -torch.inf)
            .view(B, H, N, M)
            .softmax(-1)
        ),
        "mixed": lambda q, k: mixed(scores(q, k)).masked_fill(closed, -torch.inf).softmax(-1),
    }[product]
    hook = padded_oracle(True, ~PADDED_KEYS.squeeze(2).numpy())
    check(ByHand(weigh).double(), *both_inputs(), hook=hook)


def test_in_self_attention_padded_keys_are_padded_queries():
    class Masked(ByHand):
        def forward(self, x, mask, hook=None):
            self.weigh = lambda q, k: (scores(q, k) + mask).softmax(-1)
            return super().forward(x, hook=hook)

    lengths = torch.arange(N, N - B, -1)[:, None, None, None]
    mask = bias(torch.arange(N) >= lengths, -1e9)
    real = (mask[:, 0] > -1).numpy()
    check(Masked(None).double(), tokens(), mask, hook=padded_oracle(real, real))


def test_queries_to_which_all_keys_are_closed_are_padding_in_cross_attention():
    padded_queries = torch.zeros(B, 1, N, 1, dtype=torch.bool)
    padded_queries[1, :, -3:] = True
    closed = WINDOW | padded_queries | PADDED_KEYS
    model = ByHand(lambda q, k: scores(q, k).masked_fill(closed, -1e9).softmax(-1)).double()
    real = ~padded_queries.squeeze(3).numpy(), ~PADDED_KEYS.squeeze(2).numpy()
    check(model, *both_inputs(), hook=padded_oracle(*real))


@pytest.mark.parametrize("name", OF_SCORES)
def test_masks_that_were_computed_from_the_scores_are_no_padding(name):
    check(ByHand(masked_by_itself(name)).double(), *both_inputs())


@pytest.mark.parametrize("first", [-1, -2])
def test_where_both_sides_are_normalised_the_first_softmax_tells_the_keys(first):
    sides = [SCALES["query"], SCALES["key"]]
    check(
        ByHand(normalised_both_ways(first)).double(),
        *both_inputs(),
        hook=oracle(*(sides if first == -1 else sides[::-1])),
    )


class CoAttention(nn.Module):
    """One product, in which each of two sequences attends to the other."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(H * D, D) for _ in range(2))

    def forward(self, x, context, masks=(None, None), hook=None):
        q, k = self.q_proj(x), self.k_proj(context)
        if hook is not None:
            q, k = hook(q, k)
        affinity = torch.bmm(q, k.transpose(1, 2))
        over_context, over_x = (
            affinity if mask is None else affinity.masked_fill(~mask, -1e9) for mask in masks
        )
        of_context = over_context.softmax(2) @ context
        of_x = over_x.softmax(1).transpose(1, 2) @ x
        return torch.cat([of_context, of_x], dim=1)


REAL_QUERIES, REAL_KEYS = torch.arange(N) < torch.tensor([[9], [7], [8]]), ~PADDED_KEYS[:, 0, 0]


OF_BOTH_SIDES = padded_oracle(REAL_QUERIES.numpy(), REAL_KEYS.numpy())


def test_co_attention_is_scaled_once_on_each_side():
    check(CoAttention().double(), *both_inputs())


def test_padding_of_both_sides_of_co_attention():
    masks = (REAL_QUERIES[:, :, None] & REAL_KEYS[:, None],) * 2
    check(CoAttention().double(), *both_inputs(), masks=masks, hook=OF_BOTH_SIDES)


def test_token_mask_goes_before_the_masks_of_co_attention():
    model, inputs = CoAttention().double(), both_inputs()
    masks = REAL_KEYS[:, None], REAL_QUERIES[:, :, None]
    _, expected = run(model, *inputs, masks=masks, hook=OF_BOTH_SIDES)
    with attach(model, SCALE), token_mask({"*": (REAL_QUERIES, REAL_KEYS)}):
        _, actual = run(model, *inputs, masks=masks)
    assert largest_error(actual, expected) < 1e-10
