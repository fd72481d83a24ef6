"""Inverses of Cholesky factors."""

from __future__ import annotations

import pytest
import torch

from mathematics.samplers import normal
from spanopt.mathematics.factors import inverse_factor, solve


@pytest.mark.parametrize("d", [1, 2, 31, 32, 33, 64, 65, 96, 131])
def test_it_is_upper_triangular_and_inverts_the_matrix(d: int) -> None:
    root = normal(3, 2 * d, d)
    matrix = root.mT @ root
    inverse, failed = inverse_factor(matrix)
    assert not failed.any()
    assert torch.equal(inverse, inverse.triu())
    torch.testing.assert_close(inverse.mT @ matrix @ inverse, torch.eye(d).double().expand(3, d, d))


@pytest.mark.parametrize("d", [1, 2, 31, 32, 33, 64, 65, 96, 131])
def test_solving_multiplies_by_the_inverse(d: int) -> None:
    root, right = normal(3, 2 * d, d), normal(3, d, 5)
    matrix = root.mT @ root
    solution, failed = solve(matrix, right, torch.eye(d).double())
    assert not failed.any()
    torch.testing.assert_close(matrix @ solution, right)


@pytest.mark.parametrize("d", [33, 64, 131])
def test_a_factor_made_of_blocks_errs_by_rounding_near_singularity(d: int) -> None:
    """LAPACK's own factor of the whole matrix errs as much."""
    left = torch.linalg.qr(normal(64, d, d)).Q
    sizes = torch.logspace(0, -5.5, d, dtype=torch.float64)
    for order in (sizes, sizes.flip(0)):
        matrix = ((left * order) @ left.mT).float()
        inverse, failed = inverse_factor(matrix)
        factor = torch.linalg.inv(inverse.double()).mT
        assert not failed.any()
        error = (factor @ factor.mT - matrix).abs().amax()
        assert error < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("place", [0, 20, 40, 69])
def test_a_matrix_without_a_factor_is_marked_and_the_others_are_as_before(place: int) -> None:
    root = normal(3, 140, 70)
    matrix = root.mT @ root
    expected, _ = inverse_factor(matrix)
    matrix[1, place, place] = -1.0
    inverse, failed = inverse_factor(matrix)
    assert (failed > 0).tolist() == [False, True, False]
    assert torch.equal(inverse[[0, 2]], expected[[0, 2]])
