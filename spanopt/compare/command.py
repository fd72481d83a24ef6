"""The command line: ``python -m spanopt compare package.module:train --arm "2,1"``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spanopt.compare.arms import CONTROLS, Arm
from spanopt.importing import Refused, imported

__all__ = ["add_command", "run_command"]


def add_command(commands: Any) -> None:
    """Add ``compare`` to the subcommands of ``python -m spanopt``.

    Args:
        commands: The object that ``ArgumentParser.add_subparsers`` returned.
    """
    command = commands.add_parser(
        "compare",
        help="train a model of yours with and without scaled gradients, and compare",
        description="Train with and without scaled gradients on the same seeds, and compare. The "
        "function is called as train(seed, wrap, ...): see spanopt.compare.compare.",
    )
    command.add_argument("train", metavar="package.module:train", help="the function that trains")
    command.add_argument(
        "--arm",
        action="append",
        required=True,
        metavar="P,V[,PROJECTION]",
        help='factors of the parallel part and of the violation, such as "2,1" or "2,1,pooled"; '
        "repeat it for several arms",
    )
    command.add_argument(
        "--layers", default="*", metavar="PATTERN", help="the layers that are scaled (all)"
    )
    command.add_argument("--seeds", type=int, help="how many (10; with --until at most 100)")
    command.add_argument(
        "--tune",
        metavar="NAME=VALUE,VALUE",
        help="an argument of train() to tune for each arm, such as lr=3e-4,6e-4,1.2e-3",
    )
    command.add_argument("--steps", type=int, help="given to train(); adds arms of equal time")
    command.add_argument("--metric", help="which of the returned numbers (the first)")
    command.add_argument("--larger-is-better", action="store_true")
    command.add_argument(
        "--until", type=float, metavar="PERCENT", help="go on until intervals are this narrow"
    )
    command.add_argument(
        "--margin", type=float, default=0.5, metavar="PERCENT", help="of interest (%(default)s)"
    )
    command.add_argument(
        "--controls",
        default=",".join(CONTROLS),
        help="which controls, with commas; an empty string for none (%(default)s)",
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="results; it resumes there")
    command.add_argument("--workers", type=int, default=1, help="trials at once (%(default)s)")
    command.add_argument("--retry", action="store_true", help="run failed trials again")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the changes")


def run_command(options: argparse.Namespace) -> int:
    """Run ``compare``. Return the exit status: 0, 2 after an error, or 130 after an interrupt."""
    from spanopt.compare.engine import compare

    try:
        result = compare(
            _training(options.train),
            dict(_arm(text, options.layers) for text in options.arm),
            options.seeds,
            tune=_tune(options.tune),
            steps=options.steps,
            controls=[name for name in options.controls.split(",") if name],
            metric=options.metric,
            larger_is_better=options.larger_is_better,
            until=options.until,
            margin=options.margin,
            out=options.out,
            workers=options.workers,
            retry=options.retry,
        )
        if options.plot:
            result.plot(options.plot)
    except (ImportError, TypeError, ValueError, RuntimeError, OSError) as error:
        print(f"spanopt compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "goes on where it was" if options.out else "starts again; --out DIR keeps results"
        print(f"Interrupted; the same command {again}.", file=sys.stderr)
        return 130
    print(result)
    return 0


def _training(path: str) -> Callable[..., Any]:
    found = imported(path, "train")
    if not callable(found):
        raise Refused(f"{path!r} is {type(found).__name__}, not a function that trains")
    return found


def _arm(text: str, layers: str) -> tuple[str, Arm]:
    factors, *rest = text.split(",")
    try:
        pair = float(factors), float(rest[0])
    except (IndexError, ValueError):
        raise ValueError(
            f'--arm is two factors and maybe a projection, such as "2,1", got {text!r}'
        ) from None
    options = {"projection": ",".join(rest[1:])} if rest[1:] else {}
    name = f"({pair[0]:g}, {pair[1]:g})" + "".join(f", {value}" for value in options.values())
    return name, Arm({layers: pair}, options)


def _tune(text: str | None) -> dict[str, list[float]] | None:
    if text is None:
        return None
    name, equals, values = text.partition("=")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        numbers = []
    if not equals or not numbers:
        raise ValueError(f"--tune is a name and values, such as lr=3e-4,6e-4, got {text!r}")
    return {name: numbers}
