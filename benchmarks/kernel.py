"""Time of ``spanopt.rescale`` against other ways to the same rescaled gradient.

Q and its gradient have the layout that attention gives them: the heads of a token side by side, in
Q's case with those of K and V. The ways take turns, and the ratio is that of neighbours in time;
the median is shown, with quartiles. ``share of peak`` is what the projection's floating-point
operations (10 N d^2 a matrix, as computed) come to in a second, over what a large matrix product
does on the same machine in the same run. In bfloat16 the other ways are given float32 copies, which
they need. The projection setups are measured in the same way, as ratios to ``span``.

    python benchmarks/kernel.py
    python benchmarks/kernel.py --shapes 1 --rounds 3        # the first shape only
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from speed.measure import add_options, in_turns, quartiles, start, three, write
from torch import Tensor

from spanopt import rescale
from spanopt.setups import SETUPS

Shape = tuple[int, int, int, int]

SHAPES: tuple[Shape, ...] = ((2, 12, 512, 64), (8, 12, 1024, 64), (2, 16, 2048, 128))
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
    """Project with a least-squares solution, by the fastest of LAPACK's drivers."""
    return q @ torch.linalg.lstsq(q, g, driver="gels").solution


def by_explicit(q: Tensor, g: Tensor) -> Tensor:
    """Project with the N x N projector, formed from the inverse of the Gram matrix."""
    return (q @ torch.linalg.inv(q.mT @ q) @ q.mT) @ g


def by_cholesky(q: Tensor, g: Tensor) -> Tensor:
    """Project with one Cholesky solve of the Gram matrix; NaN where it fails."""
    factor, failed = torch.linalg.cholesky_ex(q.mT @ q)
    solution = torch.cholesky_solve(q.mT @ g, factor)
    return q @ torch.where(failed[..., None, None] == 0, solution, torch.nan)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pinv": by_pinv,
    "QR": by_qr,
    "SVD": by_svd,
    "lstsq": by_lstsq,
    "explicit": by_explicit,
    "Cholesky": by_cholesky,
}


def attention_like(shape: Shape, parts: int = 1) -> Tensor:
    """Return a tensor (B, H, N, d) in which the heads of a token and other parts are neighbours."""
    sequences, heads, tokens, features = shape
    x = torch.randn(sequences, tokens, parts * heads * features)
    return x[..., : heads * features].unflatten(-1, (heads, features)).transpose(1, 2)


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Measure every way on one shape.

    Args:
        shape: Sequences, heads, N and d.
        dtype: Of basis and gradient.
        rounds: How often each way takes its turn.

    Returns:
        ``ms`` of ``rescale`` (the median), for each other way the quartiles of the ratio of its
        time to that, and the share of the ``peak`` of matrix products.
    """
    q, g = (attention_like(shape, parts).to(dtype) for parts in (3, 1))
    copies = q.float(), g.float()
    square = torch.randn(2, PEAK_SIZE, PEAK_SIZE)
    two, one = torch.tensor(2.0), torch.tensor(1.0)

    def twice_the_span(way: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return copies[1] + way(*copies)

    ways: dict[str, Callable[[], Tensor]] = {
        "rescale": partial(rescale, g, q, parallel=two, violation=one),
        "peak": partial(torch.matmul, square[0], square[1]),
        **{name: partial(twice_the_span, way) for name, way in WAYS.items()},
    }
    with torch.no_grad():  # as in a backward pass
        times = in_turns(ways, rounds, warm_up=1)
    sequences, heads, tokens, features = shape
    rate = 10 * sequences * heads * tokens * features**2 / times["rescale"]
    peak = 2 * PEAK_SIZE**3 / times["peak"]
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": 1e3 * quartiles(times["rescale"])[1],
        "ratios": {name: quartiles(times[name] / times["rescale"]) for name in WAYS},
        "peak": float(np.median(rate / peak)),
    }


def measure_setups(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Return the quartiles of the ratio of each setup's time to that of ``span``."""
    q, k, g = (attention_like(shape, parts) for parts in (3, 3, 1))
    with torch.no_grad():
        times = in_turns({name: partial(setup, g, q, k) for name, setup in SETUPS.items()}, rounds)
    return {name: quartiles(times[name] / times["span"]) for name in SETUPS}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many")
    add_options(parser, rounds=7)
    options = parser.parse_args(argv)
    start(options)
    rows = []
    for shape in SHAPES[: options.shapes]:
        for dtype in (torch.float32, torch.bfloat16):
            row = measure(shape, dtype, options.rounds)
            ratios = ", ".join(f"{name} {three(x, 2)}" for name, x in row["ratios"].items())
            print(
                f"{shape}, {row['dtype']}: rescale {row['ms']:.1f} ms, "
                f"{100 * row['peak']:.0f} % of peak; as many times as long: {ratios}",
                flush=True,
            )
            rows.append(row)
    setups = measure_setups(SHAPES[0], 3 * options.rounds)
    print(f"{SHAPES[0]}, setups over span:", {name: three(x, 2) for name, x in setups.items()})
    write(options, {"ways": rows, "setups": setups})


if __name__ == "__main__":
    main()
