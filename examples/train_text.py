"""Train a small character-level GPT with a plain optimizer and with the same one span-scaled.

Both arms start from the same weights and see the same batches. They are trained in lockstep, one
step each, so that the step times are measured side by side. Everything random is derived from
(seed, step): a run that was killed and goes on with ``--resume`` ends with the same losses, bit for
bit.

Here is the training loop. Beside it, in ``text_demo``, are the model, the arms (``build_arm`` has
all that a script of your own needs), the options, the text, the checkpoint and the table.

``--parallel 2 --violation 2`` is the control that scales the whole gradient of Q and K alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from text_demo import running
from text_demo.arms import Arm, build_arms, evaluate, restore, train_step
from text_demo.progress import Display
from text_demo.resuming import ARMS, Record, Run, save_checkpoint


def train_seed(run: Run, seed: int, states: dict[str, Any] | None, display: Display) -> None:
    """Train one seed, from its beginning or from the states of a checkpoint."""
    config = run.config
    arms = build_arms(config, run.data.vocabulary, seed)
    if states is None:
        run.records.append(Record())
        note_losses(run, arms, 0)
    else:
        restore(arms, states)
    record = run.records[seed]
    for step in range(record.steps[-1], config.steps):
        rng = np.random.default_rng([seed, step])
        windows = run.data.batch(config, rng)
        noise = int(rng.integers(2**31))  # for optimizers that draw random numbers
        seconds = {}
        for name in ARMS if step % 2 == 0 else ARMS[::-1]:  # they take turns in going first
            if arms[name].trains:
                torch.manual_seed(noise)
                start = time.perf_counter()
                train_step(arms[name], windows)
                seconds[name] = time.perf_counter() - start
        if len(seconds) == len(ARMS):
            for name in ARMS:
                record.seconds[name].append(seconds[name])
        done = step + 1
        if done % config.eval_every == 0 or done == config.steps:
            note_losses(run, arms, done)
            save_checkpoint(run, {name: arm.state() for name, arm in arms.items()})
        display.show(run, {name: arm.loss for name, arm in arms.items()}, done)


def note_losses(run: Run, arms: dict[str, Arm], step: int) -> None:
    """Add a point to both validation curves."""
    record = run.records[-1]
    record.steps.append(step)
    for name, arm in arms.items():
        record.losses[name].append(evaluate(arm, run.data.windows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return running.main(train_seed, argv, __doc__.partition("\n")[0])


if __name__ == "__main__":
    sys.exit(main())
