"""Rescaled gradients: identity, linearity, scales by head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mathematics.samplers import (
    BASES,
    DTYPES,
    D,
    N,
    Operations,
    assert_near,
    assert_same_bits,
    expected_rescaled,
    gradient_of,
    normal,
    tolerance,
)
from spanopt.projection import rescale

# Rescaling.


@pytest.mark.parametrize(
    ("parallel", "violation"), [(2.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.25, -0.5)]
)
def test_rescaled_gradient_agrees_with_the_oracle(
    basis: Tensor, grad: Tensor, parallel: float, violation: float
) -> None:
    result = rescale(grad, basis, parallel=parallel, violation=violation)
    expected = expected_rescaled(grad, basis, parallel, violation)
    assert_near(result, expected, 4 * tolerance(basis), grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_one_leave_the_gradient_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    basis = BASES[name](0).to(dtype)
    grad = gradient_of(basis)
    grad[0] = -0.0
    before = grad.clone()
    assert_same_bits(rescale(grad, basis, parallel=1.0, violation=1.0), before)
    assert_same_bits(rescale(grad, basis, parallel=1, violation=1), before)


def test_scales_of_one_in_tensors_leave_the_values(basis: Tensor, grad: Tensor) -> None:
    one = torch.tensor(1.0)
    assert torch.equal(rescale(grad, basis, parallel=one, violation=one), grad)


@pytest.mark.parametrize("factor", [0.3, 0.0])
def test_equal_scales_multiply_exactly_and_project_nothing(
    basis: Tensor, grad: Tensor, factor: float
) -> None:
    with Operations() as operations:
        result = rescale(grad, basis, parallel=factor, violation=factor)
    assert_same_bits(result, grad * factor)
    assert set(operations.counts) <= {"aten::mul"}


def test_unequal_scales_do_project() -> None:
    basis = normal(N, D)
    with Operations() as operations:
        rescale(gradient_of(basis), basis, parallel=2.0, violation=1.0)
    assert operations.counts["aten::linalg_cholesky_ex"] >= 1


@pytest.mark.parametrize("power", [-12, 16])
def test_rescaling_commutes_exactly_with_a_loss_scale(
    basis: Tensor, grad: Tensor, power: int
) -> None:
    scale = 2.0**power
    scaled = rescale(scale * grad, basis, parallel=2.0, violation=0.3)
    assert_same_bits(scaled, scale * rescale(grad, basis, parallel=2.0, violation=0.3))


def test_rescaling_is_additive(basis: Tensor, grad: Tensor) -> None:
    other = gradient_of(basis, seed=6)

    def scaled(g: Tensor) -> Tensor:
        return rescale(g, basis, parallel=2.0, violation=0.3)

    # One projector serves all three, so the condition number has no part in the error.
    eps = torch.finfo(grad.dtype).eps
    assert_near(scaled(grad + other), scaled(grad) + scaled(other), 50 * eps, grad.abs() + 1)


def test_scales_of_one_per_head_equal_numbers(dtype: torch.dtype) -> None:
    basis, grad = normal(2, 3, N, D).to(dtype), normal(2, 3, N, D, seed=1).to(dtype)
    parallel, violation = [2.0, 0.5, 3.0], [1.0, 0.5, 0.1]
    result = rescale(
        grad, basis, parallel=torch.tensor(parallel), violation=torch.tensor(violation)
    )
    expected = expected_rescaled(grad, basis, parallel, violation)
    assert_near(result, expected, 1e-5 if dtype == torch.float32 else 1e-6, grad)
    for head in range(3):
        alone = rescale(
            grad[:, head], basis[:, head], parallel=parallel[head], violation=violation[head]
        )
        assert_near(result[:, head], alone, 1e-6, grad)


def test_scales_may_be_per_head_on_one_side_only() -> None:
    basis, grad = normal(3, N, D), normal(3, N, D, seed=1)
    parallel = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)
    result = rescale(grad, basis, parallel=parallel, violation=1.0)
    assert_near(result, expected_rescaled(grad, basis, parallel, 1.0), 1e-13, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_in_0_dimensional_tensors_equal_numbers_bit_for_bit(
    name: str, dtype: torch.dtype
) -> None:
    basis = BASES[name](0).to(dtype)
    grad = gradient_of(basis)
    as_tensors = rescale(grad, basis, parallel=torch.tensor(2.0), violation=torch.tensor(0.25))
    as_numbers = rescale(grad, basis, parallel=2.0, violation=0.25)
    assert as_tensors.isfinite().all() == as_numbers.isfinite().all()
    assert_same_bits(as_tensors.nan_to_num(), as_numbers.nan_to_num())
