"""What is known of score matrices while a layer runs: where they came from and how they lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanopt.taps.masks import Read, both, transposed
from spanopt.taps.softmax.axes import PLAIN, Axes, turned
from spanopt.taps.tap import Tap

__all__ = [
    "WEIGHTS",
    "Operand",
    "Product",
    "Scores",
    "carry",
    "carry_product",
    "scores_of",
    "together",
]


class Operand(NamedTuple):
    """One side of a product.

    Attributes:
        x: Shape ``(B, ..., L, d)``.
        node: The same with a node on it.
        switches: Those of the node; ``None`` where there is nothing to do.
        other: The other side, where the projection needs it.
    """

    x: Tensor
    node: Tensor
    switches: tuple[Tensor, Tensor] | None
    other: Tensor | None = None


class Product(NamedTuple):
    """A product of Q and K, or of any two activations.

    Attributes:
        left: The first operand.
        right: The second.
        self_attention: Whether both were computed from the same input of the layer.
        swapped: Empty until a softmax tells; then whether the first operand are the keys.
        of_inputs: Whether both were computed from inputs of the layer.
    """

    left: Operand
    right: Operand
    self_attention: bool
    swapped: list[bool]
    of_inputs: bool


class Scores:
    """What is known of a score matrix, or of its softmax.

    Attributes:
        products: The products that add up to the scores; empty after the softmax.
        axes: The dimensions of the tokens of the left and of the right operand.
        read: What the masks met so far show, of the left operand's tokens by the right one's.
        widened: Further keys were put before the others: masks from here on do not fit.
        signs: They are the signs of scores, which no gradient goes through.
    """

    def __init__(
        self,
        products: tuple[Product, ...] = (),
        axes: Axes = PLAIN,
        read: Read = (),
        widened: bool = False,
        signs: bool = False,
    ) -> None:
        self.products = products
        self.axes = axes
        self.read = read
        self.widened = widened
        self.signs = signs

    def at(self, axes: Axes) -> Scores:
        """Return what is known of the same scores with the tokens in other dimensions."""
        return Scores(self.products, axes, self.read, self.widened, self.signs)


WEIGHTS = Scores()
"""What is known of the result of a softmax over scores."""


def scores_of(tap: Tap, x: Any) -> Scores | None:
    """Return what is known of a tensor as scores, ``None`` where it is none."""
    call = tap.current_call()
    scores = None if call is None else call.scores.of(x)
    if scores is not None or call is None or torch.compiler.is_compiling():
        return scores
    if not isinstance(x, Tensor) or x.grad_fn is None or call.streams.knows(x):
        return None
    # Made by a function that no mode sees, such as one of torch.jit.script.
    scores = call.trail.through_elementwise(x, tap.site.module)
    if scores is not None:
        carry_product(tap, x, scores)
    return scores


def carry(tap: Tap, result: Any, scores: Scores) -> Any:
    """Note that a result is scores, and return it."""
    call = tap.current_call()
    if call is not None and isinstance(result, Tensor):
        call.scores[result] = scores
        if not torch.compiler.is_compiling():
            call.trail.note(result, scores)
    return result


def carry_product(tap: Tap, result: Any, scores: Scores) -> Any:
    """Note that a result is scores that a product has just made, and return it."""
    tap.streams().note_scores(result)
    return carry(tap, result, scores)


def together(a: Scores, b: Scores) -> Scores:
    """Return the sum of two scores, or of a tensor with itself."""
    if a is b:
        return a
    if a.axes == turned(b.axes):  # one of the products is keys by queries
        swapped = tuple(
            Product(product.right, product.left, product.self_attention, [], product.of_inputs)
            for product in b.products
        )
        b = Scores(swapped, a.axes, transposed(b.read), b.widened)
    if a.axes != b.axes:
        return a
    new = [one for one in b.products if not any(one is product for product in a.products)]
    products = (*a.products, *new)
    return Scores(products, a.axes, both(a.read, b.read), a.widened or b.widened)
