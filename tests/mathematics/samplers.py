"""Awkward bases and gradients, and what the oracle expects of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from oracle import projector, rescaled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spanopt.projection import default_ridge

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


# Masks.

PADDINGS: dict[str, list[list[int]]] = {
    "right": [[1] * 24, [1] * 9 + [0] * 15, [1] + [0] * 23],
    "left": [[1] * 24, [0] * 15 + [1] * 9, [0] * 23 + [1]],
    "interior": [[1] * 8 + [0] * 8 + [1] * 8, [1, 0] * 12, [0, 0, 1] * 8],
}
