"""Train a small character-level GPT with a plain optimizer and with the same one span-scaled.

Both arms start from the same weights and see the same batches. They are trained in lockstep, one
step each, so that the step times are measured side by side. Everything random is derived from
(seed, step): a run that was killed and goes on with ``--resume`` ends with the same losses, bit for
bit. What a training script of your own needs is in ``build_arm``; the model knows nothing of it.

``--parallel 2 --violation 2`` is the control that scales the whole gradient of Q and K alike.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spanopt import SpanScale, SpanScaledOptimizer

ARMS = ("plain", "span")
CLIP = 1.0
HELD_OUT = 0.1
VALIDATION_WINDOWS = 64
DEFAULT_LR = 2e-3
DATASETS = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
}
NEEDS_SECOND_ORDER = {"Adahessian"}


class UserError(Exception):
    """A mistake that the user can put right; shown as one line, without a traceback."""


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


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm decoder block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A GPT-like language model whose head shares the embedding's weights."""

    def __init__(self, vocabulary: int, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, config.width)
        self.positions = nn.Embedding(config.length, config.width)
        self.blocks = nn.Sequential(
            *(Block(config.width, config.heads) for _ in range(config.layers))
        )
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next character at every position."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats per character, of predicting each next one."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@dataclass(frozen=True)
class Data:
    """Encoded text: training characters, the fixed validation windows, and what identifies it."""

    train: Tensor
    windows: Tensor
    vocabulary: int
    digest: str

    def batch(self, config: Config, rng: np.random.Generator) -> Tensor:
        """Draw training windows of ``length + 1`` characters."""
        starts = rng.integers(0, len(self.train) - config.length, config.batch)
        return self.train[torch.from_numpy(starts)[:, None] + torch.arange(config.length + 1)]


def split(text: str) -> tuple[str, str]:
    """Split a text by position: the last tenth is for validation."""
    cut = round(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def default_text() -> tuple[str, str]:
    """Return Python's own help topics, English text that every Python ships."""
    from pydoc_data.topics import topics

    return split("\n".join(topics.values()))


def file_text(path: Path) -> tuple[str, str]:
    """Read a UTF-8 file."""
    try:
        return split(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def dataset_text(name: str) -> tuple[str, str]:
    """Load a Hugging Face dataset, NAME or NAME:CONFIG, with its own validation split if any."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError("--dataset needs the package datasets: pip install datasets") from error
    path, _, config = DATASETS.get(name.lower(), name).partition(":")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # the hub, the network and the loaders each raise their own kinds
        raise UserError(f"cannot load the dataset {name}: {one_line(error)}") from error
    texts = {
        key: dataset_column(name, splits[key]) for key in ("train", "validation") if key in splits
    }
    if "train" not in texts:
        raise UserError(f"the dataset {name} has no split named train, only {', '.join(splits)}")
    if "validation" in texts:
        return texts["train"], texts["validation"]
    return split(texts["train"])


def dataset_column(name: str, rows: Any) -> str:
    """Join the column ``text`` of one split."""
    if "text" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UserError(f"the dataset {name} has no column named text, only {columns}")
    return "\n".join(rows["text"])


def encode(train: str, validation: str, length: int) -> Data:
    """Number the characters and lay out the validation windows, evenly spaced."""
    for name, part in (("training", train), ("validation", validation)):
        if len(part) <= length:
            raise UserError(
                f"the text is too short: its {name} part has {len(part)} characters,"
                f" --length {length} needs at least {length + 1}"
            )
    raw = (train + validation).encode("utf-32-le")
    alphabet, codes = np.unique(np.frombuffer(raw, dtype=np.uint32), return_inverse=True)
    tokens = torch.from_numpy(codes.astype(np.int64))
    held_out = tokens[len(train) :]
    count = min(VALIDATION_WINDOWS, len(held_out) // (length + 1))
    starts = torch.linspace(0, len(held_out) - length - 1, count).long()
    windows = held_out[starts[:, None] + torch.arange(length + 1)]
    digest = hashlib.sha256(len(train).to_bytes(8, "little") + raw).hexdigest()
    return Data(tokens[: len(train)], windows, len(alphabet), digest)


def optimizer_classes() -> dict[str, type[torch.optim.Optimizer]]:
    """Return every optimizer class by its lower-case name, plain and with its package."""
    found: dict[str, type[torch.optim.Optimizer]] = {}
    for package in ("torch_optimizer", "torch.optim"):  # torch's own class wins a shared name
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue  # torch_optimizer is an optional extra
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
                found[name.lower()] = found[f"{package}.{name}".lower()] = value
    return {name: cls for name, cls in found.items() if cls is not torch.optim.Optimizer}


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """Look an optimizer up by name, upper or lower case."""
    classes = optimizer_classes()
    if name.lower() in classes:
        return classes[name.lower()]
    plain_names = [key for key in classes if "." not in key]
    near = difflib.get_close_matches(name.lower(), plain_names, n=3, cutoff=0.5)
    names = " or ".join(classes[key].__name__ for key in near) or "AdamW"
    missing = "" if "ranger" in classes else " (torch_optimizer is not installed)"
    raise UserError(f"no optimizer is named {name}{missing}: did you mean {names}?")


@dataclass
class Arm:
    """One of the two trainings that are compared."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    needs_closure: bool
    second_order: bool
    loss: float = 0.0  # of the latest batch; once it is not finite the arm trains no further


def build_arm(name: str, model: Decoder, config: Config) -> Arm:
    """Give a model its optimizer; the arm "span" wraps it."""
    cls = find_optimizer(config.optimizer)
    options = {} if config.lr is None else {"lr": config.lr}
    optimizer = cls(model.parameters(), **options)  # type: ignore[arg-type]
    if name == "span":
        scale = SpanScale(parallel=config.parallel, violation=config.violation)
        optimizer = SpanScaledOptimizer(optimizer, model, scales={"*": scale})
    closure = inspect.signature(cls.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    return Arm(model, optimizer, needs_closure, cls.__name__ in NEEDS_SECOND_ORDER)


def build_arms(config: Config, vocabulary: int, seed: int) -> dict[str, Arm]:
    """Build both arms from the same initial weights."""
    torch.manual_seed(seed)
    initial = Decoder(vocabulary, config)
    return {name: build_arm(name, copy.deepcopy(initial), config) for name in ARMS}


def train_step(arm: Arm, windows: Tensor) -> None:
    """Take one optimizer step, unless the arm has diverged."""

    def closure() -> Tensor:
        arm.optimizer.zero_grad()
        loss = arm.model.loss(windows)
        loss.backward(create_graph=arm.second_order)
        nn.utils.clip_grad_norm_(arm.model.parameters(), CLIP)
        return loss

    # of the attention kernels only this one can be differentiated twice
    twice = sdpa_kernel(SDPBackend.MATH) if arm.second_order else contextlib.nullcontext()
    with twice:
        if arm.needs_closure:
            arm.loss = arm.optimizer.step(closure).item()  # type: ignore
            return
        arm.loss = closure().item()
        if math.isfinite(arm.loss):
            arm.optimizer.step()


@torch.no_grad()
def evaluate(arm: Arm, windows: Tensor) -> float:
    """Return the validation loss in nats per character, NaN for an arm that has diverged."""
    if not math.isfinite(arm.loss):
        return math.nan
    arm.model.eval()
    losses = [arm.model.loss(part).item() * len(part) for part in windows.split(16)]
    arm.model.train()
    return math.fsum(losses) / len(windows)


def train_pair(arms: dict[str, Arm], run: Run, seed: int, step: int) -> None:
    """Take the same step in both arms and note the times; they take turns in going first."""
    rng = np.random.default_rng([seed, step])
    windows = run.data.batch(run.config, rng)
    noise = int(rng.integers(2**31))
    seconds = {}
    for name in ARMS if step % 2 == 0 else ARMS[::-1]:
        if math.isfinite(arms[name].loss):
            torch.manual_seed(noise)  # for optimizers that draw random numbers
            start = time.perf_counter()
            train_step(arms[name], windows)
            seconds[name] = time.perf_counter() - start
    if len(seconds) == len(ARMS):
        for name in ARMS:
            run.records[seed].seconds[name].append(seconds[name])


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


def both() -> dict[str, list[float]]:
    """Return an empty list for each arm."""
    return {name: [] for name in ARMS}


@dataclass
class Record:
    """What is kept of one seed: both validation curves, and the seconds of each step."""

    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=both)
    seconds: dict[str, list[float]] = field(default_factory=both)


@dataclass
class Run:
    """The whole job: one record for every seed begun."""

    config: Config
    data: Data
    out: Path
    records: list[Record] = field(default_factory=list)

    def steps_done(self) -> int:
        """Return how many steps of each arm are behind, over all seeds."""
        return sum(record.steps[-1] for record in self.records)

    def identity(self) -> dict[str, Any]:
        """Return all that has to be the same when a run is resumed."""
        versions = {"torch": str(torch.__version__), "text (sha256)": self.data.digest}
        return asdict(self.config) | versions


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one go: whoever reads it finds the old content or the new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(run: Run, arms: dict[str, Arm]) -> None:
    """Write everything that the rest of the run depends on."""
    states = {
        name: {
            "model": arm.model.state_dict(),
            "optimizer": arm.optimizer.state_dict(),
            "loss": arm.loss,
        }
        for name, arm in arms.items()
    }
    records = [asdict(record) for record in run.records]
    buffer = io.BytesIO()
    torch.save({"identity": run.identity(), "records": records, "arms": states}, buffer)
    write_atomically(run.out / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(run: Run) -> dict[str, Any] | None:
    """Read the checkpoint, fill in the records, and return the states of the arms."""
    path = run.out / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, weights_only=True)
        identity, records, states = saved["identity"], saved["records"], saved["arms"]
    except Exception as error:  # a damaged file can fail in many ways
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    wanted = run.identity()
    differing = [key for key in wanted | identity if wanted.get(key) != identity.get(key)]
    if differing:
        listed = ", ".join(f"{k}: {identity.get(k)}, now {wanted.get(k)}" for k in differing)
        raise UserError(f"{path} belongs to another run ({listed}); leave out --resume to restart")
    run.records = [Record(**record) for record in records]
    return states


def train_seed(run: Run, seed: int, states: dict[str, Any] | None, display: Display) -> None:
    """Train one seed, from its beginning or from the states of a checkpoint."""
    arms = build_arms(run.config, run.data.vocabulary, seed)
    if states is None:
        run.records.append(Record())
        note_losses(run, arms, 0)
    else:
        for name, arm in arms.items():
            arm.model.load_state_dict(states[name]["model"])
            arm.optimizer.load_state_dict(states[name]["optimizer"])
            arm.loss = states[name]["loss"]
    for step in range(run.records[seed].steps[-1], run.config.steps):
        train_pair(arms, run, seed, step)
        done = step + 1
        if done % run.config.eval_every == 0 or done == run.config.steps:
            note_losses(run, arms, done)
            save_checkpoint(run, arms)
        display.show(run, arms, done)


def note_losses(run: Run, arms: dict[str, Arm], step: int) -> None:
    """Add a point to both validation curves."""
    record = run.records[-1]
    record.steps.append(step)
    for name, arm in arms.items():
        record.losses[name].append(evaluate(arm, run.data.windows))


class Display:
    """The progress bar over all seeds; without a terminal, a line at every evaluation."""

    def __init__(self, run: Run, console: Console) -> None:
        text = TextColumn("{task.description}")
        left = TimeRemainingColumn(elapsed_when_finished=True)
        self.progress = Progress(BarColumn(20), text, left, console=console, refresh_per_second=4)
        total = run.config.seeds * run.config.steps
        self.task = self.progress.add_task("", total=total, completed=run.steps_done())

    def show(self, run: Run, arms: dict[str, Arm], done: int) -> None:
        """Show the latest training losses, the speed and the time left."""
        config, record = run.config, run.records[-1]
        losses = ", ".join(f"{name} {arm.loss:.3f}" for name, arm in arms.items())
        recent = [seconds for name in ARMS for seconds in record.seconds[name][-20:]]
        speed = config.batch * config.length / statistics.fmean(recent) if recent else 0.0
        status = f"seed {len(run.records)}/{config.seeds}: {losses}, {speed:,.0f} characters/s"
        completed = (len(run.records) - 1) * config.steps + done
        self.progress.update(self.task, completed=completed, description=status)
        if record.steps[-1] == done and not self.progress.console.is_terminal:
            print(f"step {done}/{config.steps}, {status}", flush=True)


def read_result(plain: Sequence[float], span: Sequence[float]) -> str:
    """Say in one line what the final validation losses, one pair a seed, do and do not show."""
    seeds = len(plain)
    diverged = [
        f"{name} diverged in {count} of {seeds} seeds"
        for name, losses in (("plain training", plain), ("span-scaled training", span))
        if (count := sum(not math.isfinite(loss) for loss in losses))
    ]
    if diverged:
        return f"No comparison: {' and '.join(diverged)} (loss not finite); try a lower --lr."
    changes = percent_changes(plain, span)
    mean = statistics.fmean(changes)
    if seeds == 1:
        return (
            f"Span scaling changed the validation loss by {mean:+.2f} % in the only seed: "
            "one seed says nothing about spread, so no conclusion."
        )
    if max(map(abs, changes)) < 0.005:
        return f"No difference: in all {seeds} seeds both arms end within 0.005 % of each other."
    spread = statistics.stdev(changes)
    figures = f"mean {mean:+.2f} %, standard deviation over {seeds} seeds {spread:.2f} %"
    if abs(mean) < spread:
        return f"The difference is inside the seeds' spread ({figures}): no conclusion."
    if min(changes) <= 0 <= max(changes):
        return f"The seeds do not agree on the sign of the change ({figures}): no conclusion."
    verb = "lowered" if mean < 0 else "raised"
    return (
        f"Span scaling {verb} the validation loss in all {seeds} seeds ({figures}); "
        f"by chance alone all would agree 1 time in {2 ** (seeds - 1)}."
    )


def percent_changes(plain: Sequence[float], span: Sequence[float]) -> list[float]:
    """Return the change from plain to span-scaled of each pair, in per cent."""
    return [100 * (b / a - 1) for a, b in zip(plain, span, strict=True)]


def ratio_quartiles(records: Sequence[Record]) -> list[float]:
    """Return the quartiles of the step times' ratio, span-scaled to plain, over paired steps."""
    pairs = [zip(r.seconds["plain"], r.seconds["span"], strict=True) for r in records]
    ratios = [span / plain for pair in pairs for plain, span in pair]
    return np.percentile(ratios, [25, 50, 75]).tolist() if ratios else [math.nan] * 3


def summary(run: Run) -> dict[str, Any]:
    """Gather the results; the losses are exact."""
    plain, span = ([r.losses[name][-1] for r in run.records] for name in ARMS)
    changes = percent_changes(plain, span)
    rows = [
        {
            "seed": seed,
            "plain": plain[seed],
            "span": span[seed],
            "change_percent": changes[seed],
            "step_time_ratio": ratio_quartiles([record])[1],
            "curves": {"steps": record.steps, **record.losses},
        }
        for seed, record in enumerate(run.records)
    ]
    low, median, high = ratio_quartiles(run.records)
    return {
        "config": run.identity(),
        "seeds": rows,
        "mean_change_percent": statistics.fmean(changes),
        "step_time_ratio": {"median": median, "quartiles": [low, high]},
        "reading": read_result(plain, span),
    }


def result_table(results: dict[str, Any]) -> Table:
    """Lay the results out, one row a seed."""
    config = results["config"]
    table = Table(
        title=f"Validation loss (nats per character) after {config['steps']} steps of "
        f"{config['optimizer']}\nparallel {config['parallel']:g}, "
        f"violation {config['violation']:g}"
    )
    for column in ("seed", "plain", "span-scaled", "change", "step time ratio"):
        table.add_column(column, justify="right")
    for row in results["seeds"]:
        losses = (f"{row['plain']:.4f}", f"{row['span']:.4f}")
        change, ratio = f"{row['change_percent']:+.2f} %", f"{row['step_time_ratio']:.3f}"
        table.add_row(str(row["seed"]), *losses, change, ratio)
    table.add_section()
    time_ratio = results["step_time_ratio"]
    low, high = time_ratio["quartiles"]
    ratio = f"{time_ratio['median']:.3f} ({low:.3f} to {high:.3f})"
    table.add_row("mean", "", "", f"{results['mean_change_percent']:+.2f} %", ratio)
    table.caption = "step time ratio: span-scaled to plain, median of paired steps (quartiles)"
    return table


def plot(records: Sequence[Record]) -> bytes:
    """Draw the validation curves of both arms, and their difference, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3})
    figure, (top, bottom) = plt.subplots(
        2, figsize=(8, 6.5), dpi=150, sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    steps = records[0].steps
    curves = {name: np.array([record.losses[name] for record in records]) for name in ARMS}
    change = 100 * (curves["span"] / curves["plain"] - 1)
    lines = [
        (top, curves["plain"], "tab:blue", "-", "plain"),
        (top, curves["span"], "tab:orange", "--", "span-scaled"),
        (bottom, change, "tab:green", "-", "span-scaled against plain"),
    ]
    for axes, values, color, style, label in lines:
        axes.plot(steps, values.T, color=color, linestyle=style, linewidth=0.8, alpha=0.5)
        mean = f"{label}, mean of {len(records)} seeds" if len(records) > 1 else label
        axes.plot(steps, values.mean(0), color=color, linestyle=style, linewidth=2, label=mean)
        axes.legend(loc="best")
    bottom.axhline(0, color="black", linewidth=0.8)
    top.set_ylabel("validation loss\n(nats per character)")
    bottom.set_ylabel("change (%)")
    bottom.set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def report(run: Run, console: Console) -> None:
    """Write results.json and curves.png; print the table and its reading."""
    results = summary(run)
    # JSON has no NaN: a loss that is not finite becomes null
    exact = json.loads(json.dumps(results), parse_constant=lambda _: None)
    write_atomically(run.out / "curves.png", plot(run.records))
    write_atomically(run.out / "results.json", json.dumps(exact, indent=1).encode())
    console.print(result_table(results))
    console.print(results["reading"], highlight=False, soft_wrap=True)
    written = f"Written: {run.out / 'results.json'}, {run.out / 'curves.png'}"
    console.print(written, highlight=False, soft_wrap=True)


def one_line(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
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


def prepare(args: argparse.Namespace) -> tuple[Run, dict[str, Any] | None]:
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


def execute(args: argparse.Namespace) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    args = parse(argv)
    # the cycle it warns of is broken by the next zero_grad
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    try:
        execute(args)
    except UserError as error:
        print(f"train_text.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; --resume goes on from the latest checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
