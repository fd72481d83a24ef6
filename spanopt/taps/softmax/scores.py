"""What is known of score matrices while a layer runs: their products, axes and masks."""

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
        x: The tensor, shape ``(B, ..., L, d)``.
        node: The tensor with a switched node on it.
        switches: The switch of the node and its real tokens; ``None`` if there is no node.
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
        swapped: Empty until a softmax tells the sides; then one entry, whether the left operand
            is the keys.
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
        read: What the masks so far show, with the left operand's tokens as rows.
        widened: Whether further keys were put before the others. Later masks then do not fit.
        signs: Whether these are only the signs of scores, which no gradient goes through.
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
        """Return the same knowledge with other axes, for scores that were reshaped or permuted."""
        return Scores(self.products, axes, self.read, self.widened, self.signs)


WEIGHTS = Scores()
"""What is known of the result of a softmax over scores."""


def scores_of(tap: Tap, x: Any) -> Scores | None:
    """Return what is known of a tensor that is scores or weights; ``None`` for other tensors."""
    call = tap.current_call()
    scores = None if call is None else call.scores.of(x)
    if scores is not None or call is None or torch.compiler.is_compiling():
        return scores
    if not isinstance(x, Tensor) or x.grad_fn is None or call.streams.knows(x):
        return None
    # A function that no mode sees made this tensor, such as one of torch.jit.script.
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
    """Note that a result is scores and comes from a product of activations, and return it."""
    tap.streams().note_scores(result)
    return carry(tap, result, scores)


def together(a: Scores, b: Scores) -> Scores:
    """Return what is known of the sum of two score matrices."""
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
