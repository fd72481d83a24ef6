"""The Triton kernels in Triton's interpreter: run by ``test_triton.py`` in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import interpreter

from mathematics.samplers import (
    BASES,
    D,
    N,
    assert_near,
    assert_same_bits,
    conditioned,
    expected_projection,
    expected_rescaled,
    gradient_of,
    normal,
    tolerance,
)
from spanopt import SpanScaledOptimizer
from spanopt.mathematics import fused
from spanopt.projection import project, rescale, set_formulation

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    set_formulation("fused")
    yield
    set_formulation("auto")


def in_parts(grad: Tensor, basis: Tensor, parts: int, **options: Any) -> Tensor:
    return fused.combined(basis, grad, ridge=None, mask=None, parts=parts, **options)


# Values.


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in BASES]
    + [(name, dtype) for name in ("random", "rank two", "zero") for dtype in HALVES],
)
def test_every_awkward_basis_is_projected_on(name: str, dtype: torch.dtype) -> None:
    basis = BASES[name](0).to(dtype)
    if not basis.isfinite().all():
        basis = (BASES[name](0) * 1e-5).to(dtype)
    grad = gradient_of(basis)
    result = project(basis, grad)
    assert result.dtype == dtype
    assert_near(result, expected_projection(basis, grad), tolerance(basis), grad)


@pytest.mark.parametrize(
    ("width", "dtype", "parts"),
    [(32, torch.float32, 1), (32, torch.float16, 3), (64, torch.bfloat16, 1)],
)
def test_identical_tokens_have_a_span(width: int, dtype: torch.dtype, parts: int) -> None:
    """Rounding gives their Gram matrix eigenvalues that are far below zero."""
    basis = normal(2, 1, width).expand(2, 600, width).to(dtype)
    grad = normal(2, 600, width, seed=1).to(dtype)
    result = in_parts(grad, basis, parts)
    expected = expected_rescaled(grad, basis, 1.0, 0.0)
    assert_near(result, expected, 2 * tolerance(basis[0]), grad)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(32, torch.bfloat16), (64, torch.bfloat16), (96, torch.float16), (128, torch.float32)],
)
def test_heads_of_usual_widths_are_rescaled(width: int, dtype: torch.dtype) -> None:
    """With a layout of its own for Q and another for g, as attention has them."""
    heads = 2 if width < 96 else 1
    basis = normal(1, 140, heads, width).transpose(1, 2).to(dtype)
    grad = normal(1, heads, 140, width, seed=1).to(dtype)
    factors = torch.tensor([2.0, 0.5])[:heads]
    result = rescale(grad, basis, parallel=factors, violation=0.25)
    expected = expected_rescaled(grad, basis, factors, 0.25)
    allowed = max(tolerance(head) for head in basis[0])
    assert_near(result, expected, 3 * allowed, grad)


@pytest.mark.parametrize(("scale", "parts"), [(1e-38, 1), (1e-25, 2), (1e19, 2), (1e37, 1)])
def test_bases_of_any_magnitude_are_projected_on(scale: float, parts: int) -> None:
    basis = (normal(130, D) * scale).float()
    grad = normal(130, D, seed=1).float()
    result = in_parts(grad, basis, parts)
    assert_near(result, expected_projection(basis, grad), 1e-5, grad)


@pytest.mark.parametrize(("parts", "dtype"), [(2, torch.bfloat16), (3, torch.float32)])
def test_tokens_may_be_split_into_parts(parts: int, dtype: torch.dtype) -> None:
    basis, grad = normal(2, 150, D).to(dtype), normal(2, 150, D, seed=1).to(dtype)
    basis[0, :70] *= 2.0**70  # the parts differ in the power of two that they are scaled by
    factor, rest = torch.tensor(1.5), torch.tensor(-0.5)
    result = in_parts(grad, basis, parts, factor=factor, rest=rest)
    assert_near(result, expected_rescaled(grad, basis, 1.0, -0.5), 3 * tolerance(basis[0]), grad)


def test_masked_tokens_are_not_in_the_span(mask: Tensor) -> None:
    basis, grad = normal(3, 2, N, D).float(), normal(3, 2, N, D, seed=1).float()
    real = mask[:, None]
    hidden = ~real[..., None].expand_as(basis)
    basis, grad = basis.masked_fill(hidden, 1e4), grad.masked_fill(hidden, 7.0)
    result = rescale(grad, basis, parallel=2.0, violation=0.5, mask=real)
    assert_near(result, expected_rescaled(grad, basis, 2.0, 0.5, real), 1e-5, grad)


def test_what_is_not_a_number_at_masked_tokens_stays_there() -> None:
    mask = torch.arange(N) < N - 4
    basis, grad = normal(N, D).float(), normal(N, D, seed=1).float()
    expected = project(basis, grad, mask=mask)
    basis[-1], grad[-2] = torch.nan, torch.inf
    assert_same_bits(project(basis, grad, mask=mask), expected)
    assert (expected[-4:] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["basis", "gradient"])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_not_finite_gives_what_is_not_finite(value: float, where: str, parts: int) -> None:
    basis, grad = normal(130, D).float(), normal(130, D, seed=1).float()
    (basis if where == "basis" else grad)[100, 2] = value
    assert not in_parts(grad, basis, parts).isfinite().all()


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_a_larger_ridge_is_taken(ridge: float) -> None:
    from oracle import tikhonov

    basis, grad = normal(N, D).float(), normal(N, D, seed=1).float()
    expected = torch.from_numpy(tikhonov(basis, ridge)) @ grad.double()
    assert_near(project(basis, grad, ridge=ridge), expected, 1e-6, grad)


def test_any_number_of_leading_dimensions_is_taken() -> None:
    basis, grad = normal(2, 1, 3, N, D).float(), normal(2, 1, 3, N, D, seed=1).float()
    expected = torch.stack(
        [expected_projection(b[0, 0], g[0, 0]) for b, g in zip(basis, grad, strict=True)]
    )
    assert_near(project(basis, grad)[:, 0, 0], expected, 1e-5, grad)
    assert_near(project(basis[0, 0, 0], grad[0, 0, 0]), expected[0], 1e-5, grad)


# Products of tensor cores, which the interpreter does not shorten, so that this does.


def cut(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().float().numpy()


def shortened(monkeypatch: pytest.MonkeyPatch, terms: int) -> None:
    """Multiply as ``bf16x3`` does with two terms of a number, or ``bf16x6`` with three."""

    def split(x: np.ndarray) -> list[np.ndarray]:
        parts = []
        for _ in range(terms):
            parts.append(cut(x))
            x = x - parts[-1]
        return parts

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right = split(a.data), split(b.data)
        pairs = [(i, j) for i in range(terms) for j in range(terms) if i + j < terms]
        total = d.data + sum(left[i] @ right[j] for i, j in pairs)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize(("dtype", "terms"), [(torch.bfloat16, 2), (torch.float32, 3)])
@pytest.mark.parametrize(
    "name", ["rank two", "a repeated column", "a token of huge norm", "condition 1e3", "zero"]
)
def test_terms_of_bfloat16_are_as_good_as_the_dtype(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, terms: int
) -> None:
    shortened(monkeypatch, terms)
    basis = BASES[name](0).to(dtype)
    grad = gradient_of(basis)
    allowed = tolerance(basis)
    if dtype == torch.bfloat16:  # what the rounding of the result hides; without that, 2**-15
        allowed, grad = 2.0**-15 + tolerance(basis.float()), grad.float()
        monkeypatch.setattr(fused, "_precision", lambda *_: "bf16x3")
    result = project(basis, grad)
    assert_near(result, expected_projection(basis.to(grad.dtype), grad), allowed, grad)


def test_two_terms_would_not_do_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = conditioned(1e3).float()
    grad = gradient_of(basis)
    expected = expected_projection(basis, grad)
    shortened(monkeypatch, 2)
    error = (project(basis, grad) - expected).norm() / grad.norm()
    assert error > tolerance(basis)


# The operator.


def test_the_operator_keeps_the_rules_of_operators() -> None:
    basis, grad = normal(2, N, D).float(), normal(2, N, D, seed=1).float().requires_grad_()
    arguments = basis, None, torch.tensor(2.0), torch.tensor(1.0), 1e-3, "bf16x6", 0
    torch.library.opcheck(torch.ops.spanopt.combined.default, (grad, *arguments))


def test_its_derivative_is_itself() -> None:
    basis = normal(N, D).float()
    grad = normal(N, D, seed=1).float().requires_grad_()
    weight = normal(N, D, seed=2).float()
    result = rescale(grad, basis, parallel=2.0, violation=0.5)
    (by_grad,) = torch.autograd.grad((result * weight).sum(), grad)
    assert_near(by_grad, expected_rescaled(weight, basis, 2.0, 0.5), 1e-5, weight)


def test_its_operations_are_counted() -> None:
    basis, grad = normal(3, N, D).float(), normal(3, N, D, seed=1).float()
    with FlopCounterMode(display=False) as counter:
        project(basis, grad)
    assert counter.get_total_flops() == 3 * (12 * N * D**2 + 8 * D**3)


@pytest.mark.parametrize("layout", [pytest.param("rows", marks=pytest.mark.long), "heads"])
def test_compiled_and_eager_are_the_same_bit_for_bit(layout: str) -> None:
    basis, grad = normal(1, N, 2, D).float(), normal(1, N, 2, D, seed=1).float()
    if layout == "heads":
        basis, grad = basis.transpose(1, 2), grad.transpose(1, 2)

    def f(grad: Tensor, basis: Tensor) -> Tensor:
        return rescale(grad, basis, parallel=2.0, violation=1.0) + 0

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(grad, basis)
    assert_same_bits(compiled, f(grad, basis))
    assert compiled.stride() == f(grad, basis).stride()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = 2, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, 8)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_wrapped_model_gets_the_same_gradients(compiled: bool) -> None:
    gradients = []
    for name in ("fused", "plain"):
        set_formulation(name)
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Attention()
        SpanScaledOptimizer(torch.optim.SGD(model.parameters()), model, {"*": (2.0, 0.5)})
        if compiled:
            model.compile(fullgraph=True)
        model(normal(2, 20, 16).float()).square().sum().backward()
        gradients.append(model.qkv.weight.grad)
    assert_near(*gradients, 1e-5, gradients[1])


def test_compiled_code_follows_the_setting() -> None:
    basis, grad = normal(N, D).float(), normal(N, D, seed=1).float()
    compiled = torch.compile(lambda g, q: project(q, g), fullgraph=True, backend="eager")
    set_formulation("plain")
    plain = compiled(grad, basis)
    assert_same_bits(plain, project(basis, grad))
    set_formulation("fused")
    assert_same_bits(compiled(grad, basis), project(basis, grad))
    assert not torch.equal(compiled(grad, basis), plain)


@pytest.mark.parametrize(
    ("basis", "grad", "text"),
    [
        (torch.ones(4, 200), torch.ones(4, 200), "at most 128 features"),
        (torch.ones(4, 3), torch.ones(4, 2), "as wide as Q"),
        (torch.ones(4, 3).double(), torch.ones(4, 3).double(), "not torch.float64"),
    ],
)
def test_what_the_kernels_do_not_take_is_an_error_where_they_are_forced(
    basis: Tensor, grad: Tensor, text: str
) -> None:
    with pytest.raises(RuntimeError, match=f"'fused' is forced and can't be had: .*{text}"):
        project(basis, grad)
    set_formulation("auto")
    assert project(basis, grad).shape == grad.shape


def test_no_tokens_are_no_error() -> None:
    assert project(torch.ones(2, 0, 3), torch.ones(2, 0, 3)).shape == (2, 0, 3)
