"""Does span scaling help a decoder of 34 million weights? For a GPU, within a limit of time.

    apt-get install dict-gcide                # 40 MB of English; any text of that size will do
    python benchmarks/gpu_study.py --text /usr/share/dictd/gcide.dict.dz --out runs/gpu-study
    python benchmarks/gpu_study.py --tiny --out runs/tiny     # on a CPU, to see whether it works

It trains plain, (2, 1), uniform (2, 2) and (1, 2) at three learning rates, on three seeds each: all
arms and rates on one seed before the next seed. A run that does not fit into the time that is left
is not begun. The same command goes on where it was, also after it was killed. One line for each run
is in OUT/gpu-RATE.jsonl; the table of changes is printed, and is in OUT/table.md.
"""

from __future__ import annotations

import argparse
import gzip
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments.base import scaled
from harness.experiment import Experiment
from harness.models import Decoder
from harness.partial import by_rate, missing
from harness.store import Store
from harness.tasks import next_token_loss
from harness.texts import Text, subwords, windows
from harness.training import learning_rates
from harness.trial import Trial
from harness.wrapping import wrap
from torch import Tensor, nn

from spanopt.compare.pool import Here, run_pending

LARGE = Trial(
    task="subwords", steps=1000, batch=32, length=512, layers=8, width=512, heads=8, lr=0.0
)
TINY = replace(LARGE, steps=4, batch=2, length=16, layers=2, width=16, heads=2)
VOCABULARY = 8192
RATES = (2.5e-4, 5e-4, 1e-3)
HELD_OUT = 512  # windows
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1


def experiments(base: Trial, rates: Sequence[float], seeds: int) -> list[Experiment]:
    """Return one comparison at a fixed rate for each rate."""
    arms = {
        "plain": base,
        "(2, 1)": scaled(2, 1, base),
        "uniform (2, 2)": scaled(2, 2, base),
        "(1, 2)": scaled(1, 2, base),
    }
    question = "Does it help a larger decoder at a learning rate of {:g}?"
    return [
        Experiment(f"gpu-{lr:g}", question.format(lr), arms, "plain", (lr,), tuple(range(seeds)))
        for lr in rates
    ]


@dataclass
class Data:
    """Tokens on the device.

    Attributes:
        train: What is trained on, one dimension.
        held_out: Windows (count, length + 1): the first half for tuning, the second for reporting.
        vocabulary: How many different tokens there are.
    """

    train: Tensor
    held_out: Tensor
    vocabulary: int

    @classmethod
    def of(cls, text: Text, trial: Trial, vocabulary: int, device: str) -> Data:
        """Tokenise a text and move it to the device."""
        train, rest, size = subwords(text, vocabulary)
        held_out = windows(rest, HELD_OUT, trial.length + 1)
        return cls(train.to(device), held_out.to(device), size)


def train(trial: Trial, data: Data, device: str) -> dict[str, Any]:
    """Train once.

    Args:
        trial: What to train and how.
        data: What to train on.
        device: Of the model.

    Returns:
        The losses ``tuning`` and ``reporting`` in nats per token, ``None`` if training diverged;
        ``seconds`` in all, ``step_ms`` on average, and how many ``weights`` the model has.
    """
    torch.manual_seed(trial.seed)
    model = Decoder(data.vocabulary, trial).to(device)
    bare = torch.optim.AdamW(
        model.parameters(), trial.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=device == "cuda"
    )
    scheduler = learning_rates(bare, trial)
    optimizer: Any = wrap(bare, model, trial) if trial.scaled else bare
    rng, offsets = np.random.default_rng(trial.seed), torch.arange(trial.length + 1, device=device)
    start = time.perf_counter()
    for _ in range(trial.steps):
        first = torch.from_numpy(rng.integers(0, len(data.train) - trial.length, trial.batch))
        batch = data.train[first.to(device)[:, None] + offsets]
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = next_token_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), trial.clip)
        optimizer.step()
        scheduler.step()
    last = loss.item()  # waits for the device
    step_ms = 1e3 * (time.perf_counter() - start) / trial.steps
    halves = zip(("tuning", "reporting"), data.held_out.chunk(2), strict=True)
    losses = {name: held_out_loss(model, half, trial.batch) for name, half in halves}
    if not math.isfinite(last):
        losses = dict.fromkeys(losses)
    weights = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - start
    return {
        **losses,
        "seconds": round(seconds, 3),
        "step_ms": round(step_ms, 3),
        "weights": weights,
    }


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Tensor, batch: int) -> float | None:
    """Return the mean loss over windows in float32, ``None`` if it is not finite."""
    model.eval()
    parts = held_out.split(batch)
    total = math.fsum(next_token_loss(model, part).item() * len(part) for part in parts)
    return total / len(held_out) if math.isfinite(total) else None


def run(
    planned: Sequence[Experiment], store: Store, text: Text, options: argparse.Namespace
) -> bool:
    """Run what is left, one seed after the other. Return whether the time was enough."""
    begin, longest = time.monotonic(), 0.0
    data = Data.of(text, planned[0].arms["plain"], options.vocabulary, options.device)

    def in_time() -> bool:
        return time.monotonic() - begin + longest < 60 * options.minutes

    def train_and_time(trial: Trial) -> dict[str, Any]:
        nonlocal longest
        start = time.monotonic()
        result = train(trial, data, options.device)
        longest = max(longest, time.monotonic() - start)
        return result

    for seeds in range(1, options.seeds + 1):
        for whole in planned:
            e = whole.part(whole.arms, slice(0, seeds))

            def keep(trial: Trial, outcome: Any, name: str = e.name) -> None:
                result = outcome.result()
                store.append(name, trial, text, result)
                print(
                    f"{name}, {trial.parallel:g}, {trial.violation:g}, seed {trial.seed}:", end=" "
                )
                print(f"{result['reporting']} in {result['seconds']:.0f} s", flush=True)

            def pending(e: Experiment = e) -> list[Trial]:
                return e.pending(store) if in_time() else []

            run_pending(pending, train_and_time, keep, Here(), 1)
    return not any(e.pending(store) for e in planned)


def read(path: Path) -> Text:
    """Read a text, which gzip may have packed: dictionaries of dictd end in .dz."""
    packed = path.suffix in (".gz", ".dz")
    raw = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    return Text.split(path.name, raw.decode("utf-8", errors="replace"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8, also packed by gzip")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(cuda; cpu with --tiny)")
    parser.add_argument("--rates", type=float, nargs="+", help="ascending (2.5e-4 5e-4 1e-3)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, help="of each run (1000; 4 with --tiny)")
    parser.add_argument("--minutes", type=float, default=12, help="at most (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a small model, on Python's help texts")
    options = parser.parse_args(argv)
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    options.vocabulary = 300 if options.tiny else VOCABULARY
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --tiny shows whether the script runs")
    if options.text is None and not options.tiny:
        parser.error("--text FILE is needed: some 30 MB of English")
    base = TINY if options.tiny else LARGE
    base = replace(base, steps=options.steps or base.steps)
    try:
        text = Text.default() if options.text is None else read(options.text)
        planned = experiments(base, options.rates or RATES, options.seeds)
        store = Store(options.out)
        store.check_text(text)
        finished = run(planned, store, text, options)
    except (OSError, ValueError) as error:
        print(f"gpu_study.py: error: {error}", file=sys.stderr)
        return 2
    table = f"{by_rate(planned, store, fewest=2)}\n\n{missing(planned, store)}\n"
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")
    if not finished:
        print("The time was not enough for all of it; the same command goes on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
