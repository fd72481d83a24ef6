"""Non-finite values, batches, layouts and empty inputs: each head stands for itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mathematics.samplers import (
    DTYPES,
    INF,
    NAN,
    D,
    N,
    assert_near,
    assert_same_bits,
    gradient_of,
    normal,
    tolerance,
)
from spanopt.projection import decompose, project, rescale

# Non-finite input.


@pytest.mark.parametrize("scales", [(2.0, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)])
def test_a_non_finite_gradient_stays_non_finite_in_its_head_alone(
    basis: Tensor, scales: tuple[float, float]
) -> None:
    heads = torch.stack([basis, basis])
    clean = gradient_of(heads)
    for value in (NAN, INF, -INF):
        broken = clean.clone()
        broken[0, -1, 0] = value
        for parallel, violation in (scales, map(torch.tensor, scales)):
            result = rescale(broken, heads, parallel=parallel, violation=violation)
            whole = rescale(clean, heads, parallel=parallel, violation=violation)
            assert not result[0, -1, 0].isfinite()
            assert_same_bits(result[1], whole[1])
            assert result[1].isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_projection_of_a_non_finite_value_is_not_finite(basis: Tensor, value: float) -> None:
    x = gradient_of(basis)
    x[-1, 0] = value
    result = project(basis, x)
    assert not result[:, 0].isfinite().any()
    assert result[:, 1:].isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_non_finite_basis_gives_no_finite_result_in_its_head_alone(
    basis: Tensor, grad: Tensor, value: float
) -> None:
    heads = torch.stack([basis, basis])
    heads[0, -1, 0] = value
    grads = torch.stack([grad, grad])
    result = rescale(grads, heads, parallel=2.0, violation=1.0)
    assert not result[0].isfinite().any()
    assert_same_bits(
        result[1], rescale(grads, torch.stack([basis, basis]), parallel=2.0, violation=1.0)[1]
    )
    assert result[1].isfinite().all()


# Leading dimensions and empty input.


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 4)])
def test_each_sequence_and_head_is_projected_as_if_alone(
    basis: Tensor, leading: tuple[int, ...]
) -> None:
    count = int(np.prod(leading))
    # Different heads, one of them zero: a head must not see its neighbours.
    weights = torch.arange(count, dtype=basis.dtype).reshape(*leading, 1, 1)
    rolled = torch.stack([basis.roll(i, 0) for i in range(count)])
    heads = rolled.reshape(*leading, *basis.shape) * weights
    grads = gradient_of(heads)
    result = rescale(grads, heads, parallel=2.0, violation=0.5)
    assert result.shape == grads.shape
    eps = torch.finfo(basis.dtype).eps
    for index in np.ndindex(leading):
        alone = rescale(grads[index], heads[index], parallel=2.0, violation=0.5)
        assert_near(result[index], alone, 2 * tolerance(heads[index]) + eps, grads[index])


def test_a_non_contiguous_layout_gives_the_same_values() -> None:
    basis = normal(2, N, 3, D).transpose(1, 2)
    grad = normal(2, N, 3, D, seed=1).transpose(1, 2)
    result = rescale(grad, basis, parallel=2.0, violation=1.0)
    expected = rescale(grad.contiguous(), basis.contiguous(), parallel=2.0, violation=1.0)
    assert_near(result, expected, 1e-13, grad)


@pytest.mark.parametrize(
    "shape", [(0, N, D), (2, 0, N, D), (0, D), (2, 0, D), (N, 0), (2, N, 0), (0, 0)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_input_gives_an_empty_result(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    empty = torch.empty(shape, dtype=dtype)
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    results = [
        project(empty, empty),
        project(empty, empty, mask=mask),
        rescale(empty, empty, parallel=2.0, violation=1.0),
        *decompose(empty, empty),
    ]
    for result in results:
        assert result.shape == shape
        assert result.dtype == dtype


def test_without_features_every_gradient_is_violation() -> None:
    grad = normal(N, 3)
    result = rescale(grad, torch.empty(N, 0).double(), parallel=2.0, violation=0.5)
    assert torch.equal(result, 0.5 * grad)
