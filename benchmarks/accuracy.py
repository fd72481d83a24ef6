"""Relative error of ``spanopt.project`` by condition number and dtype, as a Markdown table.

The reference is a float64 singular value decomposition of the basis as rounded to the dtype; for
float64 itself it is Gram-Schmidt in extended precision. Beside ``project`` stand two other ways to
the same projector in the same compute dtype: QR, and one plain Cholesky solve of the Gram matrix.
The default ridge of ``project`` drops near-dependent columns, which the other two and the reference
keep: in float32 that is most of its error from condition 1e4 on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from kernel import by_cholesky, by_qr
from speed.measure import add_options, start, write
from torch import Tensor

from spanopt import project
from spanopt.compare.drawing import markdown

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def in_compute_dtype(way: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Let a way compute in the dtype that ``project`` computes in."""

    def projection(basis: Tensor, x: Tensor) -> Tensor:
        return way(_computed(basis), _computed(x)).to(x.dtype)

    return projection


def reference_projection(basis: Tensor, x: Tensor) -> Tensor:
    """Project with more digits than the dtype of the basis has; the result is float64."""
    if basis.dtype != torch.float64:
        span = torch.linalg.svd(basis.double(), full_matrices=False).U
        return span @ (span.mT @ x.double())
    # A float64 SVD is no judge here: LAPACK's begins with the very QR factorisation it would judge.
    q = basis.numpy().astype(np.longdouble)
    for column in range(q.shape[1]):
        before, vector = q[:, :column], q[:, column]
        for _ in range(2):
            vector -= before @ (before.T @ vector)
        vector /= np.sqrt(vector @ vector)
    return torch.from_numpy((q @ (q.T @ x.numpy())).astype(np.float64))


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "project": project,
    "QR": in_compute_dtype(by_qr),
    "Cholesky": in_compute_dtype(by_cholesky),
}


def conditioned(tokens: int, features: int, condition: float, generator: torch.Generator) -> Tensor:
    """Return a float64 basis with geometrically spaced singular values from 1 to 1/condition."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    left = torch.linalg.qr(normal(tokens, features)).Q
    right = torch.linalg.qr(normal(features, features)).Q
    exponents = torch.linspace(0, -1, features, dtype=torch.float64)
    return left * condition**exponents @ right.mT


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Return the Frobenius norm of the error over that of the reference."""
    return float((result.double() - reference).norm() / reference.norm())


def row(name: str, condition: float, tokens: int, features: int, seeds: int) -> list[str]:
    """Return the table's row for one dtype and one condition number."""
    errors: dict[str, list[float]] = {method: [] for method in METHODS}
    rounded = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        basis = conditioned(tokens, features, condition, generator).to(DTYPES[name])
        x = torch.randn(tokens, features, dtype=torch.float64, generator=generator).to(basis.dtype)
        rounded.append(float(torch.linalg.cond(basis.double())))
        reference = reference_projection(basis, x)
        for method, function in METHODS.items():
            errors[method].append(relative_error(function(basis, x), reference))
    cells = [name, f"{condition:.0e}", f"{_median(rounded):.1e}"]
    for values in errors.values():
        failed = sum(value != value for value in values)
        worst = f"NaN in {failed}/{seeds}" if failed else f"{max(values):.1e}"
        cells += ["NaN" if failed > seeds // 2 else f"{_median(values):.1e}", worst]
    return cells


def table(names: list[str], tokens: int, features: int, seeds: int) -> list[list[str]]:
    """Return the whole table, by rows and cells, with its head."""
    heads = ["dtype", "condition", "as rounded"]
    for method in METHODS:
        heads += [f"{method}, median", "max"]
    lines = [heads]
    for name in names:
        for exponent in range(9):
            lines.append(row(name, 10.0**exponent, tokens, features, seeds))
    return lines


def main() -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512, help="N, rows of the basis")
    parser.add_argument("--features", type=int, default=64, help="d, columns of the basis")
    parser.add_argument("--seeds", type=int, default=10, help="bases for each row")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add_options(parser)
    options = parser.parse_args()
    start(options)
    print(
        f"Relative error of the projection, N = {options.tokens}, "
        f"d = {options.features}, {options.seeds} seeds; torch {torch.__version__}\n"
    )
    rows = table(options.dtypes, options.tokens, options.features, options.seeds)
    head, *lines = rows
    print(markdown(head, lines))
    write(options, rows)


def _computed(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).nanmedian())


if __name__ == "__main__":
    main()
