"""Projection and rescaling of real tokens alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mathematics.samplers import (
    INF,
    NAN,
    D,
    N,
    assert_near,
    assert_same_bits,
    expected_rescaled,
    normal,
    tolerance,
)
from spanopt.projection import decompose, project, rescale


def test_padding_gives_each_sequence_what_it_has_alone(mask: Tensor, dtype: torch.dtype) -> None:
    basis, grad = normal(3, 2, N, D).to(dtype), normal(3, 2, N, D, seed=1).to(dtype)
    heads = mask[:, None].expand(3, 2, N)
    projected = project(basis, grad, mask=heads)
    result = rescale(grad, basis, parallel=2.0, violation=0.5, mask=heads)
    for i, real in enumerate(mask):
        alone = rescale(grad[i][:, real], basis[i][:, real], parallel=2.0, violation=0.5)
        allowed = 2 * max(tolerance(head[real]) for head in basis[i])
        assert_near(result[i][:, real], alone, allowed, grad[i])
        assert_same_bits(result[i][:, ~real], 0.5 * grad[i][:, ~real])
        assert torch.equal(projected[i][:, ~real], torch.zeros_like(grad[i][:, ~real]))


def test_masked_gradient_agrees_with_the_oracle(mask: Tensor, dtype: torch.dtype) -> None:
    basis, grad = normal(3, N, D).to(dtype), normal(3, N, D, seed=1).to(dtype)
    result = rescale(grad, basis, parallel=2.0, violation=0.5, mask=mask)
    allowed = 4 * max(tolerance(basis[i][mask[i]]) for i in range(3))
    assert_near(result, expected_rescaled(grad, basis, 2.0, 0.5, mask), allowed, grad)


def test_masked_parallel_and_violation_add_up_to_the_gradient(mask: Tensor) -> None:
    basis, grad = normal(3, N, D), normal(3, N, D, seed=1)
    parallel, violation = decompose(grad, basis, mask=mask)
    assert_near(parallel + violation, grad, 1e-15, grad)
    assert torch.equal(violation[~mask], grad[~mask])


@pytest.mark.parametrize("garbage", [NAN, INF, 1e30])
def test_what_stands_at_masked_tokens_does_not_reach_real_ones(
    mask: Tensor, dtype: torch.dtype, garbage: float
) -> None:
    basis, grad = normal(3, N, D).to(dtype), normal(3, N, D, seed=1).to(dtype)
    clean = rescale(grad, basis, parallel=2.0, violation=0.5, mask=mask)
    basis[~mask] = garbage
    assert_same_bits(rescale(grad, basis, parallel=2.0, violation=0.5, mask=mask), clean)
    grad[~mask] = garbage
    result = rescale(grad, basis, parallel=2.0, violation=0.5, mask=mask)
    assert_same_bits(result[mask], clean[mask])


@pytest.mark.parametrize(
    "broadcast",
    [
        lambda mask: mask[1],
        lambda mask: mask[1][None, :],
        lambda mask: mask[:, None, :],
        lambda mask: mask.new_ones(()),
        lambda mask: mask[:, None, :1],
    ],
    ids=["(N,)", "(1, N)", "(B, 1, N)", "()", "(B, 1, 1)"],
)
def test_a_mask_broadcasts_over_tokens_heads_and_sequences(
    mask: Tensor, broadcast: Callable[[Tensor], Tensor]
) -> None:
    basis, grad = normal(3, 2, N, D), normal(3, 2, N, D, seed=1)
    small = broadcast(mask)
    result = project(basis, grad, mask=small)
    assert_same_bits(result, project(basis, grad, mask=small.expand(3, 2, N).contiguous()))


def test_a_mask_of_ones_changes_no_bit(basis: Tensor, grad: Tensor) -> None:
    mask = torch.ones(basis.shape[0], dtype=torch.bool)
    masked = project(basis, grad, mask=mask)
    assert_same_bits(masked, project(basis.contiguous(), grad))  # as the copy that is masked
    assert_near(masked, project(basis, grad), 2 * tolerance(basis), grad)


def test_a_sequence_of_padding_alone_has_no_parallel_part(basis: Tensor, grad: Tensor) -> None:
    mask = torch.zeros(basis.shape[0], dtype=torch.bool)
    assert torch.equal(project(basis, grad, mask=mask), torch.zeros_like(grad))
    result = rescale(grad, basis, parallel=2.0, violation=0.5, mask=mask)
    assert torch.equal(result, 0.5 * grad)
