"""Time and memory of a training step with span scaling, beside other wrappers and optimizers.

The same model, in turns in one process. Time is a ratio to plain AdamW's: the mean, as some do
their work in every fifth step only, and the quartiles of the ratios of neighbours in time; memory
is what all tensors that Python reaches after a step take beyond parameters and gradients. Muon is
left out of wide models: its bfloat16 products take minutes there on a CPU without bfloat16 units.

    python benchmarks/peers.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytorch_optimizer
import schedulefree
import torch
import torch_optimizer
from speed.arms import LR, adamw, wrapped
from speed.cases import Case, Setting, add_cases, build, chosen, training_step
from speed.measure import add_options, in_turns, live_bytes, quartiles, start, write

CHOSEN = ("decoder N=512", "demo")


def plain(setting: Setting) -> Callable[[], None]:
    """Return a step of AdamW."""
    return training_step(setting, adamw(setting))


def span_scaled(setting: Setting) -> Callable[[], None]:
    """Return a step with span-scaled gradients."""
    return training_step(setting, wrapped(setting))


def lookahead(setting: Setting) -> Callable[[], None]:
    """Return a step of torch-optimizer's Lookahead around AdamW."""
    return training_step(setting, torch_optimizer.Lookahead(adamw(setting)))


def orthograd(setting: Setting) -> Callable[[], None]:
    """Return a step of pytorch_optimizer's OrthoGrad around AdamW."""
    return training_step(setting, pytorch_optimizer.OrthoGrad(adamw(setting)))


def sam(setting: Setting) -> Callable[[], None]:
    """Return a step of pytorch_optimizer's SAM around AdamW, with its two passes."""
    parameters = setting.model.parameters()
    optimizer = pytorch_optimizer.SAM(parameters, base_optimizer=torch.optim.AdamW, lr=LR)

    def step() -> None:
        setting.loss().backward()
        optimizer.first_step(zero_grad=True)
        setting.loss().backward()
        optimizer.second_step(zero_grad=True)

    return step


def schedule_free(setting: Setting) -> Callable[[], None]:
    """Return a step of schedule-free AdamW.

    Its authors' wrapper keeps its state where AdamW looks for its own, which then fails.
    """
    optimizer = schedulefree.AdamWScheduleFree(setting.model.parameters(), lr=LR)
    optimizer.train()
    return training_step(setting, optimizer)


def muon(setting: Setting) -> Callable[[], None]:
    """Return a step of Muon for matrices and AdamW for the rest."""
    matrices = [p for p in setting.model.parameters() if p.ndim == 2]
    rest = [p for p in setting.model.parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=LR), torch.optim.AdamW(rest, lr=LR)]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        setting.loss().backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


PEERS: dict[str, Callable[[Setting], Callable[[], None]]] = {
    "AdamW": plain,
    "span-scaled AdamW": span_scaled,
    "Lookahead": lookahead,
    "OrthoGrad": orthograd,
    "SAM": sam,
    "schedule-free AdamW": schedule_free,
    "Muon": muon,
}


def state_bytes(case: Case, peer: Callable[[Setting], Callable[[], None]]) -> int:
    """Count the bytes that are left after a step, beyond parameters and gradients."""
    before = live_bytes()
    setting = build(case)
    step = peer(setting)
    step()
    parameters = sum(p.numel() * p.element_size() for p in setting.model.parameters())
    gradients = sum(
        p.grad.numel() * p.grad.element_size()
        for p in setting.model.parameters()
        if p.grad is not None
    )
    return live_bytes() - before - parameters - gradients - setting.x.nbytes


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Measure one model.

    Args:
        case: The model.
        rounds: How often each takes its turn.

    Returns:
        A row for each: first quartile, mean and third quartile of the ``ratio`` of its step time
        to AdamW's, and its ``state`` in units of the parameters' bytes.
    """
    peers = {name: peer for name, peer in PEERS.items() if case.small or name != "Muon"}
    states = {name: state_bytes(case, peer) for name, peer in peers.items()}
    times = in_turns({name: peer(build(case)) for name, peer in peers.items()}, rounds)
    size = sum(p.numel() * p.element_size() for p in build(case).model.parameters())
    return [
        {
            "case": case.name,
            "peer": name,
            "ms": 1e3 * quartiles(times[name])[1],
            "ratio": with_mean(times[name], times["AdamW"]),
            "state": states[name] / size,
        }
        for name in peers
    ]


def with_mean(times: np.ndarray, baseline: np.ndarray) -> list[float]:
    """Return first quartile, mean and third quartile of the ratio of times."""
    low, _, high = quartiles(times / baseline)
    return [low, float(times.sum() / baseline.sum()), high]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_cases(parser)
    add_options(parser, rounds=11)
    options = parser.parse_args(argv)
    cases = chosen(parser, options.cases, CHOSEN)
    start(options)
    rows = []
    for case in cases:
        for row in measure(case, options.rounds * (5 if case.small else 1)):
            low, middle, high = row["ratio"]
            print(
                f"{case.name:14s} {row['peer']:30s} {row['ms']:8.1f} ms, ratio {middle:.3f} "
                f"({low:.3f} to {high:.3f}), state {row['state']:.2f} x parameters",
                flush=True,
            )
            rows.append(row)
    write(options, rows)


if __name__ == "__main__":
    main()
