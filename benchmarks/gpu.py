"""Whole training steps on a GPU with span scaling, as ratios to the same steps without it.

Each model is trained by AdamW under autocast in bfloat16, plain and wrapped, in turns in one
process. Times are those of CUDA's own clock, and the ratio is that of neighbours. *Noise* is the
ratio of a second plain step to the first. Beside it stand the peak of memory and the kernels that a
step launches. What does not fit into the time or the memory is left out, and said.

    python benchmarks/gpu.py                            # all, in at most 8 minutes
    python benchmarks/gpu.py "GPT-2 small N=1024" --formulation plain
    python benchmarks/gpu.py --device cpu --tiny        # whether it runs
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed.cases import Case, build
from speed.measure import in_turns, quartiles, three
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from spanopt import SpanScale, SpanScaledOptimizer
from spanopt.mathematics.formulations import FORMULATIONS
from spanopt.projection import get_formulation, set_formulation

RESULTS = Path(__file__).parent / "results" / "gpu"
VOCABULARY = 50_304
TARGETS = 1.08, 1.05
"""Of an eager and of a compiled step, on an H100."""
NEEDED = 45
"""Seconds that one case takes at least; compiled, twice as many."""


def gpt(size: str, length: int, batch: int) -> Case:
    """Return GPT-2 by its size."""
    width, heads, layers = {"small": (768, 12, 12), "medium": (1024, 16, 24)}[size]
    targets = (1.03, 1.03) if length >= 4096 else TARGETS
    name = f"GPT-2 {size} N={length}"
    return Case(name, "decoder", width, heads, length, batch, layers, None, *targets)


# The most important first: the last ones are those that the time may not be enough for.
CASES = [
    gpt("small", 1024, 16),
    gpt("small", 4096, 4),
    Case("Llama-like GQA", "gqa", 2048, 16, 2048, 4, 8, 4, *TARGETS),
    Case("ViT-B/16", "vit", 768, 12, 197, 128, 12, None, *TARGETS),
    gpt("medium", 1024, 8),
    gpt("small", 512, 32),
    gpt("small", 8192, 2),
]
COMPILED = ["GPT-2 small N=1024", "GPT-2 small N=4096", "Llama-like GQA", "ViT-B/16"]


class LanguageModel(nn.Module):
    """Token embeddings, blocks, and a head with the same weights, as language models have them."""

    def __init__(self, case: Case, blocks: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, case.width)
        self.position = nn.Parameter(0.02 * torch.randn(case.length, case.width))
        self.blocks, self.norm = blocks, nn.LayerNorm(case.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N) to the mean loss of the next token."""
        x = self.norm(self.blocks(self.embedding(tokens) + self.position))
        logits = F.linear(x[:, :-1], self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def training_step(
    case: Case, options: argparse.Namespace, *, wrap: bool, compiled: bool
) -> Callable[[], None]:
    """Return a function that takes one training step of a new model."""
    device, setting = torch.device(options.device), build(case)
    model, given = setting.model, setting.x.to(device)
    if case.kind != "vit":
        vocabulary = 64 if options.tiny else VOCABULARY
        model = LanguageModel(case, model, vocabulary)
        given = torch.randint(vocabulary, (case.batch, case.length), device=device)
    model = model.to(device)
    optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type == "cuda")
    if wrap:
        optimizer = SpanScaledOptimizer(optimizer, model, SpanScale(2.0, 1.0))
    if compiled:
        model.compile()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            result = model(given)
            loss = result if result.ndim == 0 else result.float().square().mean()
        loss.backward()
        optimizer.step()

    return step


def on_the_clock(step: Callable[[], None], device: str, taken: list[float]) -> Callable[[], None]:
    """Return a step that waits for the device and notes the milliseconds it took there."""

    def call() -> None:
        if device != "cuda":
            begin = time.perf_counter()
            step()
            taken.append(1e3 * (time.perf_counter() - begin))
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))

    return call


def peak(step: Callable[[], None], device: str) -> float:
    """Return the MiB that a step takes at most beyond what is there; 0 on a CPU."""
    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(step: Callable[[], None], device: str) -> int:
    """Return the kernels that a step launches; on a CPU, its operations."""
    cuda = device == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=kinds) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        on_device = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == on_device for event in profiler.events())
    return sum(event.name.startswith("aten::") for event in profiler.events())


def measure(case: Case, options: argparse.Namespace, *, compiled: bool) -> dict[str, Any]:
    """Measure one model.

    Returns:
        A row of the page's table by heading. The peak is what a step takes beyond what is there
        before it; on a CPU there is none, and operations are counted in place of kernels.
    """
    torch.compiler.reset()
    device = options.device
    plain = training_step(case, options, wrap=False, compiled=compiled)
    wrapped = training_step(case, options, wrap=True, compiled=compiled)
    for step in (plain, wrapped, plain, wrapped):
        step()  # compiles, and makes the optimizer's state
    peaks = [peak(step, device) for step in (plain, wrapped)]
    counts = [launches(step, device) for step in (plain, wrapped)]
    times: dict[str, list[float]] = {"plain": [], "again": [], "wrapped": []}
    steps = {"plain": plain, "again": plain, "wrapped": wrapped}
    turns = {name: on_the_clock(steps[name], device, times[name]) for name in steps}
    in_turns(turns, options.rounds, warm_up=2)
    measured = {name: np.array(taken[2:]) for name, taken in times.items()}
    return {
        "model": case.name,
        "": "compiled" if compiled else "eager",
        "plain step, ms": quartiles(measured["plain"])[1],
        "wrapped / plain": quartiles(measured["wrapped"] / measured["plain"]),
        "noise": quartiles(measured["again"] / measured["plain"])[1],
        "target": case.target_of(compiled=compiled),
        "peak memory, wrapped / plain": peaks[1] / peaks[0] if peaks[0] else None,
        "kernels": counts[0],
        "kernels added": counts[1] - counts[0],
    }


def tiny(case: Case) -> Case:
    """Return a case that a CPU takes a step of at once."""
    keys = case.kv_heads and 1
    return replace(case, width=32, heads=2, kv_heads=keys, length=24, batch=2, layers=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [case.name for case in CASES]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.add_argument("--formulation", choices=FORMULATIONS, default=get_formulation())
    parser.add_argument("--rounds", type=int, default=15, help="measured (%(default)s)")
    parser.add_argument("--minutes", type=float, default=7.5, help="at most (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small models, for a try")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="in place of results/gpu/CARD.json"
    )
    options = parser.parse_args(argv)
    unknown = [name for name in options.cases if name not in names]
    if unknown:
        parser.error(f"no case is named {unknown[0]!r}, only {', '.join(names)}")
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --device cpu --tiny shows whether the script runs")
    if not cuda:
        torch.set_num_threads(1)
    set_formulation(options.formulation)
    card = torch.cuda.get_device_name() if cuda else "CPU"
    wanted = [case for case in CASES if not options.cases or case.name in options.cases]
    plan = [(case, False) for case in wanted]
    plan += [(case, True) for case in wanted if case.name in COMPILED]
    begin, rows, left_out = time.monotonic(), [], []
    for case, compiled in plan:
        name = f"{case.name}, {'compiled' if compiled else 'eager'}"
        needed = 0 if options.tiny else NEEDED * (1 + compiled)
        if time.monotonic() - begin + needed > 60 * options.minutes:
            left_out.append(f"{name}: no time was left")
            continue
        try:
            row = measure(tiny(case) if options.tiny else case, options, compiled=compiled)
        except torch.OutOfMemoryError:
            left_out.append(f"{name}: it does not fit into the memory")
            continue
        finally:
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
        rows.append(row)
        print(
            f"{name}: plain {row['plain step, ms']:.2f} ms, wrapped / plain "
            f"{three(row['wrapped / plain'])}, noise {row['noise']:.3f}, peak memory "
            f"{row['peak memory, wrapped / plain']}, kernels {row['kernels']} and "
            f"{row['kernels added']} more",
            flush=True,
        )
    print(*left_out, sep="\n")
    if not rows or (options.tiny and options.out is None):
        return
    record = {
        "card": card,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "formulation": options.formulation,
        "rounds": options.rounds,
        "rows": rows,
        "left_out": left_out,
    }
    out = options.out or RESULTS / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}; make performance shows it in docs/performance.md")


if __name__ == "__main__":
    main()
