"""Does span scaling help? Arms trained on the same seeds, and compared.

    python benchmarks/study.py run                  # all experiments, in order; resumes
    python benchmarks/study.py run primary grid     # some of them
    python benchmarks/study.py list                 # what there is, and what is left to run
    python benchmarks/study.py table primary        # its comparison, as a table
    python benchmarks/study.py report               # docs/evidence.md from the results
    python benchmarks/study.py quick                # a small part, in minutes

Learning rates are chosen on seeds and on a half of the validation text that take no part in the
comparison: for each arm by itself in the first comparisons, for plain alone in most later ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from harness.experiment import NEAR_NULL, TUNING_SEEDS, Experiment
from harness.partial import drawn_by_rate
from harness.report import Report
from harness.runner import run_experiments
from harness.store import Store
from harness.tasks import Text
from harness.trial import Trial
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from speed.measure import three

from spanopt.compare.drawing import save

RESULTS = Path(__file__).parent / "results"
TEMPLATE = Path(__file__).parent / "evidence.in.md"
DOCS = Path(__file__).parent.parent / "docs"
PLAIN = Trial()
FROZEN = "(0, 0): Q and K frozen"
LRS = (4e-3, 8e-3, 16e-3, 32e-3)


def scaled(parallel: float, violation: float, base: Trial = PLAIN, **changes: object) -> Trial:
    """Return a trial with scaled gradients."""
    return replace(base, parallel=parallel, violation=violation, **changes)  # type: ignore[arg-type]


def main_arms(base: Trial) -> dict[str, Trial]:
    """Return the arms that are compared in every other setting."""
    return {
        "plain": base,
        FROZEN: scaled(0, 0, base),
        "(2, 1)": scaled(2, 1, base),
        "uniform (2, 2)": scaled(2, 2, base),
    }


PRIMARY = Experiment(
    "primary",
    "Do scaled spans help a causal language model, and is it their geometry that does?",
    arms={
        "plain": PLAIN,
        FROZEN: scaled(0, 0),
        "(2, 1)": scaled(2, 1),
        "uniform (2, 2)": scaled(2, 2),
        "near-null (1.0001, 1)": scaled(NEAR_NULL, 1),
        "(1.5, 1)": scaled(1.5, 1),
        "(3, 1)": scaled(3, 1),
        "(1, 0.5)": scaled(1, 0.5),
        "(1, 0): span only": scaled(1, 0),
        "(1, 2): violation amplified": scaled(1, 2),
        "(0, 1): violation only": scaled(0, 1),
        "uniform (1.5, 1.5)": scaled(1.5, 1.5),
        "uniform (3, 3)": scaled(3, 3),
        "uniform (0.5, 0.5)": scaled(0.5, 0.5),
        "random subspace (2, 1)": scaled(2, 1, projection="random"),
        "(2, 1), norm preserved": scaled(2, 1, preserve_norm=True),
    },
    baseline="plain",
    lrs=LRS,
    lr_of={"near-null (1.0001, 1)": "plain"},
)

# What looked promising in the primary comparison, beside (2, 1): on seeds that took
# no part in choosing them, with learning rates that are tuned on three times as many as there.
CONFIRMATION = Experiment(
    "confirmation",
    "Does what looked promising hold on fresh seeds?",
    arms={
        name: PRIMARY.arms[name]
        for name in ("plain", "(2, 1)", "uniform (1.5, 1.5)", "(2, 1), norm preserved")
    },
    baseline="plain",
    lrs=(8e-3, 16e-3),
    seeds=tuple(range(100, 116)),
    tuning_seeds=tuple(range(1000, 1006)),
)

CONTROLS = Experiment(
    "controls",
    "Is it the span that trains well by itself, or any subspace of its size?",
    arms={
        "plain": PLAIN,
        "(1, 0): span only": scaled(1, 0),
        "(1, 0), random subspace": scaled(1, 0, projection="random"),
        "(0, 1): violation only": scaled(0, 1),
        "(0, 1), random subspace": scaled(0, 1, projection="random"),
        "(1, 0), random projection of the input": scaled(1, 0, projection="random-input"),
        "(0, 1), random projection of the input": scaled(0, 1, projection="random-input"),
    },
    baseline="plain",
    lrs=LRS,
)

# What follows is asked of runs of half the length, at the rate that is best for plain there, which
# favours plain if anything. In return, chance in the choice of the rate does not tell arms apart.
HALF = replace(PLAIN, steps=300)
HALF_SEEDS = tuple(range(8))
HALF_TUNING_SEEDS = tuple(range(1000, 1004))


def at_plains_rate(
    name: str,
    question: str,
    arms: dict[str, Trial],
    plain: str = "plain",
    **options: object,
) -> Experiment:
    """Return a comparison with the plain runs of half the length, at their best rate."""
    arms = {plain: HALF} | arms
    settings: dict[str, object] = {
        "lrs": LRS,
        "seeds": HALF_SEEDS,
        "tuning_seeds": HALF_TUNING_SEEDS,
        "lr_of": {arm: plain for arm in arms if arm != plain},
    }
    return Experiment(name, question, arms, plain, **settings | options)  # type: ignore[arg-type]


PATHS_CLIPPED = {
    "(2, 1)": scaled(2, 1, HALF),
    "(2, 1) to the weights only": scaled(2, 1, HALF, path="weights"),
    "(2, 1) to the inputs only": scaled(2, 1, HALF, path="inputs"),
    "uniform (2, 2)": scaled(2, 2, HALF),
    "uniform (2, 2) to the weights only": scaled(2, 2, HALF, path="weights"),
    "uniform (2, 2) to the inputs only": scaled(2, 2, HALF, path="inputs"),
}
PATHS_UNCLIPPED = {
    "(2, 1), no clipping": scaled(2, 1, HALF, clip=0.0),
    "uniform (2, 2), no clipping": scaled(2, 2, HALF, clip=0.0),
}
PATHS = at_plains_rate(
    "paths",
    "By which way does the scaled gradient act: weights, earlier layers, or clipping?",
    PATHS_CLIPPED | {"plain, no clipping": replace(HALF, clip=0.0)} | PATHS_UNCLIPPED,
    baselines=dict.fromkeys(PATHS_UNCLIPPED, "plain, no clipping"),
)

FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
GRID = at_plains_rate(
    "grid",
    "Which pair of scales?",
    {
        f"({a:g}, {b:g})": scaled(a, b, HALF)
        for a in FACTORS
        for b in FACTORS
        if (a, b) != (1.0, 1.0)
    },
    plain="(1, 1)",
    seeds=HALF_SEEDS[:3],
)

MOVED = {
    "query only": scaled(2, 1, HALF, side="query"),
    "key only": scaled(2, 1, HALF, side="key"),
    "first layer only": scaled(2, 1, HALF, where="first"),
    "last layer only": scaled(2, 1, HALF, where="last"),
    "scales warmed up": scaled(2, 1, HALF, scale_schedule="warm-up"),
    "scales decaying": scaled(2, 1, HALF, scale_schedule="decay"),
}
PLACES = at_plains_rate(
    "places",
    "Does it matter on which side, in which layer and when?",
    {"(2, 1)": scaled(2, 1, HALF)} | {f"(2, 1), {name}": trial for name, trial in MOVED.items()},
)
# A wrapped step took 1.3 times as long as a plain one in the primary comparison.
TIME = at_plains_rate(
    "time",
    "Does it help in the same time?",
    {
        "(2, 1)": scaled(2, 1, HALF),
        "(2, 1), 300 / 1.3 steps": scaled(2, 1, HALF, steps=231),
    },
)

SETUPS = at_plains_rate(
    "setups",
    "Does another notion of the parallel part do better?",
    {
        f"({a:g}, {b:g}), {setup}": scaled(a, b, HALF, projection=setup)
        for setup in ("span", "cross", "oblique", "radial", "feature", "pooled")
        for a, b in ((2, 1), (1, 0.5))
    },
)

SHARES = Experiment(
    "shares",
    "How much of the gradient is in the span?",
    arms={"plain": replace(PLAIN, monitored=True)},
    baseline="plain",
    lrs=(16e-3,),
    seeds=(0, 1, 2),
)


def elsewhere(
    name: str,
    question: str,
    base: Trial,
    lrs: tuple[float, ...] = LRS[1:],
    *,
    seeds: int = len(HALF_SEEDS),
    control: bool = True,
) -> Experiment:
    """Return the comparison of (2, 1) with plain in another setting, at plain's best rate there.

    Q and K frozen show on three seeds whether attention matters there; the control is uniform
    amplification.
    """
    arms = main_arms(base)
    if not control:
        del arms["uniform (2, 2)"]
    return Experiment(
        name,
        question,
        arms,
        "plain",
        lrs,
        tuple(range(seeds)),
        TUNING_SEEDS[:1],
        lr_of={arm: "plain" for arm in arms if arm != "plain"},
        fewer={FROZEN: 3},
    )


SUBWORDS = elsewhere(
    "subwords",
    "Does it help on subwords (BPE, 1,024 of them)?",
    replace(HALF, task="subwords"),
    LRS,
    seeds=10,
)
# The prototype's own recipe, at the rate that was plain's best there and at half of it.
PROTOTYPE_BASE = Trial(
    model="learned", lr_schedule="constant", layers=3, width=96, heads=3, batch=16
)
PROTOTYPES = [
    Experiment(
        f"learned-positions-{lr:g}",
        "Does it help without a learning-rate schedule, with learned positions and tied weights?",
        arms={
            "plain": PROTOTYPE_BASE,
            "(2, 1)": scaled(2, 1, PROTOTYPE_BASE),
            "uniform (2, 2)": scaled(2, 2, PROTOTYPE_BASE),
        },
        baseline="plain",
        lrs=(lr,),
        seeds=tuple(range(seeds)),
    )
    for lr, seeds in ((4e-3, 5), (2e-3, 3))
]

HEAD_DIMS = [
    elsewhere(
        f"head-dim-{d}",
        f"Does it help with heads of dimension {d}?",
        replace(HALF, width=128, heads=128 // d, batch=4),
        LRS[:3],
        seeds=6,
        control=False,
    )
    for d in (8, 16, 32, 64, 128)
]
LENGTHS = [
    elsewhere(
        f"length-{n}",
        f"Does it help in sequences of {n} tokens, with one head of dimension 64?",
        replace(HALF, length=n, batch=1024 // n, heads=1),
        control=False,
    )
    for n in (32, 64, 128, 256, 512)
]
OPTIMIZER_LRS = {
    "SGD": (0.25, 0.5, 1.0, 2.0),
    "Muon": (1e-2, 2e-2, 4e-2),
    "Lamb": (8e-3, 16e-3, 32e-3),
    "AdaBelief": (8e-3, 16e-3, 32e-3),
    "RAdam": (8e-3, 16e-3, 32e-3),
}
OPTIMIZERS = [
    elsewhere(
        f"optimizer-{name.lower()}",
        f"Does it help {name}?",
        replace(HALF, optimizer=name),
        lrs,
    )
    for name, lrs in OPTIMIZER_LRS.items()
]
# Among these, uniform amplification looked promising with Muon: again, on seeds that took no part,
# with plain's rate tuned on four, and by which way it acts.
MUON = replace(HALF, optimizer="Muon")
MUON_CONFIRMATION = at_plains_rate(
    "muon-confirmation",
    "Does what looked promising with Muon hold on fresh seeds, and by which way does it act?",
    {
        "plain": MUON,
        "(2, 1)": scaled(2, 1, MUON),
        "uniform (2, 2)": scaled(2, 2, MUON),
        "uniform (2, 2) to the weights only": scaled(2, 2, MUON, path="weights"),
        "uniform (2, 2) to the inputs only": scaled(2, 2, MUON, path="inputs"),
    },
    lrs=OPTIMIZER_LRS["Muon"],
    seeds=tuple(range(100, 110)),
)
RIVALS = Experiment(
    "rivals",
    "How does it compare with other wrappers and optimizers?",
    arms={
        "plain": HALF,
        "(2, 1)": scaled(2, 1, HALF),
        "uniform (2, 2)": scaled(2, 2, HALF),
        "Lookahead": replace(HALF, optimizer="Lookahead"),
        "OrthoGrad": replace(HALF, optimizer="OrthoGrad"),
        "schedule-free AdamW": replace(HALF, optimizer="AdamWScheduleFree"),
        "Muon": replace(HALF, optimizer="Muon"),
    },
    baseline="plain",
    lrs=LRS,
    seeds=HALF_SEEDS,
)
TASKS = [
    elsewhere(
        "masked",
        "Does it help an encoder that fills masks?",
        replace(HALF, task="masked"),
    ),
    elsewhere(
        "sequence-to-sequence",
        "Does it help nn.Transformer restore vowels?",
        replace(HALF, task="sequence-to-sequence", model="learned", length=64),
        (1e-3, 2e-3, 4e-3),
    ),
    elsewhere(
        "digits",
        "Does it help a vision transformer read digits?",
        replace(HALF, task="digits", model="learned", heads=8, length=17, batch=64),
        (2e-3, 4e-3, 8e-3),
    ),
    elsewhere(
        "fine-tuning",
        "Does it help fine-tuning?",
        replace(HALF, task="fine-tuning"),
        (1e-3, 2e-3, 4e-3),
    ),
]
SIZES = [
    elsewhere(
        f"size-{layers}x{width}",
        f"Does it help a decoder of {layers} layers and width {width}?",
        replace(HALF, layers=layers, width=width, heads=width // 32),
        LRS[:3],
        seeds=6,
        control=False,
    )
    for layers, width in ((3, 96), (4, 128))
]

# The source's figure: at a fixed learning rate, from far below plain's best (0.011) to above it.
LOW_RATES = (1e-3, 2e-3)
RATES = tuple(5e-4 * 2**n for n in range(6))
RATE_ARMS = {
    "plain": HALF,
    "(2, 1)": scaled(2, 1, HALF),
    "uniform (2, 2)": scaled(2, 2, HALF),
    "(1, 2)": scaled(1, 2, HALF),
    "near-null (1.0001, 1)": scaled(NEAR_NULL, 1, HALF),
    "(2, 1), pooled": scaled(2, 1, HALF, projection="pooled"),
    "(1, 2), pooled": scaled(1, 2, HALF, projection="pooled"),
    "(2, 1), feature": scaled(2, 1, HALF, projection="feature"),
    "random subspace (2, 1)": scaled(2, 1, HALF, projection="random"),
    "(3, 1)": scaled(3, 1, HALF),
    "(1, 0.5)": scaled(1, 0.5, HALF),
    "uniform (0.5, 0.5)": scaled(0.5, 0.5, HALF),
}
# The control that says what a gain is worth: plain training at a somewhat higher rate.
RATE_FACTORS = (1.02, 1.05, 1.1, 1.2, 1.5)
ALL_RATES = {f"plain, rate x {factor:g}": factor for factor in RATE_FACTORS}
QK_RATES = {f"plain, Q and K's rate x {factor:g}": factor for factor in RATE_FACTORS}


def at_rate(lr: float, name: str = "rate", steps: int = 300, seeds: int = 16) -> Experiment:
    """Return the comparison at one fixed rate, with the equivalent-rate control at low ones."""
    base = replace(HALF, steps=steps)
    arms = {arm: replace(trial, steps=steps) for arm, trial in RATE_ARMS.items()}
    factors: dict[str, float] = {}
    if steps == HALF.steps and lr in LOW_RATES:
        # The learning rate is set with the seed; until then it tells these arms from plain.
        arms |= {arm: replace(base, lr=factor * lr) for arm, factor in ALL_RATES.items()}
        arms |= {arm: replace(base, qk_lr=factor) for arm, factor in QK_RATES.items()}
        factors = ALL_RATES
    if steps != HALF.steps:
        kept = ("plain", "(2, 1)", "uniform (2, 2)", "(1, 2)", "(2, 1), pooled", "(1, 2), pooled")
        arms = {arm: arms[arm] for arm in kept}
    return Experiment(
        f"{name}-{lr:g}",
        f"Does it help at a fixed learning rate of {lr:g}, for {steps} steps?",
        arms,
        "plain",
        (lr,),
        tuple(range(200, 200 + seeds)),
        lr_factor=factors,
    )


AT_RATE = {lr: at_rate(lr) for lr in RATES}
LONG_AT_RATE = [at_rate(lr, "long-rate", steps=2400, seeds=8) for lr in LOW_RATES]
AT_LOW_RATE = [AT_RATE[lr] for lr in LOW_RATES]


def in_order() -> Iterator[Experiment]:
    """Return parts of the comparisons at fixed rates, in an order that was set beforehand.

    What tells most comes first: low rates, the main arms and their control, half of the seeds.
    """
    main = ["plain", "(2, 1)", "uniform (2, 2)", "(1, 2)"]
    pooled = ["(2, 1), pooled", "(1, 2), pooled"]
    halves = (slice(0, 8), slice(8, 16))
    for half in halves:
        for arms in (main, [*ALL_RATES], pooled, [*QK_RATES]):
            for e in AT_LOW_RATE:
                yield e.part([*dict.fromkeys(["plain", *arms])], half)
    rest = [AT_RATE[lr] for lr in (4e-3, 5e-4, 8e-3, 16e-3)]
    for half in halves:
        yield from (e.part(main, half) for e in rest)
    yield from (e.part(RATE_ARMS, slice(0, 8)) for e in (*AT_LOW_RATE, *rest))
    yield from AT_RATE.values()


QUICK = Experiment(
    "quick",
    "A small part, at one learning rate, in minutes.",
    arms=main_arms(replace(PLAIN, steps=200)),
    baseline="plain",
    lrs=(16e-3,),
    seeds=tuple(range(6)),
)

GROUPS = {
    "primary": [PRIMARY, CONFIRMATION, CONTROLS, SHARES, PATHS, SUBWORDS],
    "grid": [GRID, PLACES, TIME, SETUPS],
    "head-dim": [*HEAD_DIMS, *LENGTHS],
    "optimizers": OPTIMIZERS,
    "muon": [MUON_CONFIRMATION],
    "rivals": [RIVALS],
    "tasks": TASKS,
    "sizes": [*SIZES[:1], *PROTOTYPES, *SIZES[1:]],
    "rates": [*AT_RATE.values()],
    "long-rates": LONG_AT_RATE,
}
# The comparisons of (2, 1) with plain in other settings than the first.
SETTINGS = [SUBWORDS, *HEAD_DIMS, *LENGTHS, *OPTIMIZERS, *TASKS, *SIZES]
EXPERIMENTS = {experiment.name: experiment for group in GROUPS.values() for experiment in group}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="say what there is, and how much of it has been run")
    for name, text in {
        "run": "run experiments; what has been run is not run again",
        "table": "print the tables of experiments that have been run",
        "quick": "run a small part from the start, and print its table",
    }.items():
        command = commands.add_parser(name, help=text)
        if name != "quick":
            command.add_argument(
                "names",
                nargs="*",
                metavar="NAME",
                help="of a group or an experiment, see list; all of them by default",
            )
        if name == "table":
            continue
        command.add_argument("--text", type=Path, metavar="FILE", help="a text to split in two")
        command.add_argument("--train-text", type=Path, metavar="FILE", help="with --valid-text")
        command.add_argument("--valid-text", type=Path, metavar="FILE")
        command.add_argument("--text-name", metavar="NAME", help="what reports call the text")
        command.add_argument("--workers", type=int, default=2, help="runs at once (%(default)s)")
    commands.add_parser("report", help="write docs/evidence.md and its pictures")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="results")
    args = parser.parse_args(argv)
    if args.command in ("run", "quick"):
        if args.text and (args.train_text or args.valid_text):
            parser.error("--text goes without --train-text and --valid-text")
        if (args.train_text is None) != (args.valid_text is None):
            parser.error("--train-text and --valid-text go together")
        if args.workers < 1:
            parser.error("--workers must be at least 1")
    if args.command in ("run", "table"):
        unknown = [name for name in args.names if name not in GROUPS | EXPERIMENTS]
        if unknown:
            names = ", ".join([*GROUPS, *EXPERIMENTS])
            parser.error(f"no group or experiment is named {unknown[0]!r}, only {names}")
    return args


def text_of(args: argparse.Namespace) -> Text:
    """Read the text that was asked for."""
    train = args.text or args.train_text
    if train is None:
        return Text.default()
    return Text.read(args.text_name or train.name, train, args.valid_text)


def to_run(names: Sequence[str]) -> list[Experiment]:
    """Return what to run for groups and experiments by name, parts of an experiment included."""
    found: list[Experiment] = []
    for name in names or GROUPS:
        found += in_order() if name == "rates" else chosen([name])
    return found


def chosen(names: Sequence[str]) -> list[Experiment]:
    """Return the experiments of groups and experiments by name."""
    found: list[Experiment] = []
    for name in names or GROUPS:
        found += GROUPS[name] if name in GROUPS else [EXPERIMENTS[name]]
    return found


def list_experiments(store: Store) -> None:
    """Print the experiments."""
    table = Table("group", "experiment", "runs", "left")
    for group, experiments in GROUPS.items():
        for experiment in experiments:
            left = len(experiment.pending(store))
            table.add_row(group, experiment.name, f"about {experiment.size()}", str(left))
    Console().print(table)


def run_quick(args: argparse.Namespace) -> None:
    """Run the small part and print its table."""
    text = text_of(args)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        run_experiments([QUICK], store, text, args.workers)
        report = Report({"quick": [QUICK]}, store)
        print(f"{text.name}, {len(QUICK.seeds)} paired seeds, 200 steps:\n")
        print(report.table(QUICK))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    args = parse(argv)
    try:
        if args.command == "quick":
            run_quick(args)
            return 0
        store = Store(args.out)
        if args.command == "list":
            list_experiments(store)
        elif args.command == "report":
            write_report(store)
        elif args.command == "table":
            report = Report(GROUPS, store)
            for experiment in chosen(args.names):
                print(f"{experiment.name}: {experiment.question}\n\n{report.table(experiment)}\n")
        else:
            text = text_of(args)
            store.check_text(text)
            run_experiments(to_run(args.names), store, text, args.workers)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130
    return 0


def write_report(store: Store, docs: Path = DOCS) -> None:
    """Write the page and its pictures."""
    report = Report(GROUPS, store, {RIVALS.name: step_times()})
    page = report.page(TEMPLATE.read_text(encoding="utf-8"))
    for name, draw in FIGURES.items():
        if f"(evidence-{name}.png)" in page:
            save(draw(report), docs / f"evidence-{name}.png")
    (docs / "evidence.md").write_text(page, encoding="utf-8")


def step_times() -> dict[str, dict[str, str]]:
    """Return the rivals' step times over plain's, as peers.py measured them, by model and arm."""
    rows = json.loads((RESULTS / "speed" / "peers.json").read_text(encoding="utf-8"))["rows"]
    times: dict[str, dict[str, str]] = {}
    for row in rows:
        arm = "(2, 1)" if row["peer"] == "span-scaled AdamW" else row["peer"]
        times.setdefault(f"step / plain's, {row['case']}", {})[arm] = three(row["ratio"])
    return times


DRAWN = ["(2, 1)", "uniform (2, 2)", "(1, 2)", "(2, 1), pooled", "plain, rate x 1.1"]
FIGURES: dict[str, Callable[[Report], Figure]] = {
    "primary": lambda report: report.forest(PRIMARY),
    "rates": lambda report: report.rates(
        PRIMARY, ["plain", "(2, 1)", "(1.5, 1)", "uniform (2, 2)", "(1, 0): span only"]
    ),
    "confirmation": lambda report: report.forest(CONFIRMATION),
    "paths": lambda report: report.forest(PATHS),
    "shares": lambda report: report.shares(SHARES),
    "grid": lambda report: report.heatmap(GRID, FACTORS),
    "fixed-rates": lambda report: drawn_by_rate([*AT_RATE.values()], DRAWN, report.store),
    "settings": lambda report: report.forest_of_settings(SETTINGS, ["(2, 1)", "uniform (2, 2)"]),
}


if __name__ == "__main__":
    sys.exit(main())
