"""The projection on a GPU against the oracle, in every formulation and precision."""

import pytest
import torch
from mathematics.samplers import (
    BASES,
    DTYPES,
    PADDINGS,
    D,
    N,
    assert_near,
    conditioned,
    expected_projection,
    expected_rescaled,
    gradient_of,
    normal,
    tolerance,
)
from torch.profiler import ProfilerActivity, profile

from spanopt.mathematics import fused, mixed
from spanopt.mathematics.together import rescale_together
from spanopt.projection import project, rescale, set_formulation

DEVICE = "cuda"
FORMULATIONS = {"plain": None, "mixed": mixed, "fused": fused}


def force(formulation, basis, x):
    """Force a formulation, or skip the test where it can't be had."""
    chosen = FORMULATIONS[formulation]
    reason = chosen and chosen.why_not(basis, x, None)
    if reason:
        pytest.skip(reason)
    set_formulation(formulation)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_every_awkward_basis_is_rescaled(name, dtype, formulation):
    basis = BASES[name](0).to(dtype)
    if not basis.isfinite().all():
        basis = (BASES[name](0) * 1e-5).to(dtype)
    grad = gradient_of(basis)
    force(formulation, basis.to(DEVICE), grad.to(DEVICE))
    result = rescale(grad.to(DEVICE), basis.to(DEVICE), parallel=2.0, violation=0.5)
    assert result.dtype == dtype
    expected = expected_rescaled(grad, basis, 2.0, 0.5)
    assert_near(result.cpu(), expected, 3 * tolerance(basis), grad)


@pytest.mark.parametrize(
    ("width", "length"),
    [*((width, 200) for width in (16, 32, 48, 64, 96, 128, 256)), (64, 5), (64, 700), (128, 700)],
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_heads_of_any_width_and_sequences_of_any_length(width, length, dtype):
    """As attention has them: Q seen through a transposition, g as it comes."""
    basis = normal(1, length, 3, width).transpose(1, 2).to(dtype)
    grad = normal(1, 3, length, width, seed=1).to(dtype)
    factors = torch.tensor([2.0, 0.5, 1.0])
    on_gpu = grad.to(DEVICE), basis.to(DEVICE)
    result = rescale(*on_gpu, parallel=factors.to(DEVICE), violation=0.25)
    expected = expected_rescaled(grad, basis, factors, 0.25)
    allowed = 3 * max(tolerance(head) for heads in basis for head in heads)
    assert_near(result.cpu(), expected, allowed, grad)
    assert result.stride() == torch.empty_like(on_gpu[0]).stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_tokens_may_be_split_into_parts(parts, width, dtype):
    basis, grad = normal(2, 500, width).to(dtype), normal(2, 500, width, seed=1).to(dtype)
    force("fused", basis.to(DEVICE), grad.to(DEVICE))
    result = fused.combined(basis.to(DEVICE), grad.to(DEVICE), ridge=None, mask=None, parts=parts)
    expected = expected_rescaled(grad, basis, 1.0, 0.0)
    assert_near(result.cpu(), expected, 3 * tolerance(basis[0]), grad)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_masked_tokens_are_not_in_the_span(padding, formulation):
    real = torch.tensor(PADDINGS[padding], dtype=torch.bool)[:, None]
    basis, grad = normal(3, 2, N, D).bfloat16(), normal(3, 2, N, D, seed=1).bfloat16()
    basis = basis.masked_fill(~real[..., None], 1e4)
    force(formulation, basis.to(DEVICE), grad.to(DEVICE))
    on_gpu = grad.to(DEVICE), basis.to(DEVICE)
    result = rescale(*on_gpu, parallel=2.0, violation=0.5, mask=real.to(DEVICE))
    expected = expected_rescaled(grad, basis, 2.0, 0.5, real)
    assert_near(result.cpu(), expected, 4 * torch.finfo(torch.bfloat16).eps, grad)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "length"), [(32, 2000), (64, 8192), (128, 4000)])
def test_identical_tokens_have_a_span(width, length, dtype, formulation):
    """A GPU adds up many products one after the other, and so their rounding errors."""
    basis = normal(4, 1, width).expand(4, length, width).to(dtype)
    grad = normal(4, length, width, seed=1).to(dtype)
    force(formulation, basis.to(DEVICE), grad.to(DEVICE))
    result = rescale(grad.to(DEVICE), basis.to(DEVICE), parallel=2.0, violation=0.5)
    expected = 1.5 * grad.double().mean(1, keepdim=True) + 0.5 * grad.double()
    assert_near(result.cpu(), expected, 8 * torch.finfo(dtype).eps + 1e-5, grad)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_both_sides_in_one_batch_get_what_they_get_alone(kv_heads, dtype, formulation):
    bases, grads = (
        [normal(3, h, 90, 64, seed=seed + h).to(DEVICE, dtype) for h in (4, kv_heads)]
        for seed in (0, 10)
    )
    force(formulation, bases[0], grads[0])
    real = (torch.arange(90) < torch.tensor([90, 30, 1])[:, None])[:, None].to(DEVICE)
    numbers = torch.tensor([[2.0, 0.5], [0.25, 3.0]], dtype=torch.float64, device=DEVICE)
    factors = [tuple(pair.unbind()) for pair in numbers]
    results = rescale_together(grads, bases, factors, ridge=None, masks=(real, None))
    for result, grad, basis, (a, b), mask in zip(
        results, grads, bases, factors, (real, None), strict=True
    ):
        alone = rescale(grad, basis, parallel=a, violation=b, mask=mask)
        assert_near(result.cpu(), alone.cpu(), 8 * torch.finfo(dtype).eps, grad.cpu())


@pytest.mark.parametrize("formulation", ["plain", "fused"])
@pytest.mark.parametrize("condition", [1e0, 1e1, 1e2, 1e3])
def test_float32_keeps_its_digits(condition, formulation):
    basis = conditioned(condition, n=512, d=64).float()
    grad = gradient_of(basis)
    force(formulation, basis.to(DEVICE), grad.to(DEVICE))
    result = project(basis.to(DEVICE), grad.to(DEVICE)).cpu()
    expected = expected_projection(basis, grad)
    assert_near(result, expected, max(2e-6, 5e-8 * condition), expected)


@pytest.mark.parametrize("formulation", ["plain", "fused"])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_of_float32_may_be_shortened(precision, formulation):
    torch.set_float32_matmul_precision(precision)
    basis = normal(512, 64).float()
    grad = gradient_of(basis)
    force(formulation, basis.to(DEVICE), grad.to(DEVICE))
    result = project(basis.to(DEVICE), grad.to(DEVICE)).cpu()
    assert_near(result, expected_projection(basis, grad), 1e-2, grad)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_bases_of_any_magnitude_are_projected_on(scale, formulation):
    basis, grad = (normal(N, D) * scale).bfloat16(), normal(N, D, seed=1).bfloat16()
    force(formulation, basis.to(DEVICE), grad.to(DEVICE))
    result = project(basis.to(DEVICE), grad.to(DEVICE)).cpu()
    assert_near(result, expected_rescaled(grad, basis.double() / scale, 1.0, 0.0), 1e-2, grad)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_what_is_not_finite_gives_what_is_not_finite(formulation):
    basis, grad = normal(N, D).bfloat16(), normal(N, D, seed=1).bfloat16()
    force(formulation, basis.to(DEVICE), grad.to(DEVICE))
    for value in (torch.inf, torch.nan):
        for changed in (basis, grad):
            before = changed[3, 1].clone()
            changed[3, 1] = value
            assert not project(basis.to(DEVICE), grad.to(DEVICE)).isfinite().all()
            changed[3, 1] = before


@pytest.mark.parametrize(("batch", "length", "launches"), [(200, 128, 1), (1, 8192, 3)])
def test_the_kernel_is_launched_once_or_three_times(batch, length, launches):
    basis = torch.randn(batch, 1, length, 64, device=DEVICE, dtype=torch.bfloat16)
    force("fused", basis, basis)
    fused.combined(basis, basis, ridge=None, mask=None)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        fused.combined(basis, basis, ridge=None, mask=None)
        torch.cuda.synchronize()
    ours = {"fused", "gram", "inner", "outer"}
    on_device = torch.autograd.DeviceType.CUDA
    names = [e.name for e in profiler.events() if e.device_type == on_device]
    assert len([name for name in names if name in ours]) == launches, names
