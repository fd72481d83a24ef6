"""Time of ``spanopt.project`` against other ways to the same projection, as a Markdown table.

The ways take turns, and the ratio is that of neighbours in time; the median is shown, with
quartiles. ``share of peak`` is what the projection's floating-point operations (10 N d^2 a matrix,
as computed) come to in a second, over what a large matrix product does on the same machine in the
same run. In bfloat16 the other ways are given float32 copies, which they need.

    python benchmarks/kernel.py --threads 1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from spanopt import project

SHAPES = ((24, 512, 64), (96, 1024, 64), (32, 2048, 128))
PEAK_SIZE = 2048


def by_qr(q: Tensor, g: Tensor) -> Tensor:
    """Project with an orthonormal basis from a Householder QR factorisation."""
    span = torch.linalg.qr(q).Q
    return span @ (span.mT @ g)


def by_svd(q: Tensor, g: Tensor) -> Tensor:
    """Project with the left singular vectors."""
    span = torch.linalg.svd(q, full_matrices=False).U
    return span @ (span.mT @ g)


def by_pinv(q: Tensor, g: Tensor) -> Tensor:
    """Project with the pseudo-inverse."""
    return q @ (torch.linalg.pinv(q) @ g)


def by_lstsq(q: Tensor, g: Tensor) -> Tensor:
    """Project with a least-squares solution."""
    return q @ torch.linalg.lstsq(q, g).solution


def by_explicit(q: Tensor, g: Tensor) -> Tensor:
    """Project with the N x N projector, formed."""
    return (q @ torch.linalg.pinv(q)) @ g


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pinv": by_pinv,
    "QR": by_qr,
    "SVD": by_svd,
    "lstsq": by_lstsq,
    "explicit": by_explicit,
}


def seconds(function: Callable[..., Tensor], *arguments: Tensor) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of every way, and of ``project`` before it, shape (rounds, 2)."""
    q, g = (torch.randn(shape).to(dtype) for _ in range(2))
    copies = q.float(), g.float()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*WAYS, "peak")}
    square = torch.randn(2, PEAK_SIZE, PEAK_SIZE)
    for turn in range(rounds + 1):
        for name, way in {**WAYS, "peak": torch.matmul}.items():
            given = (square[0], square[1]) if name == "peak" else copies
            pair = seconds(project, q, g), seconds(way, *given)
            if turn > 0:  # the first one warms up
                times[name].append(pair)
    return {name: np.array(pairs) for name, pairs in times.items()}


def in_words(ratios: np.ndarray) -> str:
    """Return median and quartiles."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def row(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> list[str]:
    """Return the table's row for one shape and dtype."""
    times = measure(shape, dtype, rounds)
    ours = np.concatenate([pairs[:, 0] for pairs in times.values()])
    matrices, tokens, features = shape
    rate = 10 * matrices * tokens * features**2 / times["peak"][:, 0]
    peak = 2 * PEAK_SIZE**3 / times["peak"][:, 1]
    cells = [str(shape), str(dtype).removeprefix("torch."), f"{np.median(ours) * 1e3:.1f} ms"]
    cells += [in_words(times[name][:, 1] / times[name][:, 0]) for name in WAYS]
    return [*cells, f"{100 * np.median(rate / peak):.0f} %"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    heads = ["(matrices, N, d)", "dtype", "project", *(f"{x} / project" for x in WAYS)]
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds\n")
    print(f"| {' | '.join([*heads, 'share of peak'])} |")
    print("|" + " --- |" * (len(heads) + 1))
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            print(f"| {' | '.join(row(shape, dtype, options.rounds))} |", flush=True)


if __name__ == "__main__":
    main()
