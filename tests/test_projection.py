"""Projection, decomposition and rescaling against the float64 oracle, and the nodes built on them.

Every property is checked on the same named bases (``BASES``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import projector, rescaled, tikhonov
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spanopt.node import span_node, uniform_node
from spanopt.projection import decompose, default_ridge, project, rescale

N, D = 24, 5
INF, NAN = float("inf"), float("nan")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers, so that their products are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).double()


def orthonormal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(n, d, seed=seed)).Q


def conditioned(condition: float, n: int = N, d: int = D, seed: int = 0) -> Tensor:
    sigma = condition ** torch.linspace(0, -1, d, dtype=torch.float64)
    return orthonormal(n, d, seed) * sigma @ orthonormal(d, d, seed + 1).mT


BASES: dict[str, Callable[[int], Tensor]] = {
    "random": lambda seed: normal(N, D, seed=seed),
    "orthogonal columns": lambda seed: 3 * orthonormal(N, D, seed),
    "square": lambda seed: normal(D, D, seed=seed),
    "rank two": lambda seed: integers(N, 2, seed=seed) @ integers(2, D, seed=seed + 1),
    "a repeated column": lambda seed: normal(N, D, seed=seed)[:, [0, 1, 2, 3, 1]],
    "a zero column": lambda seed: normal(N, D, seed=seed) * torch.tensor([1.0, 1, 0, 1, 1]),
    "repeated tokens": lambda seed: normal(3, D, seed=seed)[torch.arange(N) % 3],
    "one token that is not zero": lambda seed: (
        normal(N, D, seed=seed) * (torch.arange(N) == 4)[:, None]
    ),
    "a token of huge norm": lambda seed: (
        normal(N, D, seed=seed) * torch.where(torch.arange(N) == 7, 1e3, 1.0)[:, None]
    ),
    "zero": lambda seed: torch.zeros(N, D, dtype=torch.float64),
    "tiny": lambda seed: 1e-8 * normal(N, D, seed=seed),
    "huge": lambda seed: 1e8 * normal(N, D, seed=seed),
    "fewer tokens than features": lambda seed: normal(4, 7, seed=seed),
    "one token": lambda seed: normal(1, D, seed=seed),
    "one feature": lambda seed: normal(N, 1, seed=seed),
    "one token of one feature": lambda seed: normal(1, 1, seed=seed),
    "condition 1e3": lambda seed: conditioned(1e3, seed=seed),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNITS = {torch.float64: torch.int64, torch.float32: torch.int32}


@pytest.fixture(params=BASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def basis(name: str, dtype: torch.dtype) -> Tensor:
    return BASES[name](0).to(dtype)


@pytest.fixture
def grad(basis: Tensor) -> Tensor:
    return gradient_of(basis)


def gradient_of(basis: Tensor, seed: int = 5) -> Tensor:
    return normal(*basis.shape, seed=seed).to(basis.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rcond(dtype: torch.dtype) -> float:
    """Cut between the spectrum of the bases here and their rounding errors."""
    return 1e-12 if dtype == torch.float64 else 3e-6


def tolerance(basis: Tensor, ridge: float | None = None) -> float:
    """Allowed error of P x relative to the norm of x, from the spectrum of one basis.

    The sum of: rounding, eps * condition number; the bias of the ridge in the weakest direction of
    the span; for dependent columns, the weight that the ridge leaves to a null direction in which
    rounding put 0.25 eps; and the rounding of the result to the dtype of x.
    """
    compute = compute_dtype(basis.dtype)
    eps = torch.finfo(compute).eps
    ridge = default_ridge(basis.dtype) if ridge is None else ridge
    sigma = np.linalg.svd(array(basis), compute_uv=False)
    sigma = sigma / max(np.linalg.norm(sigma), 1e-300)
    kept = sigma[sigma > rcond(basis.dtype)]
    if len(kept) == 0:
        return 8 * eps
    allowed = eps * (8 + kept[0] / kept[-1]) + ridge / kept[-1] ** 2
    if len(kept) < min(basis.shape):
        allowed += (0.25 * eps) ** 2 / ridge
    if compute != basis.dtype:
        allowed += torch.finfo(basis.dtype).eps
    return allowed


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def expected_projection(basis: Tensor, x: Tensor) -> Tensor:
    return torch.from_numpy(projector(array(basis), rcond(basis.dtype)) @ array(x))


def expected_rescaled(
    grad: Tensor, basis: Tensor, parallel: Any, violation: Any, mask: Tensor | None = None
) -> Tensor:
    real = None if mask is None else mask.numpy()
    result = rescaled(array(grad), array(basis), parallel, violation, real, rcond(basis.dtype))
    return torch.from_numpy(result)


def assert_near(result: Tensor, expected: Tensor, allowed: float, scale: Tensor) -> None:
    """The error's norm is at most ``allowed`` times the norm of ``scale``."""
    assert result.shape == expected.shape
    error = (result.double() - expected.double()).norm()
    # A NaN compares false with everything.
    assert error <= allowed * scale.double().norm(), f"{error} > {allowed} * {scale.norm()}"


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    integer = UNITS.get(result.dtype, torch.int16)
    assert torch.equal(result.contiguous().view(integer), expected.contiguous().view(integer))


class Operations(TorchDispatchMode):
    """Counts the ATen operations that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


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


# Masks.

PADDINGS: dict[str, list[list[int]]] = {
    "right": [[1] * 24, [1] * 9 + [0] * 15, [1] + [0] * 23],
    "left": [[1] * 24, [0] * 15 + [1] * 9, [0] * 23 + [1]],
    "interior": [[1] * 8 + [0] * 8 + [1] * 8, [1, 0] * 12, [0, 0, 1] * 8],
}


@pytest.fixture(params=PADDINGS)
def mask(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(PADDINGS[request.param], dtype=torch.bool)


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


# Dtypes and condition numbers.


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_keeps_the_dtype_and_errs_by_its_rounding(name: str, dtype: torch.dtype) -> None:
    basis = BASES[name](0).to(dtype)
    if not basis.isfinite().all():
        basis = (BASES[name](0) * 1e-5).to(dtype)
    grad = gradient_of(basis)
    result = project(basis, grad)
    assert result.dtype == dtype
    assert_near(result, expected_projection(basis, grad), tolerance(basis), grad)
    scaled = rescale(grad, basis, parallel=2.0, violation=0.5)
    assert scaled.dtype == dtype
    expected = expected_rescaled(grad, basis, 2.0, 0.5)
    assert_near(scaled, expected, 3 * tolerance(basis), grad)


@pytest.mark.parametrize("basis_dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_basis_and_gradient_may_differ_in_dtype(
    basis_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    basis, grad = normal(N, D).to(basis_dtype), normal(N, D, seed=5).to(grad_dtype)
    allowed = 4 * torch.finfo(grad_dtype).eps + 8 * tolerance(basis.float())
    for result, expected in (
        (project(basis, grad), expected_projection(basis, grad)),
        (
            rescale(grad, basis, parallel=2.0, violation=0.5),
            expected_rescaled(grad, basis, 2.0, 0.5),
        ),
    ):
        assert result.dtype == grad_dtype
        assert_near(result, expected, allowed, grad)


# Relative to the norm of P x. Above 1e4 the float32 ridge drops a part of the span by intention.
ACCURACY = {
    torch.float64: [
        (1e0, 1e-14),
        (1e1, 1e-14),
        (1e2, 5e-14),
        (1e3, 5e-13),
        (1e4, 5e-12),
        (1e5, 5e-11),
        (1e6, 5e-10),
        (1e7, 5e-9),
        (1e8, 5e-8),
    ],
    torch.float32: [(1e0, 1e-6), (1e1, 2e-6), (1e2, 5e-6), (1e3, 5e-5), (1e4, 2e-3)],
    torch.bfloat16: [(10.0**exponent, 4e-3) for exponent in range(9)],
    torch.float16: [(1e0, 5e-4), (1e1, 5e-4), (1e2, 5e-4), (1e3, 5e-4), (1e4, 2e-3)],
}


@pytest.mark.parametrize(
    ("dtype", "condition", "allowed"),
    [(dtype, *row) for dtype, table in ACCURACY.items() for row in table],
)
def test_error_at_a_condition_number_stays_within_the_table(
    dtype: torch.dtype, condition: float, allowed: float
) -> None:
    for seed in range(3):
        basis = conditioned(condition, 512, 64, seed).to(dtype)
        grad = gradient_of(basis, seed)
        expected = torch.from_numpy(projector(array(basis), 0.0) @ array(grad))
        assert_near(project(basis, grad), expected, allowed, expected)


@pytest.mark.parametrize("condition", [10.0**exponent for exponent in range(9)])
def test_projection_never_lengthens_at_any_condition_number(
    condition: float, dtype: torch.dtype
) -> None:
    basis = conditioned(condition, 128, 32).to(dtype)
    # Whatever is projected, and above all what lies along the weakest directions of the basis.
    left, _, right = torch.linalg.svd(basis, full_matrices=False)
    for x in (gradient_of(basis), left, basis @ right.mT[:, -3:], gradient_of(basis) - left):
        assert project(basis, x).norm() <= (1 + 1e-4) * x.norm()


# The ridge.


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.1, 100.0])
def test_an_explicit_ridge_is_the_documented_filter(
    basis: Tensor, grad: Tensor, ridge: float
) -> None:
    expected = torch.from_numpy(tikhonov(array(basis), ridge) @ array(grad))
    eps = torch.finfo(basis.dtype).eps
    # The filter is smooth on the scale of the ridge: no condition number worse than this one.
    allowed = eps * (100 + 2 / ridge**0.5)
    assert_near(project(basis, grad, ridge=ridge), expected, allowed, grad)


@pytest.mark.parametrize("condition", [10.0**exponent for exponent in range(9)])
def test_the_default_ridge_is_the_documented_filter_at_any_condition_number(
    condition: float, dtype: torch.dtype
) -> None:
    basis = conditioned(condition, 128, 16).to(dtype)
    grad = gradient_of(basis)
    ridge = default_ridge(dtype)
    expected = torch.from_numpy(tikhonov(array(basis), ridge) @ array(grad))
    eps = torch.finfo(dtype).eps
    allowed = min(eps * (8 + condition), 0.5 * eps / ridge**0.5)
    assert_near(project(basis, grad), expected, allowed, grad)


@pytest.mark.parametrize("ridge", [0.0, 1e-40])
def test_a_ridge_below_the_default_counts_as_the_default(
    basis: Tensor, grad: Tensor, ridge: float
) -> None:
    assert_same_bits(project(basis, grad, ridge=ridge), project(basis, grad))


def test_default_ridge_follows_the_precision_of_the_products() -> None:
    before = torch.get_float32_matmul_precision()
    assert default_ridge(torch.bfloat16) == default_ridge(torch.float32)
    try:
        exact = default_ridge(torch.float32), default_ridge(torch.float64)
        torch.set_float32_matmul_precision("high")
        assert default_ridge(torch.float32) > 1e3 * exact[0]
        assert default_ridge(torch.float64) == exact[1]
    finally:
        torch.set_float32_matmul_precision(before)


# Where it runs.


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(basis: Tensor, grad: Tensor, low: torch.dtype) -> None:
    outside = project(basis, grad), rescale(grad, basis, parallel=2.0, violation=0.5)
    with torch.autocast("cpu", dtype=low):
        inside = project(basis, grad), rescale(grad, basis, parallel=2.0, violation=0.5)
    for result, expected in zip(inside, outside, strict=True):
        assert_same_bits(result, expected)


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


# The nodes.


def test_a_span_node_is_a_view_with_the_same_bits(name: str, dtype: torch.dtype) -> None:
    q = BASES[name](0).to(dtype)
    q[0] = -0.0
    q.requires_grad_()
    for y in (
        span_node(q, torch.tensor(2.0), torch.tensor(1.0)),
        uniform_node(q, torch.tensor(2.0)),
    ):
        assert y._base is q
        assert y.data_ptr() == q.data_ptr()
        assert y.stride() == q.stride()
        assert_same_bits(y.detach(), q.detach())


def test_a_span_node_rescales_in_backward_what_rescale_does(basis: Tensor, grad: Tensor) -> None:
    q = basis.clone().requires_grad_()
    span_node(q, torch.tensor(2.0), torch.tensor(0.5)).backward(grad)
    assert q.grad is not None
    assert_same_bits(q.grad, rescale(grad, basis, parallel=2.0, violation=0.5))


def test_a_span_node_hands_mask_ridge_and_scales_of_one_per_head_on() -> None:
    basis, grad = normal(2, 3, N, D), normal(2, 3, N, D, seed=1)
    mask = (torch.arange(N) < torch.tensor([[20], [9]]))[:, None]
    scales = {
        "parallel": torch.tensor([2.0, 3.0, 0.0]).double(),
        "violation": torch.tensor([1.0, 0.5, 1.0]).double(),
    }
    q = basis.clone().requires_grad_()
    span_node(q, *scales.values(), ridge=1e-2, mask=mask).backward(grad)
    assert q.grad is not None
    assert_same_bits(q.grad, rescale(grad, basis, **scales, ridge=1e-2, mask=mask))


def saved_by(node: Callable[[], Tensor]) -> list[Tensor]:
    """Tensors that autograd keeps for backward."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        assert node().requires_grad
    return saved


def test_a_span_node_saves_its_input_and_no_copy() -> None:
    q = normal(2, N, D).requires_grad_()
    saved = saved_by(lambda: span_node(q, torch.tensor(2.0), torch.tensor(1.0)))
    assert {x.data_ptr() for x in saved} == {q.data_ptr()}


def test_a_uniform_node_saves_nothing() -> None:
    q = normal(2, N, D).requires_grad_()
    assert not saved_by(lambda: uniform_node(q, torch.tensor(3.0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [torch.tensor(0.3), torch.tensor([0.3, 2.0, -1.0])])
def test_a_uniform_node_multiplies_the_gradient_and_projects_nothing(
    dtype: torch.dtype, factor: Tensor
) -> None:
    q = normal(2, 3, N, D).to(dtype).requires_grad_()
    grad = gradient_of(q)
    y = uniform_node(q, factor)
    with Operations() as operations:
        y.backward(grad)
    per_head = factor[:, None, None] if factor.ndim else factor
    assert q.grad is not None
    assert_same_bits(q.grad, (grad * per_head).to(dtype))
    assert not operations.counts["aten::linalg_cholesky_ex"]


def test_a_scale_read_in_backward_may_change_after_forward() -> None:
    basis, grad = normal(N, D), normal(N, D, seed=1)
    q = basis.clone().requires_grad_()
    parallel = torch.tensor(2.0, dtype=torch.float64)
    y = span_node(q, parallel, torch.tensor(1.0))
    parallel.fill_(3.0)
    y.backward(grad)
    assert q.grad is not None
    assert_same_bits(q.grad, rescale(grad, basis, parallel=3.0, violation=1.0))


@pytest.mark.parametrize("kind", ["span", "uniform"])
def test_double_backward_applies_the_linear_map_again_and_holds_the_basis_constant(
    kind: str,
) -> None:
    """For L = y^T H y / 2 behind the node R, dL/dq = R H q, and d<v, dL/dq>/dq = R H R v."""
    n = 12
    q = normal(n, 3).requires_grad_()
    half = normal(n, n, seed=1)
    hessian = half + half.mT
    v = normal(n, 3, seed=2)
    a, b = torch.tensor(2.0).double(), torch.tensor(0.5).double()
    y = span_node(q, a, b) if kind == "span" else uniform_node(q, a)
    loss = (y * (hessian @ y)).sum() / 2
    (first,) = torch.autograd.grad(loss, q, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), q)
    P = torch.from_numpy(projector(array(q)))
    eye = torch.eye(n, dtype=torch.float64)
    linear = a * P + b * (eye - P) if kind == "span" else a * eye
    assert_near(first, linear @ hessian @ q.detach(), 1e-12, hessian)
    assert_near(second, linear @ hessian @ linear @ v, 1e-12, hessian)


def test_nodes_build_no_graph_when_gradients_are_off() -> None:
    q = normal(N, D).requires_grad_()
    with torch.no_grad():
        assert span_node(q, torch.tensor(2.0), torch.tensor(1.0)).grad_fn is None
        assert uniform_node(q, torch.tensor(2.0)).grad_fn is None


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
