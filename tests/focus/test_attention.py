"""The attention to chosen keys equals brute force, whole and in chunks."""

import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from focus.brute import brute, keep_mask, masked_scores
from spanopt.focus import KINDS, focused_attention
from spanopt.focus.choosing import chosen, width_of
from spanopt.focus.spec import Keeping

N = 11


def inputs(heads=4, kv_heads=4, n=N, m=N, dtype=torch.float64, d=6):
    torch.manual_seed(0)
    shapes = (2, heads, n, d), (2, kv_heads, m, d), (2, kv_heads, m, 5)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def padding(n=N, m=N):
    real = torch.ones(2, 1, 1, m, dtype=torch.bool)
    real[1, ..., 7:] = False
    return real


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "padding": {"mask": padding()},
    "both": {"mask": padding() & torch.ones(N, N).tril().bool()},
    "closed": {"mask": padding() & (torch.arange(N) != 2)[:, None]},
    "added": {"mask": torch.zeros(2, 1, N, N, dtype=torch.float64).masked_fill(~padding(), -1e4)},
}


def outputs(attention, q, k, v, *others):
    out = attention()
    return [out, *torch.autograd.grad(out.sin().sum(), (q, k, v, *others))]


def assert_equal(actual, expected, tolerance=1e-12):
    for a, b in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= tolerance


def call(q, k, v, keeping, mask=None, **options):
    return focused_attention(q, k, v, keeping, attn_mask=mask, **options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("always", [(), (0, 4)], ids=["", "always"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_brute_force(kind, always, mask):
    q, k, v = inputs()
    for of_each in (1, 3, 4):
        keeping = Keeping(kind, of_each, always)
        slow = partial(brute, q, k, v, kind, of_each, always, **MASKS[mask])
        expected = outputs(slow, q, k, v)
        for chunk in (1, 4, 64):
            options = {"chunk": chunk, **MASKS[mask]}
            assert_equal(outputs(partial(call, q, k, v, keeping, **options), q, k, v), expected)


@pytest.mark.parametrize("always", [(), (0, 40)], ids=["", "always"])
@pytest.mark.parametrize("mask", ["none", "causal", "closed", "added"])
@pytest.mark.parametrize("kind", ["top", "window", "block"])
def test_few_keys_of_many_are_those_of_brute_force_too(kind, mask, always):
    q, k, v = inputs(heads=2, kv_heads=2, n=100, m=100)
    added = torch.randn(2, 1, 100, 100, dtype=torch.float64, requires_grad=True)
    closed = (torch.arange(100) != 2)[:, None] & torch.ones(100, 100, dtype=torch.bool).tril()
    options = {"none": {}, "causal": {"is_causal": True}, "closed": {"mask": closed}}
    given, others = options.get(mask, {"mask": added}), [added] if mask == "added" else []
    expected = outputs(partial(brute, q, k, v, kind, 1, always, **given), q, k, v, *others)
    for chunk in (7, 64):
        focused = partial(call, q, k, v, Keeping(kind, 1, always), chunk=chunk, **given)
        assert_equal(outputs(focused, q, k, v, *others), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(3, 9), (9, 4)])
def test_queries_and_keys_may_differ_in_number(kind, n, m):
    q, k, v = inputs(n=n, m=m)
    expected = outputs(lambda: brute(q, k, v, kind, 2), q, k, v)
    assert_equal(outputs(lambda: call(q, k, v, Keeping(kind, 2), chunk=2), q, k, v), expected)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_query_heads_may_share_key_heads(kv_heads):
    q, k, v = inputs(kv_heads=kv_heads)
    expected = outputs(lambda: brute(q, k, v, "top", 3, is_causal=True), q, k, v)
    grouped = outputs(
        lambda: call(q, k, v, Keeping("top", 3), is_causal=True, enable_gqa=True), q, k, v
    )
    assert_equal(grouped, expected)


@pytest.mark.parametrize("shape", [(1, 1, N, N), (2, 4, N, N), (N, N), (2, 1, 1, N), (4, 1, N)])
@pytest.mark.parametrize("kind", ["top", "block", "gradient"])
def test_a_float_mask_gets_its_gradient(kind, shape):
    q, k, v = inputs()
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = outputs(lambda: brute(q, k, v, kind, 3, mask=mask), q, k, v, mask)
    actual = outputs(lambda: call(q, k, v, Keeping(kind, 3), mask, chunk=4), q, k, v, mask)
    assert_equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_drops_weights_of_kept_keys_and_does_not_hang_on_chunks(kind):
    q, k, v = inputs()
    keeping = Keeping(kind, 4, (0,))
    results = []
    for chunk in (4, 64):
        torch.manual_seed(7)
        dropped = partial(call, q, k, v, keeping, dropout_p=0.4, chunk=chunk)
        results.append(outputs(dropped, q, k, v))
    assert_equal(*results)
    # The multipliers that were drawn, at the positions that are chosen.
    torch.manual_seed(7)
    scores = masked_scores(q, k).detach().flatten(0, 1)
    width = N if kind == "gradient" else width_of(keeping, N)
    drawn = F.dropout(torch.ones(8, N, width, dtype=torch.float64), 0.4)
    positions = chosen(scores, keeping, 0, N, N)
    multipliers = torch.ones(8, N, N, dtype=torch.float64)
    for b, i in itertools.product(range(8), range(N)):
        if kind == "gradient":
            multipliers[b, i] = drawn[b, i]
            continue
        for j, multiplier in zip(positions[b, i].tolist(), drawn[b, i], strict=True):
            if j < N:
                multipliers[b, i, j] = multiplier
    multipliers = multipliers.view(2, 4, N, N)
    assert set(multipliers.unique().tolist()) <= {0.0, 1.0, 1 / 0.6}
    expected = outputs(lambda: brute(q, k, v, kind, 4, (0,), multipliers), q, k, v)
    assert_equal(results[0], expected)


@pytest.mark.parametrize("values", [2, 10**6])
def test_the_largest_of_many_scores_are_found_in_groups_too(values):
    torch.manual_seed(0)
    scores = torch.randint(values, (3, 5, 1024)).double()
    positions = chosen(scores, Keeping("top", 16), 0, 5, 1024)
    assert all(len(set(row)) == 16 for row in positions.flatten(0, -2).tolist())
    found = scores.gather(-1, positions).sort(-1, descending=True).values
    assert found.equal(scores.topk(16).values)


def test_of_equal_scores_exactly_k_are_kept():
    q = torch.zeros(1, 2, 5, 4)
    positions = chosen(q @ q.mT, Keeping("top", 3), 0, 5, 5)
    assert positions.shape == (1, 2, 5, 3)
    assert all(len(set(row)) == 3 for row in positions.flatten(0, -2).tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [-torch.inf, -1e9])
def test_a_query_to_which_all_keys_are_closed_is_as_in_plain_attention(kind, value):
    q, k, v = inputs(dtype=torch.float32)
    mask = torch.zeros(N, N)
    mask[3] = value
    plain = F.scaled_dot_product_attention(q, k, v, mask)
    focused = call(q, k, v, Keeping(kind, 2), mask)
    torch.testing.assert_close(focused[..., 3, :], plain[..., 3, :])
    assert kind == "gradient" or not torch.allclose(focused, plain)


def test_in_bfloat16_keys_are_chosen_by_scores_in_float32():
    q, k, v = inputs(n=40, m=40, dtype=torch.bfloat16)
    exact = keep_mask(masked_scores(q.float(), k.float()), "top", 3)
    coarse = keep_mask(masked_scores(q, k).float(), "top", 3)
    assert not torch.equal(exact, coarse)
    out = call(q, k, v, Keeping("top", 3))
    assert out.dtype == torch.bfloat16
    expected = brute(q.float(), k.float(), v.float(), "top", 3).bfloat16()
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    out.sum().backward()
    assert q.grad.dtype == torch.bfloat16


def test_under_autocast_it_is_in_the_precision_of_plain_attention():
    q, k, v = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.scaled_dot_product_attention(q, k, v)
        focused = call(q, k, v, Keeping("top", 3))
    assert focused.dtype == plain.dtype == torch.bfloat16
    expected = brute(*(x.bfloat16().float() for x in (q, k, v)), "top", 3)
    torch.testing.assert_close(focused.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(N, 6), (3, N, 6), (2, 2, 2, N, 6)])
def test_any_number_of_dimensions(shape):
    x = torch.randn(shape, dtype=torch.float64)
    four = x.view(-1, 1, N, 6)
    expected = call(four, four, four, Keeping("top", 3)).view(shape)
    assert_equal([call(x, x, x, Keeping("top", 3))], [expected])


def test_what_is_kept_for_the_backward_pass_is_linear_in_the_number_of_keys():
    def saved(length):
        sizes = []
        q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            call(q, k, v, Keeping("top", 4))
        return sum(sizes)

    assert saved(512) == 2 * saved(256)


def test_a_second_derivative_is_refused_and_not_wrong():
    q, k, v = inputs()
    out = call(q, k, v, Keeping("top", 3)).sin().sum()
    (grad,) = torch.autograd.grad(out, q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), q)
