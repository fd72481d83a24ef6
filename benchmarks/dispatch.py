"""What the wrapper itself costs, without any projection, and how long attaching takes.

``step`` and ``zero_grad`` of the wrapper are measured against those of the optimizer inside it, in
turns. Hook dispatch is what the forward and backward passes take longer with hooks that have
nothing to do, at scales (1, 1): the same calls for a model of any width and any batch, so it is
measured on one sequence of a few tokens, where arithmetic takes no time to speak of.

    python benchmarks/dispatch.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from speed.arms import adamw, wrapped
from speed.cases import CASES, build, training_step
from speed.measure import add_options, in_turns, quartiles, start, write
from torch import nn

from spanopt import SpanScale, SpanScaledOptimizer

MODULES = 10_000
FEW_TOKENS = 8
ATTACHMENTS = 5


def measure_step(rounds: int) -> dict[str, Any]:
    """Measure the demo's model.

    Args:
        rounds: How often.

    Returns:
        Milliseconds of a plain step, and of what is added to it by the wrapper's ``step``, by its
        ``zero_grad`` and by hooks: quartiles of the paired differences in per cent of the step.
    """
    case = CASES["demo"]
    few = replace(case, length=FEW_TOKENS, batch=1)
    settings = {
        **{name: build(case) for name in ("plain", "wrapped")},
        **{name: build(few) for name in ("bare", "hooked")},
    }
    outer = wrapped(settings["wrapped"])
    hooks = wrapped(settings["hooked"], 1.0, 1.0)

    def passes(name: str) -> Callable[[], None]:
        def run() -> None:
            for parameter in settings[name].model.parameters():
                parameter.grad = None
            settings[name].loss().backward()

        return run

    plain = training_step(settings["plain"], adamw(settings["plain"]))
    step = in_turns({"plain": plain}, rounds)["plain"]
    calls = in_turns({name: passes(name) for name in ("bare", "hooked")}, rounds)
    hooks.detach()
    passes("wrapped")()
    own: dict[str, list[float]] = {"step": [], "zero_grad": []}
    for turn in range(rounds):
        passes("wrapped")()
        for method in own:
            pair = {}
            for name in ("inner", "outer") if turn % 2 else ("outer", "inner"):
                target = outer.optimizer if name == "inner" else outer
                begin = time.perf_counter()
                getattr(target, method)()
                pair[name] = time.perf_counter() - begin
                passes("wrapped")()  # both find gradients
            own[method].append(pair["outer"] - pair["inner"])
    whole = float(np.median(step))
    parts = {"hooks": calls["hooked"] - calls["bare"], **own}
    return {
        "ms": 1e3 * whole,
        "percent": {name: [100 * x / whole for x in quartiles(parts[name])] for name in parts},
    }


class Layer(nn.Module):
    """A block of many small modules around an attention layer."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.rest = nn.ModuleList(nn.Linear(1, 1) for _ in range(modules - 4))


def measure_attaching(rounds: int) -> dict[str, Any]:
    """Measure wrapping for a model of 10,000 modules.

    Args:
        rounds: How often.

    Returns:
        ``modules``, ``layers`` of attention and the quartiles of the ``seconds``.
    """
    model = nn.Sequential(*(Layer(100) for _ in range(MODULES // 100)))
    seconds = []
    for _ in range(rounds):
        bare = torch.optim.AdamW(model.parameters())
        begin = time.perf_counter()
        optimizer = SpanScaledOptimizer(bare, model, SpanScale(2.0, 1.0))
        seconds.append(time.perf_counter() - begin)
        optimizer.detach()
    return {
        "modules": sum(1 for _ in model.modules()),
        "layers": MODULES // 100,
        "seconds": quartiles(seconds),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, rounds=200)
    options = parser.parse_args(argv)
    start(options)
    own, attaching = measure_step(options.rounds), measure_attaching(ATTACHMENTS)
    print(f"a plain step of the demo's model takes {own['ms']:.1f} ms; added, in % of it:")
    for name, (low, middle, high) in own["percent"].items():
        print(f"{name:10s} {middle:6.2f} (quartiles {low:.2f} to {high:.2f})")
    low, middle, high = attaching["seconds"]
    print(
        f"wrapping for {attaching['modules']:,} modules, {attaching['layers']} layers of attention:"
        f" {middle:.2f} s ({low:.2f} to {high:.2f})"
    )
    write(options, {"own": own, "attaching": attaching})


if __name__ == "__main__":
    main()
