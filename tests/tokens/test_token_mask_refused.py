"""Masks of tokens that are wrong or of another size."""

import pytest
import torch
from compare import assert_close

from spanopt import attach, token_mask
from tokens.token_forms import (
    KINDS,
    LENGTH,
    PROJECTIONS,
    SCALE,
    WIDTH,
    Attention,
    Model,
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


REAL = padding()


WRONG = {
    "no tensor": ([[True]], TypeError, "must be a tensor, got list"),
    "no tensor in a dict": ({"*": 1}, TypeError, "must be a tensor, got int"),
    "no tensor in a pair": ({"*": (REAL, "x")}, TypeError, "must be a tensor, got str"),
    "float": (REAL.float(), TypeError, "boolean.* or an integer.*torch.float32"),
    "complex": (REAL.cfloat(), TypeError, "boolean.* or an integer.*torch.complex64"),
    "one dimension": (REAL[0], ValueError, r"\(batch, length\), got the shape \(10,\)"),
    "an attention mask": (keys(REAL), ValueError, r"got the shape \(3, 1, 1, 10\)"),
    "negative": (REAL.long() - 3, ValueError, "numbered from 1, and padding is 0; got -3"),
    "no such layer": ({"layer.0": REAL}, ValueError, r"'layer.0' matches none .*layers.0.attn"),
    "no such layers": ({"*": REAL, "x.*": REAL}, ValueError, r"'x.\*' matches none"),
    "three sides": ({"*": (REAL, REAL, REAL)}, ValueError, r"'\*' .*\(queries, keys\), got .* 3"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_mask_is_an_error_at_once(wrong):
    masks, error, message = WRONG[wrong]
    model, x = Model(KINDS["sdpa"]).double(), normal(3, LENGTH, WIDTH)
    with attach(model, SCALE):
        plain = run(model, REAL, x)
        with pytest.raises(error, match=message), token_mask(masks):
            pytest.fail("must not be entered")
        assert_close(run(model, REAL, x), plain, 1e-12)


# Two rows would be taken for three heads where heads are merged into the batch.
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize(
    ("kind", "rows", "length"),
    [
        *(("sdpa", *size) for size in ((3, 9), (2, LENGTH), (6, LENGTH))),
        *((kind, *size) for kind in ("packed", "masked_fill") for size in ((3, 9), (2, LENGTH))),
        ("packed with weights", 2, LENGTH),
        ("masked_fill with merged heads", 3, 9),
        ("projections", 2, LENGTH),
    ],
)
def test_a_mask_of_another_size_is_an_error_in_the_layer(kind, rows, length, side, documents):
    model, x = Model(KINDS.get(kind, Attention)).double(), normal(3, LENGTH, WIDTH)
    projections = PROJECTIONS if kind == "projections" else None
    mask = torch.ones(rows, length, dtype=torch.int64)
    if documents:
        mask[:, 4:] = 2
    message = rf"layer 'layers.0.attn': .* {rows} x {length} tokens, .* {side} has"
    masks = {"*": (mask, None) if side == "query" else (None, mask)}
    with attach(model, SCALE, qk_modules=projections), token_mask(masks):
        with pytest.raises(ValueError, match=message):
            model(x)
