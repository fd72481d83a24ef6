"""Arguments that do not fit are refused with what was seen."""

from __future__ import annotations

import pytest
import torch

from mathematics.samplers import INF, NAN, D, N
from spanopt.projection import decompose, project, rescale

# Bad input.


@pytest.mark.parametrize("bad", [torch.complex64, torch.int64, torch.bool])
def test_a_dtype_that_is_not_real_floating_point_is_refused_by_name(bad: torch.dtype) -> None:
    good, wrong = torch.ones(N, D), torch.ones(N, D).to(bad)
    for call in (
        lambda basis, grad: project(basis, grad),
        lambda basis, grad: decompose(grad, basis),
        lambda basis, grad: rescale(grad, basis, parallel=2.0, violation=1.0),
        lambda basis, grad: rescale(grad, basis, parallel=1.0, violation=1.0),
    ):
        with pytest.raises(TypeError, match=f"basis must be real floating point, got {bad}"):
            call(wrong, good)
        with pytest.raises(TypeError, match=f"gradient must be real floating point, got {bad}"):
            call(good, wrong)


@pytest.mark.parametrize(
    ("basis_shape", "grad_shape"),
    [
        ((24, 5), (23, 5)),
        ((2, 24, 5), (3, 24, 5)),
        ((24, 5), (2, 24, 5)),
        ((2, 24, 5), (24, 5)),
        ((1, 24, 5), (2, 24, 5)),
        ((24,), (24,)),
        ((), ()),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both_shapes(
    basis_shape: tuple[int, ...], grad_shape: tuple[int, ...]
) -> None:
    basis, grad = torch.ones(basis_shape), torch.ones(grad_shape)
    with pytest.raises(ValueError) as refused:
        rescale(grad, basis, parallel=2.0, violation=1.0)
    assert str(basis_shape) in str(refused.value)
    assert str(grad_shape) in str(refused.value)
    with pytest.raises(ValueError):
        project(basis, grad)


def test_a_mask_that_is_not_boolean_is_refused_with_its_dtype() -> None:
    basis = torch.ones(2, N, D)
    for mask in (torch.ones(2, N), torch.ones(2, N, dtype=torch.int64)):
        with pytest.raises(TypeError, match=f"mask must be boolean.*{mask.dtype}"):
            project(basis, basis, mask=mask)


@pytest.mark.parametrize("shape", [(N + 1,), (3, N), (2, N, 1), (1, 2, N), (2, N, D), (D,)])
def test_a_mask_that_does_not_broadcast_is_refused_with_both_shapes(
    shape: tuple[int, ...],
) -> None:
    basis = torch.ones(2, N, D)
    with pytest.raises(ValueError) as refused:
        project(basis, basis, mask=torch.ones(shape, dtype=torch.bool))
    assert str(shape) in str(refused.value)
    assert str((2, N)) in str(refused.value)


@pytest.mark.parametrize("ridge", [-1e-9, NAN, INF, -INF])
def test_a_ridge_that_is_negative_or_not_finite_is_refused_with_its_value(ridge: float) -> None:
    basis = torch.ones(N, D)
    with pytest.raises(ValueError, match=f"ridge.*{ridge}"):
        project(basis, basis, ridge=ridge)
    with pytest.raises(ValueError, match=f"ridge.*{ridge}"):
        rescale(basis, basis, parallel=1.0, violation=1.0, ridge=ridge)


@pytest.mark.parametrize(
    ("scale_shape", "grad_shape"),
    [((3,), (N, D)), ((3,), (2, 1, N, D)), ((3,), (2, N, D)), ((2, 3), (2, 3, N, D))],
)
def test_scales_that_do_not_fit_the_heads_are_refused_with_both_shapes(
    scale_shape: tuple[int, ...], grad_shape: tuple[int, ...]
) -> None:
    grad = torch.ones(grad_shape)
    with pytest.raises(ValueError) as refused:
        rescale(grad, grad, parallel=torch.ones(scale_shape), violation=2.0)
    assert str(scale_shape) in str(refused.value)
    assert str(grad_shape) in str(refused.value)
