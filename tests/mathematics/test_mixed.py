"""The formulation with products of half precision, and the setting that forces one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mathematics.samplers import (
    BASES,
    D,
    N,
    assert_near,
    assert_same_bits,
    expected_rescaled,
    gradient_of,
    normal,
    tolerance,
)
from spanopt.mathematics import formulations, fused, mixed, whitening
from spanopt.projection import get_formulation, project, rescale, set_formulation

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    yield
    set_formulation("auto")


@pytest.mark.parametrize("dtype", HALVES)
def test_every_awkward_basis_is_rescaled_with_an_error_of_the_dtype(
    name: str, dtype: torch.dtype
) -> None:
    set_formulation("mixed")
    basis = BASES[name](0).to(dtype)
    if not basis.isfinite().all():
        basis = (BASES[name](0) * 1e-5).to(dtype)
    grad = gradient_of(basis)
    result = rescale(grad, basis, parallel=2.0, violation=0.5)
    assert result.dtype == dtype
    assert_near(result, expected_rescaled(grad, basis, 2.0, 0.5), 3 * tolerance(basis), grad)


@pytest.mark.parametrize("dtype", HALVES)
def test_masks_and_values_by_head_are_taken(mask: Tensor, dtype: torch.dtype) -> None:
    set_formulation("mixed")
    basis = normal(3, N, 2, D).transpose(1, 2).to(dtype)
    grad = normal(3, 2, N, D, seed=1).to(dtype)
    real, factors = mask[:, None], torch.tensor([2.0, 0.5])
    hidden = ~real[..., None].expand_as(basis)
    basis = basis.masked_fill(hidden, torch.nan)
    result = rescale(grad, basis, parallel=factors, violation=0.25, mask=real)
    expected = expected_rescaled(grad, basis, factors, 0.25, real)
    assert_near(result, expected, 4 * torch.finfo(dtype).eps, grad)
    grad = grad.masked_fill(hidden, torch.nan)
    assert project(basis, grad, mask=real).isfinite().all()


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_bases_of_any_magnitude_are_projected_on(scale: float) -> None:
    set_formulation("mixed")
    basis, grad = (normal(N, D) * scale).bfloat16(), normal(N, D, seed=1).bfloat16()
    expected = expected_rescaled(grad, basis.double() / scale, 1.0, 0.0)
    assert_near(project(basis, grad), expected, 1e-2, grad)


@pytest.mark.parametrize("dtype", HALVES)
def test_compiled_and_eager_are_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    set_formulation("mixed")
    basis, grad = normal(2, N, D).to(dtype), normal(2, N, D, seed=1).to(dtype)
    compiled = torch.compile(
        lambda g, q: rescale(g, q, parallel=2.0, violation=1.0), fullgraph=True, backend="aot_eager"
    )
    assert_same_bits(compiled(grad, basis), rescale(grad, basis, parallel=2.0, violation=1.0))


# The choice.


def test_a_cpu_gets_the_plain_formulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "combined", None)
    monkeypatch.setattr(fused, "combined", None)
    basis, grad = normal(N, D).bfloat16(), normal(N, D, seed=1).bfloat16()
    expected = whitening.combined(basis, grad, ridge=None, mask=None)
    assert_same_bits(project(basis, grad), expected)


class OnAGpu(Tensor):
    """Values on the CPU that say that they are on a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, "mixed"),
        (torch.float16, "mixed"),
        (torch.float32, "plain"),
        (torch.float64, "plain"),
    ],
)
def test_a_gpu_gets_products_of_half_precision_where_the_tensors_are(
    dtype: torch.dtype, expected: str
) -> None:
    basis = normal(N, D).to(dtype).as_subclass(OnAGpu)
    assert formulations.formulation_of(basis, basis) == expected
    assert formulations.formulation_of(basis, basis, lambda part: part) == "plain"


def test_a_forced_formulation_that_cannot_be_had_is_an_error_that_says_why() -> None:
    basis = torch.ones(4, 2)
    set_formulation("mixed")
    with pytest.raises(RuntimeError, match=r"'mixed' is forced .*: it takes .*float16, not in tor"):
        project(basis, basis)
    set_formulation("fused")
    reason = r"(Triton is not installed|it runs on GPUs of NVIDIA, not on the device 'cpu')"
    with pytest.raises(RuntimeError, match=rf"'fused' is forced and can't be had: {reason}"):
        project(basis, basis)


def test_an_unknown_formulation_is_refused_and_the_known_ones_named() -> None:
    with pytest.raises(ValueError, match="'quick': there are auto, plain, mixed, fused"):
        set_formulation("quick")
    assert get_formulation() == "auto"


@pytest.mark.parametrize(("value", "expected"), [("plain", "plain"), ("quick", "ValueError")])
def test_the_environment_sets_it(value: str, expected: str) -> None:
    source = "from spanopt.projection import get_formulation; print(get_formulation())"
    run = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "SPANOPT_FORMULATION": value},
        capture_output=True,
        text=True,
    )
    assert expected in run.stdout + run.stderr
