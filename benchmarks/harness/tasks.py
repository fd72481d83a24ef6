"""Models and what they are trained on."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from harness.trial import Trial
from spanopt import span_node

__all__ = ["TASKS", "Decoder", "Task", "Text", "build_task"]

BIDIRECTIONAL = ("masked", "digits")
WINDOWS = 256  # of each split
PROBE_WINDOWS = 64  # for the curve
EVAL_BATCH = 32
SUBWORDS = 1024
MASKED_SHARE = 0.15
PADDING = 0
PRETRAINING_STEPS = 600
PRETRAINING_SEED = 12345


@dataclass(frozen=True)
class Text:
    """A text to train on and one to validate on.

    Attributes:
        name: What reports call it.
        train: The first.
        validation: The second. Its first half is the tuning split, its second the reporting split.
    """

    name: str
    train: str
    validation: str

    @property
    def digest(self) -> str:
        """SHA-256 of both."""
        both = f"{len(self.train)}:{self.train}{self.validation}"
        return hashlib.sha256(both.encode()).hexdigest()

    @classmethod
    def default(cls) -> Text:
        """Return Python's own help topics, English text that every Python ships."""
        from pydoc_data.topics import topics

        return cls.split("Python's help topics", "\n".join(topics.values()))

    @classmethod
    def split(cls, name: str, text: str) -> Text:
        """Split a text by position: the last fifth is for validation."""
        cut = round(len(text) * 0.8)
        return cls(name, text[:cut], text[cut:])

    @classmethod
    def read(cls, name: str, train: Path, validation: Path | None) -> Text:
        """Read one UTF-8 file and split it, or two."""
        text = train.read_text(encoding="utf-8")
        if validation is None:
            return cls.split(name, text)
        return cls(name, text, validation.read_text(encoding="utf-8"))


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


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial
        self.qkv = nn.Linear(trial.width, 3 * trial.width)
        self.out = nn.Linear(trial.width, trial.width)
        if trial.projection == "random-input":
            drawn = torch.Generator().manual_seed(trial.seed)
            weight = torch.randn(self.qkv.weight.shape, generator=drawn)
            self.random_weight: Tensor
            self.register_buffer("random_weight", weight, persistent=False)
        if trial.model == "rotary":
            cos, sin = rotary_angles(trial.length, trial.width // trial.heads)
            self.cos: Tensor
            self.sin: Tensor
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        q, k, v = self.project(x, self.qkv.weight, self.qkv.bias)
        if self.trial.in_model:
            q, k = self.separated(x) if self.trial.path != "both" else self.controlled(x, q, k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.trial.task not in BIDIRECTIONAL)
        return self.out(y.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K and V, each (B, H, N, d)."""
        q, k, v = (
            part.unflatten(-1, (self.trial.heads, -1)).transpose(1, 2)
            for part in F.linear(x, weight, bias).chunk(3, dim=-1)
        )
        if self.trial.model == "rotary":
            q, k = (rotate(part, self.cos, self.sin) for part in (q, k))
        return q, k, v

    def separated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q and K, their gradient scaled on only one of its two ways on."""
        weight, bias = self.qkv.weight, self.qkv.bias
        to_weights = self.project(x.detach(), weight, bias)[:2]
        to_inputs = self.project(x, weight.detach(), bias.detach())[:2]
        scales = self.trial.parallel, self.trial.violation
        sides = []
        for of_weights, of_inputs in zip(to_weights, to_inputs, strict=True):
            a, b = of_weights, of_inputs
            if self.trial.path == "weights":
                a = span_node(a, *scales)
            else:
                b = span_node(b, *scales)
            sides.append(a + (b - of_inputs.detach()))  # the second term is exactly 0
        q, k = sides
        return q, k

    def controlled(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q and K, their gradient scaled by the spans of random projections of the input."""
        spans = self.project(x.detach(), self.random_weight, torch.zeros_like(self.qkv.bias))[:2]
        scales = self.trial.parallel, self.trial.violation
        q, k = (
            span_node(side, *scales, projection="cross", other=span)
            for side, span in zip((q, k), spans, strict=True)
        )
        return q, k


def rotary_angles(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of rotary positions, each (N, d)."""
    frequencies = 1e4 ** (-torch.arange(0, size, 2) / size)
    angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys, (..., N, d), by their position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        width = trial.width
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(trial)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A GPT-like language model.

    ``model="rotary"`` has rotary positions, a head of its own and the residual branches scaled down
    at the start; ``"learned"`` has learned positions, a head tied to the embedding and PyTorch's
    own initialisation.
    """

    def __init__(self, vocabulary: int, trial: Trial) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, trial.width)
        self.blocks = nn.Sequential(*(Block(trial) for _ in range(trial.layers)))
        self.norm = nn.LayerNorm(trial.width)
        self.head = nn.Linear(trial.width, vocabulary, bias=False)
        self.positions: nn.Embedding | None = None
        if trial.model == "learned":
            self.positions = nn.Embedding(trial.length, trial.width)
            self.head.weight = self.tokens.weight
            for embedding in (self.tokens, self.positions):
                nn.init.normal_(embedding.weight, std=0.02)
        else:
            self.scale_down(trial)

    def scale_down(self, trial: Trial) -> None:
        """Initialise weights by width and depth."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                branch = name.endswith(("attention.out.weight", "mlp.2.weight"))
                depth = math.sqrt(2 * trial.layers) if branch else 1
                nn.init.normal_(parameter, std=0.5 * trial.width**-0.5 / depth)
            elif not name.endswith("norm.weight"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits at every position."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@lru_cache(maxsize=4)
def characters(text: Text) -> tuple[Tensor, Tensor, int]:
    """Number the characters: of the training text, of the validation text, and how many."""
    raw = np.frombuffer((text.train + text.validation).encode("utf-32-le"), dtype=np.uint32)
    alphabet, codes = np.unique(raw, return_inverse=True)
    tokens = torch.from_numpy(codes.astype(np.int64))
    return tokens[: len(text.train)], tokens[len(text.train) :], len(alphabet)


def windows(tokens: Tensor, count: int, size: int) -> Tensor:
    """Cut evenly spaced windows out of a text, shape (count, size)."""
    if len(tokens) < size:
        raise ValueError(f"the text is too short: {len(tokens)} tokens, at least {size} are needed")
    count = min(count, len(tokens) // size)
    starts = torch.linspace(0, len(tokens) - size, count).long()
    return tokens[starts[:, None] + torch.arange(size)]


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


@lru_cache(maxsize=4)
def subwords(text: Text) -> tuple[Tensor, Tensor, int]:
    """Tokenise by byte-pair encoding learnt from the training text, as :func:`characters`."""
    tokenizer = ByteLevelBPETokenizer()
    options = {"vocab_size": SUBWORDS, "min_frequency": 2, "show_progress": False}
    tokenizer.train_from_iterator([text.train], **options)
    train, validation = (
        torch.tensor(tokenizer.encode(part).ids) for part in (text.train, text.validation)
    )
    return train, validation, tokenizer.get_vocab_size()


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


class Restorer(nn.Module):
    """``nn.Transformer``, with padding: reads a text without vowels and writes it with them."""

    def __init__(self, vocabulary: int, trial: Trial) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, trial.width)
        self.positions = nn.Embedding(trial.length + 1, trial.width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.5 * trial.width**-0.5)
        with warnings.catch_warnings():  # of no use in pre-norm layers: nested tensors
            warnings.filterwarnings("ignore", message="enable_nested_tensor")
            self.transformer = nn.Transformer(
                trial.width,
                trial.heads,
                trial.layers,
                trial.layers,
                4 * trial.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
        self.head = nn.Linear(trial.width, vocabulary, bias=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return (B, N, D) for (B, N)."""
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the logits of each next character of the target."""
        source, target = batch
        padding = source == PADDING
        future = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        y = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=future.to(target.device),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return self.head(y)


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


class ViT(nn.Module):
    """A vision transformer over patches of 2 x 2 pixels."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, trial.width, kernel_size=2, stride=2)
        self.label = nn.Parameter(torch.zeros(trial.width))
        self.positions = nn.Parameter(0.02 * torch.randn(17, trial.width))
        self.blocks = nn.Sequential(*(Block(trial) for _ in range(trial.layers)))
        self.norm = nn.LayerNorm(trial.width)
        self.head = nn.Linear(trial.width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, 10) of images (B, 1, 8, 8)."""
        x = self.patches(images).flatten(2).mT
        x = torch.cat((self.label.expand(len(x), 1, -1), x), dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


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
    return TASKS[trial.task](trial, text)
