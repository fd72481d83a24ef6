"""What the study's models are trained to do, and on what."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.models import PADDING, Decoder, Restorer, ViT
from harness.texts import Text, characters, subwords, text_of, windows
from harness.trial import Trial

__all__ = ["TASKS", "Task", "build_task"]

WINDOWS = 256  # of each split
PROBE_WINDOWS = 64  # for the curve
EVAL_BATCH = 32
MASKED_SHARE = 0.15
PRETRAINING_STEPS = 600
PRETRAINING_SEED = 12345


@dataclass
class Task:
    """A model and its data.

    Attributes:
        model: The model.
        batch: Draws a training batch.
        loss: Returns the loss of the model on a batch.
        validate: Returns the mean loss of the model on validation data.
        splits: The validation data by split: ``tuning`` and ``reporting``.
        probe: A part of the reporting split.
    """

    model: nn.Module
    batch: Callable[[np.random.Generator], Any]
    loss: Callable[[Any, Any], Tensor]
    validate: Callable[[Any, Any], float]
    splits: dict[str, Any]
    probe: Any


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats per token, of predicting each next one."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def mean_loss(model: nn.Module, data: Tensor) -> float:
    """Return the mean of :func:`next_token_loss` over all windows."""
    parts = data.split(EVAL_BATCH)
    return math.fsum(next_token_loss(model, part).item() * len(part) for part in parts) / len(data)


def language_model(trial: Trial, train: Tensor, held_out: Tensor, vocabulary: int) -> Task:
    """Return the task of predicting each next token."""
    size = trial.length + 1
    halves = held_out.chunk(2)
    splits = {
        name: windows(half, WINDOWS, size)
        for name, half in zip(("tuning", "reporting"), halves, strict=True)
    }

    def batch(rng: np.random.Generator) -> Tensor:
        starts = torch.from_numpy(rng.integers(0, len(train) - size + 1, trial.batch))
        return train[starts[:, None] + torch.arange(size)]

    probe = windows(halves[1], PROBE_WINDOWS, size)
    model = Decoder(vocabulary, trial)
    return Task(model, batch, next_token_loss, mean_loss, splits, probe)


def predict_characters(trial: Trial, text: Text) -> Task:
    """Return the task of predicting each next character."""
    return language_model(trial, *characters(text))


def predict_subwords(trial: Trial, text: Text) -> Task:
    """Return the task of predicting each next subword."""
    return language_model(trial, *subwords(text))


def fill_masks(trial: Trial, text: Text) -> Task:
    """Return the task of telling characters that are masked, from both sides."""
    train, held_out, vocabulary = characters(text)
    size, mask_token = trial.length, vocabulary
    fixed = np.random.default_rng(0)

    def masked(rows: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        hidden = torch.from_numpy(rng.random(rows.shape) < MASKED_SHARE)
        return rows.masked_fill(hidden, mask_token), rows.masked_fill(~hidden, -100)

    def batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.from_numpy(rng.integers(0, len(train) - size + 1, trial.batch))
        return masked(train[starts[:, None] + torch.arange(size)], rng)

    halves = zip(("tuning", "reporting"), held_out.chunk(2), strict=True)
    splits = {name: masked(windows(half, WINDOWS, size), fixed) for name, half in halves}
    probe = tuple(rows[:PROBE_WINDOWS] for rows in splits["reporting"])
    model = Decoder(vocabulary + 1, trial)
    return Task(model, batch, label_loss, mean_label_loss, splits, probe)


def label_loss(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    """Return the mean cross-entropy, in nats per label; labels of -100 do not count."""
    inputs, labels = batch
    logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def mean_label_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return :func:`label_loss` over all of the data."""
    total, count = 0.0, 0
    for inputs, labels in zip(*(rows.split(EVAL_BATCH) for rows in data), strict=True):
        labels_here = int((labels != -100).sum())
        total += label_loss(model, (inputs, labels)).item() * labels_here
        count += labels_here
    return total / count


def restore_vowels(trial: Trial, text: Text) -> Task:
    """Return the task of writing a text whose vowels were left out: sequence to sequence."""
    train, held_out, vocabulary = characters(text)
    alphabet = np.unique(np.array([*(text.train + text.validation)]))
    is_vowel = torch.tensor([letter in "aeiouAEIOU" for letter in alphabet])
    size = trial.length

    def pairs(rows: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        source = torch.full_like(rows, PADDING)
        for row, kept in zip(rows, source, strict=True):
            consonants = row[~is_vowel[row]] + 1  # 0 is the padding
            kept[: len(consonants)] = consonants
        rows = rows + 1
        before = torch.cat((torch.full_like(rows[:, :1], vocabulary + 1), rows[:, :-1]), 1)
        return (source, before), rows

    def batch(rng: np.random.Generator) -> Any:
        starts = torch.from_numpy(rng.integers(0, len(train) - size + 1, trial.batch))
        return pairs(train[starts[:, None] + torch.arange(size)])

    def validate(model: nn.Module, data: Any) -> float:
        (source, before), labels = data
        parts = zip(*(x.split(EVAL_BATCH) for x in (source, before, labels)), strict=True)
        losses = [label_loss(model, ((s, b), y)).item() * len(y) for s, b, y in parts]
        return math.fsum(losses) / len(labels)

    halves = zip(("tuning", "reporting"), held_out.chunk(2), strict=True)
    splits = {name: pairs(windows(half, WINDOWS, size)) for name, half in halves}
    (source, before), labels = splits["reporting"]
    few = slice(PROBE_WINDOWS)
    probe = (source[few], before[few]), labels[few]
    model = Restorer(vocabulary + 2, trial)
    return Task(model, batch, label_loss, validate, splits, probe)


def classify_digits(trial: Trial, text: Text) -> Task:
    """Return the task of reading scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order]).float()[:, None] / 16
    labels = torch.from_numpy(digits.target[order])
    train, tuning, reporting = (slice(0, 1000), slice(1000, 1400), slice(1400, None))

    def batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(rng.integers(0, train.stop, trial.batch))
        return images[rows], labels[rows]

    splits = {"tuning": (images[tuning], labels[tuning])}
    splits["reporting"] = images[reporting], labels[reporting]
    return Task(ViT(trial), batch, label_loss, mean_label_loss, splits, splits["reporting"])


@lru_cache(maxsize=1)
def pretrained(trial: Trial, text: Text) -> dict[str, Tensor]:
    """Return the weights of a decoder trained by plain AdamW on Python's help topics."""
    help_topics = Text.default()
    both = Text("both", help_topics.train, text.train + text.validation)
    train, _, vocabulary = characters(both)
    torch.manual_seed(PRETRAINING_SEED)
    rng = np.random.default_rng(PRETRAINING_SEED)
    task = language_model(trial, train, train, vocabulary)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=8e-3, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING_STEPS)
    for _ in range(PRETRAINING_STEPS):
        optimizer.zero_grad()
        next_token_loss(task.model, task.batch(rng)).backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        rates.step()
    return task.model.state_dict()


def fine_tune(trial: Trial, text: Text) -> Task:
    """Return the task of going on, on this text, with a model trained on another."""
    with torch.random.fork_rng():
        weights = pretrained(Trial(task="fine-tuning", **shape(trial)), text)
    help_topics = Text.default()
    _, tokens, vocabulary = characters(
        Text("both", help_topics.train, text.train + text.validation)
    )
    train, held_out = tokens.split([len(text.train), len(text.validation)])
    task = language_model(trial, train, held_out, vocabulary)
    task.model.load_state_dict(weights)
    return task


def shape(trial: Trial) -> dict[str, Any]:
    """Return the settings of a trial that its model depends on."""
    names = ("model", "batch", "length", "layers", "width", "heads")
    return {name: getattr(trial, name) for name in names}


TASKS: dict[str, Callable[[Trial, Text], Task]] = {
    "characters": predict_characters,
    "subwords": predict_subwords,
    "masked": fill_masks,
    "sequence-to-sequence": restore_vowels,
    "digits": classify_digits,
    "fine-tuning": fine_tune,
}


def build_task(trial: Trial, text: Text) -> Task:
    """Return the trial's model, initialised from the current random state, and its data."""
    if trial.task not in TASKS:
        raise ValueError(f"no task is named {trial.task!r}, only {', '.join(TASKS)}")
    return TASKS[trial.task](trial, text_of(trial.text, text))
