"""The options of the command line, and those of them that decide the losses."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DEFAULT_LR", "Config", "parse"]

DEFAULT_LR = 2e-3  # of AdamW


@dataclass(frozen=True)
class Config:
    """All that decides the losses, apart from the text and the version of PyTorch."""

    optimizer: str
    lr: float | None
    parallel: float
    violation: float
    steps: int
    seeds: int
    batch: int
    length: int
    width: int
    layers: int
    heads: int
    eval_every: int
    threads: int


def number(kind: type[int] | type[float], positive: bool = True) -> Callable[[str], int | float]:
    """Return a parser of finite numbers, by default above 0."""

    def parse_number(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
        if not math.isfinite(value) or (positive and value <= 0):
            limit = "finite and above 0" if positive else "finite"
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return value

    return parse_number


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text to train on")
    source.add_argument("--dataset", metavar="NAME", help="NAME or NAME:CONFIG on Hugging Face")
    add = parser.add_argument
    whole, scale = number(int), number(float, positive=False)
    add(
        "--optimizer",
        default="AdamW",
        metavar="NAME",
        help="of torch.optim or torch_optimizer (%(default)s)",
    )
    add("--lr", type=number(float), help=f"{DEFAULT_LR:g} for AdamW, else the optimizer's own")
    add("--parallel", type=scale, default=2.0, help="scale of the parallel span (%(default)s)")
    add("--violation", type=scale, default=1.0, help="scale of the span violation (%(default)s)")
    add("--steps", type=whole, default=250, help="optimizer steps of each arm (%(default)s)")
    add("--seeds", type=whole, default=3, help="how many paired seeds (%(default)s)")
    add("--batch", type=whole, default=8, help="windows in a batch (%(default)s)")
    add("--length", type=whole, default=128, help="characters in a window (%(default)s)")
    add("--width", type=whole, default=96, help="width of the model (%(default)s)")
    add("--layers", type=whole, default=3, help="decoder blocks (%(default)s)")
    add("--heads", type=whole, default=3, help="attention heads (%(default)s)")
    add(
        "--eval-every",
        type=whole,
        default=25,
        help="steps between evaluations and checkpoints (%(default)s)",
    )
    add("--threads", type=whole, default=1, help="CPU threads (%(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where results go (%(default)s)",
    )
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if any")
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    return args
