"""``token_mask``: by layer and side, nested, and against attention masks."""

import pytest
import torch
from compare import assert_close
from models import gradients
from torch import nn

from spanopt import attach, token_mask
from tokens.token_forms import (
    EACH_TAP,
    HEADS,
    KINDS,
    LENGTH,
    SCALE,
    WIDTH,
    Model,
    added,
    alone,
    assert_differ,
    causal,
    everything,
    keys,
    normal,
    padding,
    run,
    total,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch._prims_common.check.*",
    "ignore:.*enable_nested_tensor.*",
    "ignore:.*mismatched key_padding_mask and attn_mask.*",
)


# Padding that is told by hand.


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, dtype) for kind in EACH_TAP for dtype in (torch.bool, torch.int64)),
        *(("sdpa", dtype) for dtype in (torch.int32, torch.int8, torch.uint8)),
    ],
)
def test_token_mask_tells_of_padding_that_no_mask_shows(kind, dtype):
    model, x, real = Model(KINDS[kind]).double(), normal(3, LENGTH, WIDTH), padding()
    mask = causal(everything(real))  # a real token sees no padding, which the mask leaves open
    with attach(model, SCALE):
        expected = alone(model, x, real, causal)
        with token_mask(real.to(dtype)):
            assert_close(run(model, real, x, mask), expected)
        assert_differ(run(model, real, x, mask), expected)


@pytest.mark.parametrize("kind", ["sdpa", "add"])
def test_token_mask_goes_before_the_attention_mask(kind):
    model, x, real = Model(KINDS[kind]).double(), normal(3, LENGTH, WIDTH), padding()
    with attach(model, SCALE):
        # Weights of zero as much as at -1e9, but nothing that closes a key.
        expected = run(model, real, x, added(keys, -8e3)(real))
        with token_mask(everything(real)):
            assert_close(run(model, real, x, added(keys, -1e9)(real)), expected, 1e-12)


@pytest.mark.parametrize("bias_k", [False, True], ids=["", "bias_k"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
def test_token_mask_is_of_the_tokens_and_not_of_keys_that_the_layer_appends(bias_k, zero):
    module = nn.MultiheadAttention(
        WIDTH, HEADS, batch_first=True, add_bias_kv=bias_k, add_zero_attn=zero
    ).double()
    nn.init.normal_(module.in_proj_bias)
    x, real = normal(3, LENGTH, WIDTH), padding()

    def run():
        return gradients(module, module(x, x, x, key_padding_mask=~real)[0][real].pow(3).sum())

    with attach(module, SCALE):
        expected = run()
        with token_mask(real):
            assert_close(run(), expected, 1e-12)


def test_masks_by_layer_and_side_of_an_encoder_and_a_decoder():
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 16, dropout=0.0, batch_first=True).double()
    source, target = normal(3, LENGTH, WIDTH), normal(3, 8, WIDTH)
    of_source, of_target = padding(), padding(lengths=(8, 5, 6), length=8)

    def run(source, target, real, closed=None):
        future = ~torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).tril()
        y = model(
            source,
            target,
            tgt_mask=future,
            src_key_padding_mask=closed,
            memory_key_padding_mask=closed,
        )
        return gradients(model, y[real].pow(3).sum())

    with attach(model, SCALE):
        expected = total(
            run(source[i : i + 1, of_source[i]], target[i : i + 1, of_target[i]], slice(None))
            for i in range(3)
        )
        assert_differ(run(source, target, of_target, ~of_source), expected)
        masks = {
            "encoder.*": of_source,
            "decoder.*.self_attn": of_target,
            "decoder.*.multihead_attn": (of_target, of_source),
        }
        with token_mask(masks):
            assert_close(run(source, target, of_target, ~of_source), expected)
        with (
            token_mask(of_source),
            pytest.raises(
                ValueError,
                match=r"layer 'decoder.layers.0.self_attn': token_mask was given 3 x 10 tokens, "
                r"and the layer's query has 3 x 8; .*\{'decoder.layers.0.self_attn': \(queries, ke",
            ),
        ):
            run(source, target, of_target, ~of_source)


def masks_and_what_they_amount_to():
    right, left = padding(), padding("left")
    one, two = "layers.0.attn", "layers.1.attn"
    return {
        "exact name first": ({one: right, "*": left}, {one: right, two: left}),
        "exact name last": ({"*": left, one: right}, {one: right, two: left}),
        "later pattern": ({"*": left, "layers.*": right}, {one: right, two: right}),
        "earlier pattern": ({"layers.*": right, "*": left}, {one: left, two: left}),
        "pair": ({"*": (right, left)}, {one: (right, left), two: (right, left)}),
        "one layer": ({one: right}, {one: right, two: (None, None)}),
    }


@pytest.mark.parametrize("masks", masks_and_what_they_amount_to())
def test_an_exact_name_goes_before_patterns_and_a_later_pattern_before_an_earlier(masks):
    masks, expected = masks_and_what_they_amount_to()[masks]
    model, x, real = Model(KINDS["sdpa"]).double(), normal(3, LENGTH, WIDTH), padding()
    with attach(model, SCALE):
        with token_mask(expected):
            expected = run(model, real, x)
        with token_mask(masks):
            assert_close(run(model, real, x), expected, 1e-12)


def test_the_two_sides_are_told_apart():
    model, x, real = Model(KINDS["sdpa"]).double(), normal(3, LENGTH, WIDTH), padding()
    with attach(model, SCALE):
        seen = []
        for masks in ((real, None), (None, real), (real, real), (None, None)):
            with token_mask({"*": masks}):
                seen.append(run(model, real, x))
        for i, one in enumerate(seen):
            for other in seen[:i]:
                assert_differ(one, other)
        assert_close(seen[-1], run(model, real, x), 1e-12)


def test_an_inner_mask_goes_before_an_outer_one_until_it_is_left():
    model, x, real = Model(KINDS["sdpa"]).double(), normal(3, LENGTH, WIDTH), padding()
    left = padding("left")
    with attach(model, SCALE):
        plain = run(model, real, x)
        with token_mask({"layers.0.attn": left, "layers.1.attn": left}):
            of_left = run(model, real, x)
        with token_mask({"layers.0.attn": left, "layers.1.attn": real}):
            mixed = run(model, real, x)
        with token_mask(left):
            assert_close(run(model, real, x), of_left, 1e-12)
            with token_mask({"layers.1.attn": real}):
                assert_close(run(model, real, x), mixed, 1e-12)
            with pytest.raises(ZeroDivisionError), token_mask(real):
                raise ZeroDivisionError
            with pytest.raises(TypeError), token_mask("real"):
                pass
            assert_close(run(model, real, x), of_left, 1e-12)
        assert_close(run(model, real, x), plain, 1e-12)
    assert_differ(mixed, of_left)
    assert_differ(plain, of_left)


def test_a_backward_pass_after_the_block_goes_by_the_mask_of_its_forward_pass():
    model, x, real = Model(KINDS["sdpa"]).double(), normal(3, LENGTH, WIDTH), padding()
    with attach(model, SCALE):
        with token_mask(real):
            expected = run(model, real, x)
            loss = model(x)[real].pow(3).sum()
        assert_close(gradients(model, loss), expected, 1e-12)
