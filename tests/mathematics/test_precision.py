"""Dtypes, condition numbers, the ridge and autocast."""

from __future__ import annotations

import pytest
import torch
from oracle import projector, tikhonov
from torch import Tensor

from mathematics.samplers import (
    BASES,
    DTYPES,
    D,
    N,
    array,
    assert_near,
    assert_same_bits,
    conditioned,
    expected_projection,
    expected_rescaled,
    gradient_of,
    normal,
    tolerance,
)
from spanopt.projection import default_ridge, project, rescale

# Dtypes and condition numbers.


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_keeps_the_dtype_and_errs_by_its_rounding(name: str, dtype: torch.dtype) -> None:
    basis = BASES[name](0).to(dtype)
    if not basis.isfinite().all():
        basis = (BASES[name](0) * 1e-5).to(dtype)
    grad = gradient_of(basis)
    result = project(basis, grad)
    assert result.dtype == dtype
    assert_near(result, expected_projection(basis, grad), tolerance(basis), grad)
    scaled = rescale(grad, basis, parallel=2.0, violation=0.5)
    assert scaled.dtype == dtype
    expected = expected_rescaled(grad, basis, 2.0, 0.5)
    assert_near(scaled, expected, 3 * tolerance(basis), grad)


@pytest.mark.parametrize("basis_dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_basis_and_gradient_may_differ_in_dtype(
    basis_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    basis, grad = normal(N, D).to(basis_dtype), normal(N, D, seed=5).to(grad_dtype)
    allowed = 4 * torch.finfo(grad_dtype).eps + 8 * tolerance(basis.float())
    for result, expected in (
        (project(basis, grad), expected_projection(basis, grad)),
        (
            rescale(grad, basis, parallel=2.0, violation=0.5),
            expected_rescaled(grad, basis, 2.0, 0.5),
        ),
    ):
        assert result.dtype == grad_dtype
        assert_near(result, expected, allowed, grad)


# Relative to the norm of P x. Above 1e4 the float32 ridge drops a part of the span by intention.
ACCURACY = {
    torch.float64: [
        (1e0, 1e-14),
        (1e1, 1e-14),
        (1e2, 5e-14),
        (1e3, 5e-13),
        (1e4, 5e-12),
        (1e5, 5e-11),
        (1e6, 5e-10),
        (1e7, 5e-9),
        (1e8, 5e-8),
    ],
    torch.float32: [(1e0, 1e-6), (1e1, 2e-6), (1e2, 5e-6), (1e3, 5e-5), (1e4, 2e-3)],
    torch.bfloat16: [(10.0**exponent, 4e-3) for exponent in range(9)],
    torch.float16: [(1e0, 5e-4), (1e1, 5e-4), (1e2, 5e-4), (1e3, 5e-4), (1e4, 2e-3)],
}


@pytest.mark.parametrize(
    ("dtype", "condition", "allowed"),
    [(dtype, *row) for dtype, table in ACCURACY.items() for row in table],
)
def test_error_at_a_condition_number_stays_within_the_table(
    dtype: torch.dtype, condition: float, allowed: float
) -> None:
    for seed in range(3):
        basis = conditioned(condition, 512, 64, seed).to(dtype)
        grad = gradient_of(basis, seed)
        expected = torch.from_numpy(projector(array(basis), 0.0) @ array(grad))
        assert_near(project(basis, grad), expected, allowed, expected)


@pytest.mark.parametrize("condition", [10.0**exponent for exponent in range(9)])
def test_projection_never_lengthens_at_any_condition_number(
    condition: float, dtype: torch.dtype
) -> None:
    basis = conditioned(condition, 128, 32).to(dtype)
    # Whatever is projected, and above all what lies along the weakest directions of the basis.
    left, _, right = torch.linalg.svd(basis, full_matrices=False)
    for x in (gradient_of(basis), left, basis @ right.mT[:, -3:], gradient_of(basis) - left):
        assert project(basis, x).norm() <= (1 + 1e-4) * x.norm()


# The ridge.


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.1, 100.0])
def test_an_explicit_ridge_is_the_documented_filter(
    basis: Tensor, grad: Tensor, ridge: float
) -> None:
    expected = torch.from_numpy(tikhonov(array(basis), ridge) @ array(grad))
    eps = torch.finfo(basis.dtype).eps
    # The filter is smooth on the scale of the ridge: no condition number worse than this one.
    allowed = eps * (100 + 2 / ridge**0.5)
    assert_near(project(basis, grad, ridge=ridge), expected, allowed, grad)


@pytest.mark.parametrize("units", [7, 23, 25, 800])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_one_factorisation_is_as_accurate_as_two(
    condition: float, units: int, dtype: torch.dtype
) -> None:
    """From 24 rounding units on a ridge takes one: both sides of that are near the filter."""
    eps = torch.finfo(dtype).eps
    basis = conditioned(condition, 512, 64).to(dtype)
    grad = gradient_of(basis)
    expected = torch.from_numpy(tikhonov(array(basis), units * eps) @ array(grad))
    result = project(basis, grad, ridge=units * eps)
    assert_near(result, expected, 0.1 * eps / (units * eps) ** 0.5, grad)


@pytest.mark.parametrize("shape", [(64, 16), (512, 8), (512, 32), (4096, 32), (16384, 16)])
@pytest.mark.parametrize("ridge", [None, 3e-6])
def test_identical_tokens_have_a_span(
    shape: tuple[int, int], ridge: float | None, dtype: torch.dtype
) -> None:
    """Rounding makes their Gram matrix indefinite, as sums of equal terms err to one side."""
    for seed in range(8):
        basis = normal(1, shape[1], seed=seed).expand(shape).to(dtype)
        assert_near(project(basis, basis, ridge=ridge), basis, 1e-5, basis)


@pytest.mark.parametrize("condition", [10.0**exponent for exponent in range(9)])
def test_the_default_ridge_is_the_documented_filter_at_any_condition_number(
    condition: float, dtype: torch.dtype
) -> None:
    basis = conditioned(condition, 128, 16).to(dtype)
    grad = gradient_of(basis)
    ridge = default_ridge(dtype)
    expected = torch.from_numpy(tikhonov(array(basis), ridge) @ array(grad))
    eps = torch.finfo(dtype).eps
    allowed = min(eps * (8 + condition), 0.5 * eps / ridge**0.5)
    assert_near(project(basis, grad), expected, allowed, grad)


@pytest.mark.parametrize("ridge", [0.0, 1e-40])
def test_a_ridge_below_the_default_counts_as_the_default(
    basis: Tensor, grad: Tensor, ridge: float
) -> None:
    assert_same_bits(project(basis, grad, ridge=ridge), project(basis, grad))


def test_default_ridge_follows_the_precision_of_the_products() -> None:
    before = torch.get_float32_matmul_precision()
    assert default_ridge(torch.bfloat16) == default_ridge(torch.float32)
    try:
        exact = default_ridge(torch.float32), default_ridge(torch.float64)
        torch.set_float32_matmul_precision("high")
        assert default_ridge(torch.float32) > 1e3 * exact[0]
        assert default_ridge(torch.float64) == exact[1]
    finally:
        torch.set_float32_matmul_precision(before)


# Where it runs.


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(basis: Tensor, grad: Tensor, low: torch.dtype) -> None:
    outside = project(basis, grad), rescale(grad, basis, parallel=2.0, violation=0.5)
    with torch.autocast("cpu", dtype=low):
        inside = project(basis, grad), rescale(grad, basis, parallel=2.0, violation=0.5)
    for result, expected in zip(inside, outside, strict=True):
        assert_same_bits(result, expected)
