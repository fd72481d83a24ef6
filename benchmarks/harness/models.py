"""The models that the study trains."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.trial import Trial
from spanopt import span_node

__all__ = ["PADDING", "Decoder", "Restorer", "ViT"]

BIDIRECTIONAL = ("masked", "digits")
PADDING = 0


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial
        if trial.separate:
            self.q, self.k, self.v = (nn.Linear(trial.width, trial.width) for _ in range(3))
        else:
            self.qkv = nn.Linear(trial.width, 3 * trial.width)
        self.out = nn.Linear(trial.width, trial.width)
        if trial.projection == "random-input":
            drawn = torch.Generator().manual_seed(trial.seed)
            weight = torch.randn(self.weights()[0].shape, generator=drawn)
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
        q, k, v = self.project(x, *self.weights())
        if self.trial.in_model:
            q, k = self.separated(x) if self.trial.path != "both" else self.controlled(x, q, k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.trial.task not in BIDIRECTIONAL)
        return self.out(y.transpose(1, 2).flatten(2))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return the weight (3 D, D) and the bias (3 D) that give Q, K and V."""
        if not self.trial.separate:
            return self.qkv.weight, self.qkv.bias
        parts = self.q, self.k, self.v
        return torch.cat([x.weight for x in parts]), torch.cat([x.bias for x in parts])

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
        weight, bias = self.weights()
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
        spans = self.project(x.detach(), self.random_weight, torch.zeros(len(self.random_weight)))[
            :2
        ]
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
