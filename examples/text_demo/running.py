"""From the command line to a finished run: what is checked, what is resumed, what is reported."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Console

from text_demo.arms import build_arm, train_step
from text_demo.errors import UserError, one_line
from text_demo.model import Decoder
from text_demo.optimizers import find_optimizer
from text_demo.options import DEFAULT_LR, Config, parse
from text_demo.progress import Display
from text_demo.results import report
from text_demo.resuming import Run, load_checkpoint
from text_demo.texts import Data, dataset_text, default_text, encode, file_text

__all__ = ["main"]

TrainSeed: TypeAlias = Callable[[Run, int, "dict[str, Any] | None", Display], None]


def main(train_seed: TrainSeed, argv: Sequence[str] | None, description: str) -> int:
    """Run the script and return its exit status."""
    args = parse(argv, description)
    # The cycle that this warns of is broken by the next zero_grad.
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    try:
        execute(train_seed, args)
    except UserError as error:
        print(f"train_text.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; --resume goes on from the latest checkpoint.", file=sys.stderr)
        return 130
    return 0


def execute(train_seed: TrainSeed, args: Namespace) -> None:
    """Train all seeds and report."""
    torch.set_num_threads(args.threads)
    run, states = prepare(args)
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        if states is None:  # what an earlier run left must not be taken for this one's
            for name in ("checkpoint.pt", "results.json", "curves.png"):
                (run.out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {run.out}: {error.strerror}") from error
    console = Console()
    if args.resume:
        found = f"a checkpoint after {run.steps_done()} steps" if states else "no checkpoint"
        console.print(f"Found {found} in {run.out}.", highlight=False, soft_wrap=True)
    display = Display(run, console)
    with display.progress:
        for seed in range(max(len(run.records) - 1, 0), run.config.seeds):
            train_seed(run, seed, states, display)
            states = None
    report(run, console)


def prepare(args: Namespace) -> tuple[Run, dict[str, Any] | None]:
    """Check everything that can be wrong before a file is written."""
    cls = find_optimizer(args.optimizer)
    package = "torch.optim" if cls.__module__.startswith("torch.") else "torch_optimizer"
    options = {item.name: getattr(args, item.name) for item in fields(Config)}
    options["optimizer"] = f"{package}.{cls.__name__}"
    if args.lr is None and cls is torch.optim.AdamW:
        options["lr"] = DEFAULT_LR
    config = Config(**options)
    if args.text:
        train, validation = file_text(args.text)
    else:
        train, validation = dataset_text(args.dataset) if args.dataset else default_text()
    run = Run(config, encode(train, validation, config.length), args.out)
    states = load_checkpoint(run) if args.resume else None
    check_optimizer(config, run.data)
    return run, states


def check_optimizer(config: Config, data: Data) -> None:
    """Take one step on a model that is thrown away, to see whether the optimizer can train it."""
    torch.manual_seed(0)
    model = Decoder(data.vocabulary, config)
    windows = data.batch(config, np.random.default_rng(0))
    try:
        train_step(build_arm("plain", model, config), windows)
    except Exception as error:  # each optimizer raises its own kinds
        message = f"{config.optimizer} cannot train this model: {one_line(error)}"
        raise UserError(message) from error
