"""Bases of any magnitude."""

from __future__ import annotations

import pytest
import torch

from mathematics.samplers import (
    DTYPES,
    D,
    N,
    assert_near,
    assert_same_bits,
    expected_projection,
    expected_rescaled,
    gradient_of,
    integers,
    normal,
    tolerance,
)
from spanopt.projection import project, rescale

# Exponents of ten for a basis in each dtype, as far as its numbers reach on both sides.
MAGNITUDES = {
    torch.float64: (-307, -200, -160, 150, 300),
    torch.float32: (-37, -30, -25, -22, -19, -16, 16, 19, 25, 30, 37),
    torch.bfloat16: (-37, -22, -19, 19, 30, 37),
    torch.float16: (-4, 4),
}


@pytest.mark.parametrize(
    ("dtype", "power"), [(dtype, power) for dtype, all in MAGNITUDES.items() for power in all]
)
def test_a_basis_of_any_magnitude_has_its_projector(dtype: torch.dtype, power: int) -> None:
    unit = normal(N, D).clamp(-3, 3)
    basis = (unit * 10.0**power).to(dtype)
    grad = gradient_of(basis)
    unit = basis.double() * 10.0**-power  # as it was rounded
    allowed = 4 * torch.finfo(dtype).eps + 1e-15
    assert_near(project(basis, grad), expected_projection(unit.to(dtype), grad), allowed, grad)
    scaled = rescale(grad, basis, parallel=2.0, violation=0.5)
    assert_near(scaled, expected_rescaled(grad, unit.to(dtype), 2.0, 0.5), 2 * allowed, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_basis_of_the_least_numbers_of_its_dtype_has_its_projector(dtype: torch.dtype) -> None:
    whole = integers(N, D) * 64
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    basis = (whole * least).to(dtype)  # below the smallest normal number
    grad = gradient_of(basis)
    allowed = 4 * torch.finfo(dtype).eps
    assert_near(project(basis, grad), expected_projection(whole, grad), allowed, grad)


def test_magnitudes_of_sequences_and_heads_do_not_touch_each_other(dtype: torch.dtype) -> None:
    basis, grad = normal(3, 2, N, D).to(dtype), normal(3, 2, N, D, seed=5).to(dtype)
    powers = torch.tensor([[2.0**-100, 2.0**100], [0.0, 1.0], [2.0**-120, 2.0**120]], dtype=dtype)
    result = project(basis * powers[..., None, None], grad)
    expected = project(basis, grad)
    expected[1, 0] = 0
    assert_same_bits(result, expected)


@pytest.mark.parametrize("power", [-25, 25])
def test_what_is_projected_may_be_of_any_magnitude(power: int) -> None:
    basis, grad = normal(N, D).float(), normal(N, D, seed=5) * 10.0**power
    expected = expected_projection(basis, grad)
    assert_near(project(basis, grad.float()), expected, tolerance(basis), grad)
