"""Does semantic focus help? The setting of the paper in miniature, a rate tuned for each arm.

    python benchmarks/focus_study.py run --hours 1.5       # in order; resumes
    python benchmarks/focus_study.py list                  # what there is, and what is left to run
    python benchmarks/focus_report.py                      # docs/focus.md from the results

The setting is that of the authors' scripts (github.com/rithram/spartan): an encoder with one head,
mean pooling and plain SGD, sequences of 40 tokens, 5 blocks, 5,000 sequences to train on. They
train for 20,000 to 200,000 steps. What is run here is smaller, see ``STUDIES``. What is measured is
the number of optimizer steps until 95 % of held-out sequences are right. A run that does not get
there counts as the cap on steps, and is reported as censored.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from focus_text import LOSS, TUNING_LOSS, train_on_text
from focus_training import SCORE, STEPS, measure, train
from harness.texts import Text

from spanopt.compare.arms import PLAIN, Arm, with_controls
from spanopt.compare.design import Design
from spanopt.compare.grid import Grid
from spanopt.compare.jsonl import append_line, read_lines
from spanopt.compare.store import Store
from spanopt.compare.trial import Task, Trial

__all__ = ["STUDIES", "Study"]

RESULTS = Path(__file__).parent / "results" / "focus"
TUNING_SEEDS = (1_000_000, 1_000_001)
HOURS = 1.5  # declared for all studies together
FIRST_SEEDS = 5  # of every study, before any gets more
EXTENSIONS = 1  # rates that may be added at each end
MEASURED_SEEDS = 3  # whose plain training is repeated with measures of its scores


MINIATURE: dict[str, Any] = {"length": 12, "blocks": 2, "held_out": 200, "dropout": 0.0}


@dataclass(frozen=True)
class Study:
    """Arms compared on one task.

    The studies were declared before any of them was run, with caps from single runs on other seeds.
    Three things were changed after the first result with SGD: the order, the arms with span scaling
    on Even Pairs with SGD, and the kinds and the cap of Missing Duplicate with SGD. The study of
    span scaling on fresh seeds was declared after (2, 1) had gained on Even Pairs with SGD. Its 16
    seeds were cut to 10 after 9, when it was seen that the span is all of the gradient there.

    Attributes:
        name: Its name, which is that of the folder of its results.
        task: One of ``TASKS``, or ``"text"``.
        rates: The learning rates to begin with, smallest first.
        keys: How many keys focus keeps.
        kinds: The kinds of focus.
        optimizer: ``"sgd"`` or ``"adamw"``.
        cap: The most steps of a run; on text, the number of steps.
        every: Steps between evaluations, and between measures of scores.
        seeds: How many paired seeds.
        span: Whether span scaling by (2, 1) is compared too, alone and with the first kind.
        pairs: Scales that are compared with full attention, by the names of their arms.
        first_seed: The first of the paired seeds.
        size: Further arguments of the function that trains.
    """

    name: str
    task: str
    rates: tuple[float, ...]
    keys: int = 3
    kinds: tuple[str, ...] = ("top", "window", "gradient")
    optimizer: str = "adamw"
    cap: int = 300
    every: int = 25
    seeds: int = 10
    span: bool = False
    pairs: dict[str, tuple[float, float]] = field(default_factory=dict)
    first_seed: int = 0
    size: dict[str, Any] = field(default_factory=lambda: dict(MINIATURE))

    @property
    def arms(self) -> dict[str, Arm]:
        """The arms beside full attention."""
        arms = {
            f"{kind} {self.keys}": Arm(params={"kind": kind, "k": self.keys}) for kind in self.kinds
        }
        if self.span:
            name, arm = next(iter(arms.items()))
            arms["(2, 1)"] = Arm((2, 1))
            arms[f"{name} and (2, 1)"] = Arm((2, 1), params=arm.params)
        return arms | {name: Arm(scales) for name, scales in self.pairs.items()}

    @property
    def metric(self) -> str:
        """What is compared."""
        return LOSS if self.task == "text" else STEPS

    def design(self, seeds: int | None = None) -> Design:
        """Return what trials are needed, for all seeds or only for the first ones."""
        count = self.seeds if seeds is None else min(seeds, self.seeds)
        return Design(
            with_controls(self.arms, ()),
            tuple(range(self.first_seed, self.first_seed + count)),
            TUNING_SEEDS,
            Grid(self.rates, EXTENSIONS),
            self.metric,
            TUNING_LOSS if self.task == "text" else SCORE,
        )

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the function that trains."""
        if self.task == "text":
            return {"steps": self.cap, **self.size}
        named = {"task": self.task, "cap": self.cap, "every": self.every}
        return named | {"optimizer": self.optimizer, **self.size}

    def function(self, text: Text | None) -> Callable[..., Any]:
        """Return the function that trains.

        Raises:
            ValueError: There is no text for it.
        """
        if self.task != "text":
            return functools.partial(train, **self.settings())
        if text is None:
            raise ValueError(f"study {self.name!r} needs a text: give --text or --train-text")
        return functools.partial(train_on_text, text=text, **self.settings())

    def store(self, out: Path, text: Text | None = None) -> Store:
        """Return the results in a folder.

        Raises:
            ValueError: The folder has results of other settings or of another text.
        """
        settings = self.settings() | {"rates": [*self.rates], "optimizer": self.optimizer}
        folder = out / self.name
        if self.task == "text":
            known = folder / "settings.json"
            if text is not None:
                settings |= {"text": text.name, "sha256": text.digest}
            elif known.exists():
                read = json.loads(known.read_text(encoding="utf-8"))
                settings |= {name: read[name] for name in ("text", "sha256")}
        return Store(folder, settings)


SPANS = {
    "(2, 1)": (2.0, 1.0),
    "uniform (2, 2)": (2.0, 2.0),
    "(1, 2)": (1.0, 2.0),
    "(1.0001, 1)": (1.0001, 1.0),
}
# Caps come from single runs on other seeds, which are not part of the results.
STUDIES = {
    study.name: study
    for study in (
        Study("even-pairs-sgd", "even-pairs", (0.1, 0.2, 0.4), optimizer="sgd", cap=800, span=True),
        Study(
            "even-pairs-adamw", "even-pairs", (0.001, 0.002, 0.004), cap=300, every=10, span=True
        ),
        Study(
            "missing-duplicate-sgd",
            "missing-duplicate",
            (0.2, 0.4),
            kinds=("top", "window"),
            optimizer="sgd",
            cap=2000,
            every=50,
        ),
        Study("missing-duplicate-adamw", "missing-duplicate", (0.001, 0.002, 0.004), cap=600),
        Study(
            "text-adamw",
            "text",
            (0.004, 0.008, 0.016),
            keys=16,
            kinds=("top", "window"),
            cap=300,
            size={"batch": 4, "length": 128},
        ),
        Study("stack-manipulation-adamw", "stack-manipulation", (0.001, 0.002, 0.004), cap=400),
        Study("parity-adamw", "parity", (0.001, 0.002, 0.004), cap=400),
        Study(
            "even-pairs-sgd-spans",
            "even-pairs",
            (0.2, 0.4),
            kinds=(),
            optimizer="sgd",
            cap=800,
            pairs=SPANS,
            first_seed=100,
        ),
    )
}


def pending(study: Study, store: Store, seeds: int | None = None) -> list[Trial]:
    """Return the trials to run next. Training is not repeated: it is the same on one processor."""
    return [trial for trial in study.design(seeds).pending(store) if not trial.again]


def measures(study: Study, out: Path) -> list[dict[str, Any]]:
    """Return the measures of scores of a study's plain runs."""
    path = out / study.name / "measures.jsonl"
    return [row for _, row in read_lines(path)] if path.exists() else []


def stages(studies: Sequence[Study]) -> Iterator[tuple[Study, int]]:
    """Yield what to run, in order: a few seeds of every study, and then all of them."""
    for study in studies:
        yield study, FIRST_SEEDS
    for study in studies:
        yield study, study.seeds


def run(
    studies: Sequence[Study],
    out: Path,
    text: Text | None = None,
    hours: float = HOURS,
    tell: Callable[[str], None] = print,
) -> None:
    """Run trials until all are done, or until no more may begin.

    Args:
        studies: What to run.
        out: The folder of results.
        text: For the studies on text.
        hours: After how many hours no trial begins.
        tell: Is told what was run.

    Raises:
        ValueError: There is no text for a study on text.
    """
    end = time.monotonic() + 3600 * hours
    for study, seeds in stages(studies):
        store = study.store(out, text)
        design = study.design(seeds)
        function = study.function(text)
        task = Task(function, design.named.all, "lr", study.metric)
        while todo := pending(study, store, seeds):
            if time.monotonic() > end:
                return
            store.keep(todo[0], result := task.run(todo[0]))
            tell(f"{study.name}: {todo[0]} {result.get('metrics', result)}")
        lr = design.best(PLAIN, store)
        known = {row["seed"] for row in measures(study, out)}
        for seed in design.seeds[:MEASURED_SEEDS]:
            if seed in known or lr is None:
                continue
            if time.monotonic() > end:
                return
            rows = measure(function, seed, lr, keys=study.keys, every=study.every)
            path = out / study.name / "measures.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            append_line(path, {"seed": seed, "rows": rows})


def list_studies(out: Path) -> None:
    """Print what there is, and how much of it has been run."""
    for study in STUDIES.values():
        done = sum(1 for _ in study.store(out).results()) if (out / study.name).exists() else 0
        seeds = len(study.design().complete(study.store(out))) if done else 0
        print(f"{study.name}: {done} runs, {seeds} of {study.seeds} seeds complete")


def text_of(args: argparse.Namespace) -> Text | None:
    """Read the text that was asked for, if any."""
    if args.train_text is None:
        return None
    return Text.read(args.text_name or args.train_text.name, args.train_text, args.valid_text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="say what there is, and how much of it has been run")
    command = commands.add_parser("run", help="run studies; what has been run is not run again")
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="studies; by default all for which there is a text"
    )
    command.add_argument("--hours", type=float, default=HOURS, help="no trial begins after these")
    command.add_argument("--train-text", type=Path, metavar="FILE", help="a text for text studies")
    command.add_argument("--valid-text", type=Path, metavar="FILE", help="by default a fifth of it")
    command.add_argument("--text-name", metavar="NAME", help="what the page calls the text")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="results")
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            list_studies(args.out)
        else:
            unknown = [name for name in args.names if name not in STUDIES]
            if unknown:
                parser.error(f"no study is named {unknown[0]!r}, only {', '.join(STUDIES)}")
            text = text_of(args)
            names = args.names or [n for n in STUDIES if text or STUDIES[n].task != "text"]
            run([STUDIES[name] for name in names], args.out, text, args.hours)
    except (OSError, ValueError) as error:
        print(f"focus_study.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
