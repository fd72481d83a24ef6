"""Documents packed into one sequence train as they do alone."""

import math

import pytest
import torch
from compare import assert_close
from oracle import rescaled
from torch import nn

from spanopt import SpanScale, attach, rescale, token_mask
from spanopt.projection import rescale_by_document
from tokens.token_forms import (
    EACH_TAP,
    KINDS,
    LENGTH,
    LOWEST,
    PROJECTIONS,
    SCALE,
    WIDTH,
    Attention,
    Model,
    alone,
    assert_differ,
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


# Documents packed into a sequence.

DOCUMENTS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 7, 7, 7, 7, 7],
        [9, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 0, 0, 0, 0, 0],
    ]
)


PER_HEAD = SpanScale(query=([2.0, 3.0], [0.5, 1.0]), key=([1.5, 3.0], 1.0))


def blocks(documents, of_keys=None):
    of_keys = documents if of_keys is None else of_keys
    return documents[:, None, :, None] == of_keys[:, None, None]


def each_document(model, x, documents):
    """The sum of the gradients that the documents have one by one."""
    return total(
        run(model, slice(None), x[i : i + 1, row == number])
        for i, row in enumerate(documents)
        for number in row.unique()
        if number > 0
    )


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        *((kind, SCALE) for kind in KINDS if not kind.startswith(("add", "two"))),
        ("projections", SCALE),
    ]
    + [(kind, PER_HEAD) for kind in ("sdpa", "packed", "masked_fill", "projections")],
)
def test_each_document_gets_the_gradients_that_it_has_alone(kind, scale):
    model, x = Model(KINDS.get(kind, Attention), 1).double(), normal(3, 16, WIDTH)
    projections = PROJECTIONS if kind == "projections" else None
    with attach(model, scale, qk_modules=projections) as hooks:
        inputs = DOCUMENTS > 0, x, blocks(DOCUMENTS)
        expected = each_document(model, x, DOCUMENTS)
        with token_mask(DOCUMENTS.int()):
            assert_close(run(model, *inputs), expected)
        with token_mask(DOCUMENTS > 0):
            assert_differ(run(model, *inputs), expected)
        assert (hooks.sites[0].tap == "projection") == (kind == "projections")


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("sdpa", "aot_eager"),
        ("packed", "eager"),
        ("masked_fill with merged heads", "eager"),
        ("projections", "eager"),
    ],
)
def test_documents_compiled(kind, backend, compiled):
    model, x = Model(KINDS.get(kind, Attention), 1).double(), normal(3, 16, WIDTH)
    with attach(model, SCALE, qk_modules=PROJECTIONS if kind == "projections" else None):
        for documents in (DOCUMENTS, DOCUMENTS.flip(0)):
            expected = each_document(model, x, documents)
            with token_mask(documents):
                inputs = documents > 0, x, blocks(documents)
                assert_close(compiled(model, *inputs, backend=backend), expected)


@pytest.mark.parametrize("kind", ["sdpa", "packed"])
def test_another_mask_of_the_same_shape_does_not_recompile(kind, compiled):
    model, x = Model(KINDS[kind], 1).double(), normal(3, LENGTH, WIDTH)
    with attach(model, SCALE):
        seen = []
        for real in (padding(), padding("left"), padding(lengths=(3, 8, 10))):
            with token_mask(real):
                seen.append(compiled(model, slice(None), x, backend="eager"))
                assert_close(seen[-1], run(model, slice(None), x))
        assert_differ(*seen[:2])
        assert_differ(*seen[1:])


@pytest.mark.parametrize("kind", EACH_TAP)
def test_documents_in_cross_attention(kind):
    model = Model(KINDS[kind]).double()
    of_keys = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1, 7, 7, 7, 0]])
    documents = DOCUMENTS[:2]
    x, context = normal(2, 16, WIDTH), normal(2, LENGTH, WIDTH)
    with attach(model, SCALE):
        expected = total(
            run(
                model,
                slice(None),
                x[i : i + 1, documents[i] == number],
                None,
                context[i : i + 1, of_keys[i] == number],
            )
            for i in range(2)
            for number in documents[i].unique()
            if number > 0
        )
        mask = blocks(documents, of_keys)
        with token_mask({"layers.*": (documents, of_keys)}):
            assert_close(run(model, documents > 0, x, mask, context), expected)


def turned(q, k, v, mask):
    """By hand with the scores transposed."""
    scores = k @ q.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask.mT, LOWEST)
    return scores.softmax(-2).mT @ v


def test_keys_times_queries():
    model, x = Model(lambda: Attention(turned)).double(), normal(3, 16, WIDTH)
    with attach(model, SCALE):
        expected = each_document(model, x, DOCUMENTS)
        with token_mask(DOCUMENTS):
            assert_close(run(model, DOCUMENTS > 0, x, blocks(DOCUMENTS)), expected)
        with token_mask({"*": (DOCUMENTS, DOCUMENTS > 0)}):
            with pytest.raises(ValueError, match=r"'layers.0.attn' multiplies keys by queries"):
                model(x)
        real, y = padding(), x[:, :LENGTH]
        assert_close(run(model, real, y, keys(real)), alone(model, y, real, keys))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((3, 16, 4), (2.0, 0.5)),
        ((3, 2, 16, 4), (2.0, 0.5)),
        ((3, 2, 16, 4), (torch.tensor([2.0, 3.0]), torch.tensor(0.5))),
        ((3, 2, 16, 4), (torch.tensor([2.0, 3.0]), torch.tensor([0.5, -1.0]))),
        ((3, 5, 2, 16, 4), (torch.tensor([2.0, 3.0]), 0.0)),
    ],
)
def test_rescaling_by_document_is_rescaling_each_alone(shape, scales, dtype):
    q, g = normal(*shape).to(dtype), normal(*shape).to(dtype)
    parallel, violation = scales
    spans = [
        (DOCUMENTS[i] == number).nonzero().squeeze(1) + 16 * i
        for i in range(3)
        for number in DOCUMENTS[i].unique()
        if number > 0
    ]
    index = nn.utils.rnn.pad_sequence(spans, batch_first=True, padding_value=3 * 16)
    actual = rescale_by_document(g, q, index, parallel=parallel, violation=violation)
    assert actual.dtype == dtype
    padded = g * (violation if not torch.is_tensor(violation) else violation.view(-1, 1, 1))
    expected, of_oracle = padded.to(dtype), padded.double().numpy()
    for positions in spans:
        row, own = int(positions[0]) // 16, (positions % 16).tolist()
        parts = g[row][..., own, :], q[row][..., own, :]
        expected[row][..., own, :] = rescale(*parts, parallel=parallel, violation=violation)
        of_oracle[row][..., own, :] = rescaled(*(x.double() for x in parts), parallel, violation)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        actual.double(), torch.from_numpy(of_oracle), rtol=4 * tolerance, atol=4 * tolerance
    )


def test_rescaling_by_no_document_multiplies_by_the_violation():
    g, q = normal(2, 2, 5, 3), normal(2, 2, 5, 3)
    for index in (torch.empty(0, 4, dtype=torch.int64), torch.full((2, 3), 10)):
        actual = rescale_by_document(g, q, index, parallel=2.0, violation=0.5)
        torch.testing.assert_close(actual, 0.5 * g)
