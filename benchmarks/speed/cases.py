"""The models whose training steps are measured, built from shapes alone with random weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CASES", "Case", "Setting", "add_cases", "build", "chosen", "training_step"]


@dataclass(frozen=True)
class Case:
    """A stack of transformer blocks without embeddings, which span scaling costs nothing.

    Attributes:
        name: What reports call it.
        kind: ``"decoder"`` (GPT-like, causal), ``"gqa"`` (Llama-like: rotary positions, grouped
            keys, SwiGLU), ``"vit"`` (not causal) or ``"encoder"`` (``nn.TransformerEncoder``,
            with padding).
        width: D.
        heads: Query heads; d = width / heads.
        length: Tokens in a sequence, N.
        batch: Sequences in a batch.
        layers: Blocks.
        kv_heads: Heads of keys and values, if fewer.
        target: What the ratio of a wrapped step to a plain one is to be at most.
        compiled_target: The same for compiled models.
    """

    name: str
    kind: str
    width: int
    heads: int
    length: int
    batch: int
    layers: int = 2
    kv_heads: int | None = None
    target: float = 1.025
    compiled_target: float = 1.025

    @property
    def small(self) -> bool:
        """Whether steps are short and noisy, so that there can and should be more of them."""
        return self.width < 256

    def target_of(self, *, compiled: bool) -> float:
        """Return what the ratio of a wrapped step to a plain one is to be at most."""
        return self.compiled_target if compiled else self.target

    @property
    def key_heads(self) -> int:
        """Number of key heads."""
        return self.kv_heads or self.heads

    def step_flops(self, parameters: int) -> float:
        """Return the floating-point operations of a training step, the optimizer's left out.

        Args:
            parameters: Number of weights in matrices.

        Returns:
            6 for each weight and token, and 12 N D for each token and layer in attention, half of
            that where it is causal.
        """
        tokens = self.batch * self.length
        attention = 12 * self.length * self.width * self.layers
        causal = self.kind in ("decoder", "gqa")
        return tokens * (6 * parameters + attention * (0.5 if causal else 1))

    def projection_flops(self, *, one_solve: bool) -> float:
        """Return the floating-point operations of all projections in a step.

        Args:
            one_solve: With one Gram matrix and one Cholesky solve, 6 N d^2 + 7/3 d^3 a head, which
                loses digits; otherwise as computed, 10 N d^2 + 11/3 d^3.
        """
        d = self.width // self.heads
        by_tokens, by_features = (6, 7 / 3) if one_solve else (10, 11 / 3)
        of_head = (by_tokens * self.length + by_features * d) * d**2
        return self.layers * self.batch * (self.heads + self.key_heads) * of_head


CASES = {
    case.name: case
    for case in (
        *(
            Case(
                f"decoder N={n}",
                "decoder",
                width=768,
                heads=12,
                length=n,
                batch=2048 // n,
                target=1.05 if n == 128 else 1.025,
                compiled_target=1.05 if n == 128 else 1.025,
            )
            for n in (128, 512, 1024, 2048)
        ),
        Case(
            "Llama-like GQA", "gqa", 1024, 16, 512, 2, kv_heads=4, target=1.02, compiled_target=1.02
        ),
        Case("ViT-B/16", "vit", 768, 12, 197, 8, target=1.045, compiled_target=1.045),
        Case("padded encoder", "encoder", 768, 12, 256, 8, target=1.045, compiled_target=1.045),
        Case("demo", "decoder", 96, 3, 128, 8, layers=3, target=1.15, compiled_target=1.10),
    )
}


@dataclass
class Setting:
    """A model, what it is given and its loss.

    Attributes:
        model: The model.
        x: Its input, (B, N, D).
        call: Calls the model.
    """

    model: nn.Module
    x: Tensor
    call: Callable[[nn.Module, Tensor], Tensor]

    def loss(self) -> Tensor:
        """Return the loss of the model on its input."""
        return self.call(self.model, self.x).square().mean()


class Attention(nn.Module):
    """Self-attention with grouped keys and rotary positions, if asked for."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.causal, self.heads, self.kv_heads = case.kind != "vit", case.heads, case.key_heads
        d = case.width // case.heads
        self.rotary = case.kind == "gqa"
        bias = not self.rotary
        self.q = nn.Linear(case.width, case.width, bias=bias)
        self.k = nn.Linear(case.width, self.kv_heads * d, bias=bias)
        self.v = nn.Linear(case.width, self.kv_heads * d, bias=bias)
        self.out = nn.Linear(case.width, case.width, bias=bias)
        angles = torch.arange(case.length)[:, None] * 1e4 ** (-torch.arange(0, d, 2) / d)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, heads in (
                (self.q(x), self.heads),
                (self.k(x), self.kv_heads),
                (self.v(x), self.kv_heads),
            )
        )
        if self.rotary:
            q, k = (self.rotate(part) for part in (q, k))
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=self.heads != self.kv_heads
        )
        return self.out(y.transpose(1, 2).flatten(-2))

    def rotate(self, x: Tensor) -> Tensor:
        """Turn queries or keys by their position."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class GPTAttention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.heads = case.heads
        self.qkv = nn.Linear(case.width, 3 * case.width)
        self.out = nn.Linear(case.width, case.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """The feed-forward part of a Llama-like block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        width = case.width
        norm: Callable[[int], nn.Module] = nn.RMSNorm if case.kind == "gqa" else nn.LayerNorm
        self.attention_norm, self.mlp_norm = norm(width), norm(width)
        self.attention = GPTAttention(case) if case.kind == "decoder" else Attention(case)
        self.mlp: nn.Module = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        if case.kind == "gqa":
            self.mlp = SwiGLU(width, 11 * width // 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def build(case: Case, seed: int = 0) -> Setting:
    """Build the model of a case.

    Args:
        case: The case.
        seed: Of weights and input.

    Returns:
        The model and its input; equal seeds give equal ones.
    """
    torch.manual_seed(seed)
    x = torch.randn(case.batch, case.length, case.width)
    if case.kind != "encoder":
        stack = nn.Sequential(*(Block(case) for _ in range(case.layers)))
        return Setting(stack, x, lambda model, x: model(x))
    layer = nn.TransformerEncoderLayer(
        case.width, case.heads, 4 * case.width, dropout=0.0, batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, case.layers, enable_nested_tensor=False)
    lengths = torch.linspace(case.length // 2, case.length, case.batch).round()
    padding = torch.arange(case.length) >= lengths[:, None]
    return Setting(encoder, x, lambda model, x: model(x, src_key_padding_mask=padding))


def training_step(setting: Setting, optimizer: Any) -> Callable[[], None]:
    """Return a function that takes one training step: forward, backward, update."""

    def step() -> None:
        optimizer.zero_grad()
        setting.loss().backward()
        optimizer.step()

    return step


def add_cases(parser: argparse.ArgumentParser) -> None:
    """Add the names of cases to a command line, as ``cases``."""
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")


def chosen(
    parser: argparse.ArgumentParser, names: Iterable[str], default: Iterable[str] = CASES
) -> list[Case]:
    """Return the cases of a command line."""
    names = list(names) or list(default)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no case is named {unknown[0]!r}, only {', '.join(CASES)}")
    return [CASES[name] for name in names]
