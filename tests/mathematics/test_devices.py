"""No values are read back, inputs stay, and gradients flow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mathematics.samplers import (
    DTYPES,
    D,
    N,
    Operations,
    assert_near,
    assert_same_bits,
    expected_rescaled,
    normal,
)
from spanopt.mathematics.checks import can_be_read
from spanopt.projection import decompose, project, rescale


@pytest.mark.usefixtures("like_a_device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ridge", [None, 0.0, 1e-3])
def test_no_operation_reads_a_value_back_to_the_host(
    dtype: torch.dtype, ridge: float | None
) -> None:
    basis, grad = normal(2, 3, N, D).to(dtype), normal(2, 3, N, D, seed=1).to(dtype)
    mask = torch.arange(N) < 20
    per_head = torch.tensor([1.0, 2.0, 3.0])
    with Operations() as operations:
        project(basis, grad, ridge=ridge, mask=mask)
        decompose(grad, basis, ridge=ridge)
        rescale(grad, basis, parallel=per_head, violation=per_head[0], ridge=ridge, mask=mask)
    reads = {
        "_local_scalar_dense",
        "item",
        "equal",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "_linalg_check_errors",
        "_assert_async",
    }
    assert operations.counts["aten::linalg_cholesky_ex"] > 0
    assert not reads & {operation.removeprefix("aten::") for operation in operations.counts}


@pytest.mark.parametrize("ridge", [None, 1e-3])
def test_reading_values_changes_no_bit(
    basis: Tensor, grad: Tensor, ridge: float | None, request: pytest.FixtureRequest
) -> None:
    mask = torch.arange(len(basis)) < 20
    read = [project(basis, grad, ridge=ridge, mask=m) for m in (None, mask)]
    request.getfixturevalue("like_a_device")
    unread = [project(basis, grad, ridge=ridge, mask=m) for m in (None, mask)]
    for result, expected in zip(read, unread, strict=True):
        assert_same_bits(result, expected)


@pytest.mark.parametrize(
    ("device", "can"), [("cpu", True), ("meta", False)], ids=["cpu", "no values"]
)
def test_values_are_read_on_a_cpu_only(device: str, can: bool) -> None:
    assert can_be_read(torch.ones(2, device=device)) == can
    with FakeTensorMode():
        assert not can_be_read(torch.ones(2))
    assert not torch.func.vmap(lambda x: x + can_be_read(x))(torch.zeros(2)).any()
    assert can_be_read(torch.nn.Parameter(torch.ones(2)).detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_runs_on_tensors_that_have_no_values(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        basis = torch.empty(2, 3, N, D, dtype=dtype)
        mask = torch.empty(2, 1, N, dtype=torch.bool)
        result = rescale(
            basis, basis, parallel=torch.empty(3), violation=torch.empty(()), mask=mask
        )
        assert result.shape == basis.shape
        assert result.dtype == dtype


def test_it_runs_on_the_meta_device() -> None:
    basis = torch.empty(2, 3, N, D, device="meta")
    result = rescale(basis, basis, parallel=2.0, violation=1.0)
    assert result.device.type == "meta"
    assert result.shape == basis.shape


def test_inputs_are_not_changed(basis: Tensor, grad: Tensor) -> None:
    before = basis.clone(), grad.clone()
    mask = torch.arange(basis.shape[0]) % 2 == 0
    rescale(grad, basis, parallel=2.0, violation=0.5, mask=mask)
    assert_same_bits(basis, before[0])
    assert_same_bits(grad, before[1])


# Differentiation.


def test_rescaling_is_differentiable_in_the_gradient_and_constant_in_the_basis() -> None:
    basis = normal(2, N, D).requires_grad_()
    grad = normal(2, N, D, seed=1).requires_grad_()
    weight = normal(2, N, D, seed=2)
    result = rescale(grad, basis, parallel=2.0, violation=0.5)
    by_grad, by_basis = torch.autograd.grad(
        (result * weight).sum(), (grad, basis), allow_unused=True
    )
    assert by_basis is None
    # The map is symmetric, so its transpose is itself.
    assert_near(by_grad, expected_rescaled(weight, basis, 2.0, 0.5), 1e-13, weight)


def test_rescaling_passes_gradcheck_in_the_gradient() -> None:
    basis, grad = normal(2, 6, 3), normal(2, 6, 3, seed=1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda g: rescale(g, basis, parallel=2.0, violation=0.5, mask=mask), grad
    )
