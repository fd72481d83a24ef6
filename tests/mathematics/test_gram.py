"""Gram matrices of tokens that depend on each other: their Cholesky factors exist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mathematics.samplers import DTYPES, assert_near, expected_projection, tolerance
from spanopt.mathematics import gram, spans
from spanopt.projection import project, set_formulation


@pytest.fixture(autouse=True)
def _auto():
    yield
    set_formulation("auto")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


TOKENS = {
    "identical": lambda matrices, n, d: drawn(matrices, 1, d).expand(matrices, n, d),
    "three that are repeated": lambda matrices, n, d: drawn(matrices, 3, d)[:, torch.arange(n) % 3],
    "of rank 14": lambda matrices, n, d: drawn(matrices, n, 14) @ drawn(matrices, 14, d),
}


@pytest.mark.parametrize(
    ("formulation", "dtype"),
    [*(("plain", dtype) for dtype in DTYPES), *(("mixed", dtype) for dtype in DTYPES[2:])],
    ids=str,
)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("d", "lengths"), [(32, (128, 256, 512, 1000)), (64, (100, 512)), (128, (300,))]
)
def test_dependent_tokens_give_no_nan(
    d: int, lengths: tuple[int, ...], tokens: str, formulation: str, dtype: torch.dtype
) -> None:
    set_formulation(formulation)
    for n in lengths:
        basis = TOKENS[tokens](16, n, d).to(dtype)
        x = drawn(16, n, d).to(dtype)
        result = project(basis, x)
        assert result.isfinite().all(), n
        if tokens == "identical":
            expected = expected_projection(basis[0], x[0])
            assert_near(result[0], expected, 2 * tolerance(basis[0]), x[0])


def one_by_one(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices as a GPU may: the products of a sum are added one after the other."""
    total = a.new_zeros(len(a), a.shape[1], b.shape[2])
    for i in range(a.shape[2]):
        total = (total.double() + a[:, :, i, None].double() * b[:, i, None, :].double()).to(a.dtype)
    return total


@pytest.mark.parametrize("in_blocks", [True, False])
def test_long_sequences_are_added_up_in_blocks_where_products_come_one_by_one(
    in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    basis, x = TOKENS["identical"](4, 1500, 32).float(), drawn(4, 1500, 32).float()
    monkeypatch.setattr(gram, "product", one_by_one)
    if in_blocks:
        monkeypatch.setattr(spans, "gram_of", lambda q: gram._gram_in_blocks(q, gram._BLOCK))
    result = project(basis, x)
    assert result.isfinite().all() == in_blocks
    if in_blocks:
        assert_near(result[0], expected_projection(basis[0], x[0]), 1e-6, x[0])


@pytest.mark.parametrize("n", [1, 8, 9, 31, 32])
def test_blocks_make_the_same_gram_matrix(n: int) -> None:
    q = drawn(3, n, 4)
    torch.testing.assert_close(gram._gram_in_blocks(q, 8), q.mT @ q)


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 256), (torch.bfloat16, 2048)])
def test_other_devices_get_blocks_only_in_long_sequences(dtype: torch.dtype, block: int) -> None:
    for n, blocks in ((block, False), (block + 1, True)):
        q = torch.empty(2, n, 4, dtype=dtype, device="meta")
        with torch.profiler.profile() as profiler:
            assert gram.gram_of(q).shape == (2, 4, 4)
        assert any(event.key == "aten::sum" for event in profiler.key_averages()) == blocks
