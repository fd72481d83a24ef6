"""Scales of attention by hand: by head, by side, identity, and in every dtype."""

import pytest
import torch
from compare import largest_error

from spanopt import (
    SpanScale,
    attach,
)
from taps.softmax.softmax_forms import (
    SCALE,
    SCALES,
    WEIGHTS,
    B,
    ByHand,
    D,
    H,
    M,
    N,
    both_inputs,
    check,
    grouped,
    oracle,
    run,
    scores,
    tokens,
)


def repeated(k, groups):
    batch, kv_heads, length, d = k.shape
    expanded = k[:, :, None].expand(batch, kv_heads, groups, length, d)
    return expanded.reshape(batch, kv_heads * groups, length, d)


# By name: heads, key heads, and both as the tap sees them.
GROUPED = {
    "repeat_interleave": (
        (4, 2),
        (4, 4),
        lambda q, k: scores(q, k.repeat_interleave(2, dim=1)).softmax(-1),
    ),
    "expanded": ((4, 2), (4, 4), lambda q, k: scores(q, repeated(k, 2)).softmax(-1)),
    "5-D": (
        (4, 2),
        (4, 2),
        lambda q, k: scores(grouped(q, 2), k.unsqueeze(2)).softmax(-1).flatten(1, 2),
    ),
    "5-D einsum": (
        (4, 2),
        (4, 2),
        lambda q, k: torch.einsum("bkgnd,bkmd->bkgnm", grouped(q, 2), k).softmax(-1).flatten(1, 2),
    ),
    "multi-query einsum": (
        (4, 1),
        (4, 1),
        lambda q, k: torch.einsum("bhid,bjd->bhij", q, k.squeeze(1)).softmax(-1),
    ),
    "multi-query": ((4, 1), (4, 1), lambda q, k: scores(q, k).softmax(-1)),
    "multi-query, heads in the rows": (
        (4, 1),
        (1, 1),
        lambda q, k: scores(q[:, :1], k).softmax(-1).expand(B, 4, N, M),
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_queries_by_hand(name):
    (heads, kv_heads), seen, weigh = GROUPED[name]
    inputs = tokens(width=4 * D), tokens(length=M, width=4 * D)
    (site,) = check(ByHand(weigh, heads, kv_heads).double(), *inputs).sites
    assert (site.heads, site.kv_heads) == seen


@pytest.mark.parametrize("name", ["as many", "multi-query", "5-D", "5-D einsum"])
def test_per_head_values_scale_each_head_by_its_own(name):
    as_many = (4, 4), (4, 4), WEIGHTS["q @ k.mT"]
    (heads, kv_heads), _, weigh = {**GROUPED, "as many": as_many}[name]
    query, key = ([1.0, 2.0, 3.0, 4.0], 0.5), ([2.0, -3.0, 4.0, 0.5][:kv_heads], 1.0)
    model = ByHand(weigh, heads, kv_heads).double()
    inputs = tokens(width=4 * D), tokens(length=M, width=4 * D)
    check(model, *inputs, scale=SpanScale(query=query, key=key), hook=oracle(query, key))


def test_per_head_values_for_repeated_keys_are_those_of_their_query_heads():
    (heads, kv_heads), _, weigh = GROUPED["repeat_interleave"]
    query, key = ([1.0, 2.0, 3.0, 4.0], 0.5), ([2.0, -3.0, 4.0, 0.5], 1.0)
    model = ByHand(weigh, heads, kv_heads).double()
    inputs = tokens(width=4 * D), tokens(length=M, width=4 * D)
    with attach(model, SpanScale(query=query, key=key)):
        _, actual = run(model, *inputs)
    model.weigh = lambda q, k: scores(*oracle(query, key)(q, repeated(k, 2))).softmax(-1)
    _, expected = run(model, *inputs)
    assert largest_error(actual, expected) < 1e-10


@pytest.mark.parametrize(
    ("weigh", "scale", "message"),
    [
        (WEIGHTS["q @ k.mT"], SpanScale([1.0] * 3), "3 per-head values on the query side, which"),
        (WEIGHTS["torch.bmm"], SpanScale([1.0] * H), "which has no dimension for its heads"),
        (WEIGHTS["k @ q.mT over -2"], SpanScale(1, key=([1.0] * 3, 1)), "on the key side"),
    ],
)
def test_a_wrong_number_of_per_head_values_is_an_error_at_the_first_forward(weigh, scale, message):
    model = ByHand(weigh).double()
    with attach(model, scale), pytest.raises(ValueError, match=message):
        model(*both_inputs())


# Scales.


def test_identity_scales_leave_gradients_bit_for_bit():
    model, inputs = ByHand(WEIGHTS["q @ k.mT"]), both_inputs()
    model, inputs = model.double(), inputs
    before, plain = run(model, *inputs)
    with attach(model, {"*": (1.0, 1.0)}) as hooks:
        after, actual = run(model, *inputs)
        assert hooks.unseen() == []
    assert torch.equal(after, before)
    assert all(torch.equal(actual[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ((2.0, 2.0), (2.0, 2.0)),
        ((2.0, 2.0), (0.0, 0.0)),
        ((3.0, 3.0), (3.0, 1.0)),
        ((2.0, 0.5), (4.0, 4.0)),
        ((0.0, 1.0), (1.0, 0.0)),
        ((-2.0, 0.5), (3.0, -1.0)),
    ],
)
@pytest.mark.parametrize("weigh", ["q @ k.mT", "k @ q.mT over -2", "einsum, tokens first"])
def test_uniform_zero_and_negative_scales(weigh, query, key):
    scale, hook = SpanScale(query=query, key=key), oracle(query, key)
    check(ByHand(WEIGHTS[weigh]).double(), *both_inputs(), scale=scale, hook=hook)


@pytest.mark.parametrize("weigh", ["q @ k.mT", "k @ q.mT over -2"])
@pytest.mark.parametrize("side", ["query", "key"])
def test_one_side_only(side, weigh):
    model, inputs = ByHand(WEIGHTS[weigh]).double(), both_inputs()
    scales = {**SCALES, side: (1.0, 1.0)}
    scaled = {"query": "k_proj.weight", "key": "q_proj.weight"}[side]
    check(model, *inputs, scale=SpanScale(**scales), hook=oracle(**scales), names=[scaled])


@pytest.mark.parametrize("weigh", ["q @ k.mT", "k @ q.mT over -2"])
@pytest.mark.parametrize("frozen", ["q_proj", "k_proj"])
def test_one_side_frozen(frozen, weigh):
    model = ByHand(WEIGHTS[weigh]).double()
    getattr(model, frozen).requires_grad_(False)
    inputs = tokens(requires_grad=frozen == "k_proj"), tokens(length=M, requires_grad=False)
    trained = {"q_proj": "k_proj.weight", "k_proj": "q_proj.weight"}[frozen]
    check(model, *inputs, names=[trained])


def test_changes_of_scale_act_from_the_next_forward_on():
    model, inputs = ByHand(WEIGHTS["q @ k.mT"]).double(), both_inputs()
    with attach(model, SCALE) as hooks:
        _, old = run(model, *inputs)
        for leaf in (*model.parameters(), *inputs):
            leaf.grad = None
        loss = model(*inputs).pow(3).sum()
        hooks.groups[0].update(query=(4.0, 0.5))
        loss.backward()
        assert torch.equal(model.q_proj.weight.grad, old["q_proj.weight"])
        _, new = run(model, *inputs)
    _, expected = run(model, *inputs, hook=oracle(query=(4.0, 0.5)))
    assert largest_error(new, expected) < 1e-10


def test_bfloat16_with_the_softmax_in_float32():
    weigh = WEIGHTS["cast by softmax"]
    model = ByHand(weigh).bfloat16()
    inputs = tokens(dtype=torch.bfloat16), tokens(length=M, dtype=torch.bfloat16)
    check(model, *inputs, tolerance=0.03)


def test_float32():
    model = ByHand(WEIGHTS["with a sink"])
    check(model, tokens(dtype=torch.float32), tokens(length=M, dtype=torch.float32), tolerance=1e-4)


def test_autocast():
    model = ByHand(WEIGHTS["q @ k.mT"])
    inputs = tokens(dtype=torch.float32), tokens(length=M, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check(model, *inputs, tolerance=0.03)
