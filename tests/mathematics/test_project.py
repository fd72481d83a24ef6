"""The projector: its properties, against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mathematics.samplers import (
    D,
    N,
    array,
    assert_near,
    assert_same_bits,
    conditioned,
    expected_projection,
    gradient_of,
    normal,
    tolerance,
)
from spanopt.projection import decompose, project

# The projector.


def test_projection_agrees_with_the_oracle(basis: Tensor, grad: Tensor) -> None:
    result = project(basis, grad)
    assert result.dtype == grad.dtype
    assert_near(result, expected_projection(basis, grad), tolerance(basis), grad)


def test_projection_is_idempotent(basis: Tensor, grad: Tensor) -> None:
    once = project(basis, grad)
    assert_near(project(basis, once), once, 2 * tolerance(basis), grad)


def test_projection_is_symmetric(basis: Tensor, grad: Tensor) -> None:
    other = gradient_of(basis, seed=6)
    left = (array(other) * array(project(basis, grad))).sum()
    right = (array(project(basis, other)) * array(grad)).sum()
    bound = 2 * tolerance(basis) * np.linalg.norm(array(other)) * np.linalg.norm(array(grad))
    assert abs(left - right) <= bound


def test_squares_of_parallel_and_violation_add_up(basis: Tensor, grad: Tensor) -> None:
    parallel, violation = decompose(grad, basis)
    total = parallel.double().square().sum() + violation.double().square().sum()
    squared = grad.double().square().sum()
    assert abs(total - squared) <= 2 * tolerance(basis) * squared


def test_parallel_and_violation_add_up_to_the_gradient(basis: Tensor, grad: Tensor) -> None:
    parallel, violation = decompose(grad, basis)
    eps = torch.finfo(grad.dtype).eps
    assert_near(parallel + violation, grad, 2 * eps, grad)
    assert_same_bits(parallel, project(basis, grad))


def test_span_of_the_basis_is_kept(basis: Tensor) -> None:
    assert_near(project(basis, basis), basis, tolerance(basis), basis)


def test_projection_is_unchanged_when_the_basis_is_multiplied_by_an_invertible_matrix(
    basis: Tensor, grad: Tensor
) -> None:
    d = basis.shape[-1]
    mixing = conditioned(10.0, d, d, seed=3) if d > 1 else torch.full((1, 1), -0.3).double()
    mixed = (basis.double() @ mixing).to(basis.dtype)
    # Rounding the product moves the span by eps * condition number.
    allowed = tolerance(basis) + 2 * tolerance(mixed)
    assert_near(project(mixed, grad), project(basis, grad), allowed, grad)


def test_projection_is_unchanged_by_the_scale_of_the_basis_bit_for_bit(
    basis: Tensor, grad: Tensor
) -> None:
    assert_same_bits(project(1024 * basis, grad), project(basis, grad))


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 3), (4, 7), (32, 64)])
def test_every_gradient_is_parallel_when_the_tokens_are_independent(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    basis = normal(*shape).to(dtype)
    grad = gradient_of(basis)
    parallel, violation = decompose(grad, basis)
    assert_near(parallel, grad, tolerance(basis), grad)
    assert_near(violation, torch.zeros_like(grad), tolerance(basis), grad)


def test_projection_of_the_zero_basis_is_zero(dtype: torch.dtype) -> None:
    basis = torch.zeros(N, D, dtype=dtype)
    assert torch.equal(project(basis, gradient_of(basis)), basis)


@pytest.mark.parametrize("columns", [1, 3, 40])
def test_what_is_projected_may_have_another_width(columns: int) -> None:
    basis, x = normal(N, D), normal(N, columns)
    assert_near(project(basis, x), expected_projection(basis, x), tolerance(basis), x)
