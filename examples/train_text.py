"""Train a small character-level GPT with a plain optimizer and with the same one span-scaled.

Both arms start from the same weights and see the same batches. They are trained in lockstep, one
step each, so that the step times are measured side by side. Everything random is derived from
(seed, step): a run that was killed and goes on with ``--resume`` ends with the same losses, bit for
bit. What a training script of your own needs is in ``build_arm``; the model knows nothing of it.
The options, the text, the checkpoint and the table are in ``text_demo`` beside this script.

``--parallel 2 --violation 2`` is the control that scales the whole gradient of Q and K alike.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from rich.console import Console
from text_demo.errors import UserError, one_line
from text_demo.model import Decoder
from text_demo.optimizers import find_optimizer, needs_closure, needs_second_order
from text_demo.options import DEFAULT_LR, Config, parse
from text_demo.progress import Display
from text_demo.results import report
from text_demo.resuming import ARMS, Record, Run, load_checkpoint, save_checkpoint
from text_demo.texts import Data, dataset_text, default_text, encode, file_text
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spanopt import SpanScale, SpanScaledOptimizer

CLIP = 1.0


@dataclass
class Arm:
    """One of the two trainings that are compared."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    needs_closure: bool
    second_order: bool
    loss: float = 0.0  # of the latest batch; once it is not finite the arm trains no further

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the training depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss = state["loss"]


def build_arm(name: str, model: Decoder, config: Config) -> Arm:
    """Give a model its optimizer; the arm "span" wraps it."""
    cls = find_optimizer(config.optimizer)
    options = {} if config.lr is None else {"lr": config.lr}
    optimizer = cls(model.parameters(), **options)  # type: ignore[arg-type]
    if name == "span":
        scale = SpanScale(parallel=config.parallel, violation=config.violation)
        optimizer = SpanScaledOptimizer(optimizer, model, scales={"*": scale})
    return Arm(model, optimizer, needs_closure(cls), needs_second_order(cls))


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


def train_seed(run: Run, seed: int, states: dict[str, Any] | None, display: Display) -> None:
    """Train one seed, from its beginning or from the states of a checkpoint."""
    arms = build_arms(run.config, run.data.vocabulary, seed)
    if states is None:
        run.records.append(Record())
        note_losses(run, arms, 0)
    else:
        restore(arms, states)
    for step in range(run.records[seed].steps[-1], run.config.steps):
        train_pair(arms, run, seed, step)
        done = step + 1
        if done % run.config.eval_every == 0 or done == run.config.steps:
            note_losses(run, arms, done)
            save_checkpoint(run, {name: arm.state() for name, arm in arms.items()})
        display.show(run, {name: arm.loss for name, arm in arms.items()}, done)


def restore(arms: dict[str, Arm], states: dict[str, Any]) -> None:
    """Go on from the states of a checkpoint."""
    for name, arm in arms.items():
        try:
            arm.load_state(states[name])
        except Exception as error:  # a state that fits in another way raises another kind
            message = f"the checkpoint does not fit the arm {name}: {one_line(error)}"
            raise UserError(message) from error


def note_losses(run: Run, arms: dict[str, Arm], step: int) -> None:
    """Add a point to both validation curves."""
    record = run.records[-1]
    record.steps.append(step)
    for name, arm in arms.items():
        record.losses[name].append(evaluate(arm, run.data.windows))


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


def execute(args: Namespace) -> None:
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
    args = parse(argv, __doc__.partition("\n")[0])
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
