"""Tasks of the paper on semantic focus, drawn anew: tokens in, one class for each sequence out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TASKS", "Task"]


class Task(NamedTuple):
    """A task: sequences of one length and a class for each.

    Attributes:
        draw: ``draw(random, length)`` returns the tokens of one sequence and its class.
        tokens: Number of different tokens, with that for padding, which is 0.
        classes: Number of classes.
    """

    draw: Callable[[random.Random, int], tuple[list[int], int]]
    tokens: int
    classes: int

    def sample(self, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw sequences: tokens ``(count, length)`` and classes ``(count,)``."""
        generator = random.Random(seed)
        drawn = [self.draw(generator, length) for _ in range(count)]
        padded = [tokens + [0] * (length - len(tokens)) for tokens, _ in drawn]
        return torch.tensor(padded), torch.tensor([target for _, target in drawn])


def _parity(generator: random.Random, length: int) -> tuple[list[int], int]:
    bits = generator.choices((0, 1), k=length)
    return [1 + bit for bit in bits], sum(bits) % 2


def _even_pairs(generator: random.Random, length: int) -> tuple[list[int], int]:
    bits = generator.choices((0, 1), k=length)
    return [1 + bit for bit in bits], sum(a != b for a, b in itertools.pairwise(bits)) % 2


def _missing_duplicate(generator: random.Random, length: int) -> tuple[list[int], int]:
    bits = generator.choices((0, 1), k=length // 2) * 2
    at = generator.randrange(len(bits))
    tokens = [1 + bit for bit in bits]
    tokens[at] = 3
    return tokens, bits[at]


def _cycle_navigation(generator: random.Random, length: int) -> tuple[list[int], int]:
    moves = generator.choices((0, 1, -1), k=length)
    return [2 + move for move in moves], sum(moves) % 5


def _stack_manipulation(generator: random.Random, length: int) -> tuple[list[int], int]:
    """A stack of bits, bottom first, and then actions on it: the top bit at the end, 2 if empty."""
    stack = generator.choices((0, 1), k=generator.randrange(1, length))
    actions = generator.choices((0, 1, 2), k=length - len(stack))
    tokens = [1 + bit for bit in stack] + [3 + action for action in actions]
    for action in actions:
        if action < 2:
            stack.append(action)
        elif stack:
            stack.pop()
    return tokens, stack[-1] if stack else 2


_SIGNS = {"+": 6, "-": 7, "*": 8, "(": 9, ")": 10, "=": 11, "x": 12}


def _expression(generator: random.Random, length: int) -> tuple[list[str], int]:
    """Draw an expression modulo 5 in brackets, of exactly so many tokens: 1, 5, 9 or more."""
    if length < 5:
        number = generator.randrange(5)
        return [str(number)], number
    left = 1 + 4 * generator.randrange((length - 1) // 4)
    (a, x), (b, y) = _expression(generator, left), _expression(generator, length - 4 - left + 1)
    sign = generator.choice("+-*")
    value = {"+": x + y, "-": x - y, "*": x * y}[sign] % 5
    return ["(", *a, sign, *b, ")"], value


def _numbered(tokens: list[str]) -> list[int]:
    return [_SIGNS.get(token) or 1 + int(token) for token in tokens]


def _modular_arithmetic(generator: random.Random, length: int) -> tuple[list[int], int]:
    tokens, value = _expression(generator, (length - 1) // 4 * 4 + 1)
    return _numbered(tokens), value


def _solve_equation(generator: random.Random, length: int) -> tuple[list[int], int]:
    """An expression with one number hidden, and its value; other numbers may solve it too."""
    tokens, value = _expression(generator, (length - 3) // 4 * 4 + 1)
    at = generator.choice([i for i, token in enumerate(tokens) if token.isdigit()])
    hidden, tokens[at] = int(tokens[at]), "x"
    return _numbered([*tokens, "=", str(value)]), hidden


def _listops(generator: random.Random, length: int) -> tuple[list[int], int]:
    """Nested MIN, MAX, MED and SM (sum modulo 10) of digits, shorter than in the paper."""
    while True:
        tokens, value = _list(generator, 3)
        if length // 3 <= len(tokens) <= length:
            return tokens, value


def _list(generator: random.Random, depth: int) -> tuple[list[int], int]:
    operation = generator.randrange(4)
    tokens, values = [11 + operation], []
    for _ in range(generator.randint(2, 5)):
        if depth > 1 and generator.random() < 0.4:
            inner, value = _list(generator, depth - 1)
        else:
            value = generator.randrange(10)
            inner = [1 + value]
        tokens += inner
        values.append(value)
    values.sort()
    results = values[0], values[-1], values[len(values) // 2], sum(values) % 10
    return [*tokens, 15], results[operation]


TASKS = {
    "parity": Task(_parity, 3, 2),
    "even-pairs": Task(_even_pairs, 3, 2),
    "missing-duplicate": Task(_missing_duplicate, 4, 2),
    "stack-manipulation": Task(_stack_manipulation, 6, 3),
    "cycle-navigation": Task(_cycle_navigation, 4, 5),
    "modular-arithmetic": Task(_modular_arithmetic, 13, 5),
    "solve-equation": Task(_solve_equation, 13, 5),
    "listops": Task(_listops, 16, 10),
}
