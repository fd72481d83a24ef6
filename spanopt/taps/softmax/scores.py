"""What is known of score matrices while a layer runs: their products, axes and masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanopt.taps.masks import Read, both, transposed
from spanopt.taps.softmax.axes import PLAIN, Axes, turned
from spanopt.taps.softmax.terms import Layout, Term
from spanopt.taps.tap import Tap

__all__ = [
    "WEIGHTS",
    "Operand",
    "Product",
    "Scores",
    "carry",
    "carry_product",
    "lose",
    "noted_scores",
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
            is the keys. It is shared with the same product turned, where the entry means the
            opposite.
        of_inputs: Whether both were computed from inputs of the layer.
        turned: Whether the operands have changed places since the product was made.
    """

    left: Operand
    right: Operand
    self_attention: bool
    swapped: list[bool]
    of_inputs: bool
    turned: bool = False

    def turn(self) -> Product:
        """Return the same product, keys by queries in place of queries by keys or the reverse."""
        left, right, same, swapped, of_inputs, turned = self
        return Product(right, left, same, swapped, of_inputs, not turned)


class Scores:
    """What is known of a score matrix, or of its softmax.

    Attributes:
        products: The products that add up to the scores; empty after the softmax.
        axes: The dimensions of the tokens of the left and of the right operand.
        read: What the masks so far show, with the left operand's tokens as rows.
        start: How many further rows and columns were put before those of the product.
        signs: Whether these are only the signs of scores, which no gradient goes through.
        masked: Whether a mask or a bias was added or filled in.
        terms: The masks and biases of which a factor could change what they close.
    """

    def __init__(
        self,
        products: tuple[Product, ...] = (),
        axes: Axes = PLAIN,
        read: Read = (),
        start: tuple[int, int] = (0, 0),
        signs: bool = False,
        masked: bool = False,
        terms: tuple[Term, ...] = (),
    ) -> None:
        self.products = products
        self.axes = axes
        self.read = read
        self.start = start
        self.signs = signs
        self.masked = masked
        self.terms = terms

    def but(
        self,
        *,
        axes: Axes | None = None,
        read: Read | None = None,
        start: tuple[int, int] | None = None,
        signs: bool | None = None,
        masked: bool | None = None,
        terms: tuple[Term, ...] | None = None,
    ) -> Scores:
        """Return the same knowledge, but for what is given."""
        return Scores(
            self.products,
            self.axes if axes is None else axes,
            self.read if read is None else read,
            self.start if start is None else start,
            self.signs if signs is None else signs,
            self.masked if masked is None else masked,
            self.terms if terms is None else terms,
        )

    def at(self, axes: Axes) -> Scores:
        """Return the same knowledge with other axes, for scores that were reshaped or permuted."""
        return self.but(axes=axes)

    def closes(self) -> bool:
        """Return whether a mask so far may close a token to all others, as padding is closed."""
        return any(not shown.chosen for shown in self.read)

    def layout(self, x: Tensor) -> Layout:
        """Return how the tensor x, which is these scores, holds their first product."""
        left, right = (one.x.shape for one in self.products[0][:2])
        return Layout(x.shape, self.axes, self.start, (*left[:-1], right[-2]))


WEIGHTS = Scores()
"""What is known of the result of a softmax over scores."""


def scores_of(tap: Tap, x: Any) -> Scores | None:
    """Return what is known of a tensor that is scores or weights; ``None`` for other tensors."""
    call = tap.current_call()
    if call is None or not isinstance(x, Tensor):
        return None
    noted = call.scores.of(x)
    if noted is not None:
        scores, version = noted
        if version is None or version == x._version:
            return scores
        lose(tap, x, "a change of it in place")  # of a view, or of what it is a view of
        return None
    if torch.compiler.is_compiling():
        return None
    if x.grad_fn is None or call.streams.knows(x):
        return None
    # A function that no mode sees made this tensor, such as one of torch.jit.script.
    scores = call.trail.through_elementwise(x, tap.site.module)
    if scores is None or scores.masked:  # the function may have opened what a mask closes
        return None
    carry_product(tap, x, scores)
    return scores


def noted_scores(tap: Tap) -> list[tuple[Tensor, Scores]]:
    """Return the tensors of the current call that are scores, with what is known of each."""
    call = tap.current_call()
    if call is None:
        return []
    return [(x, note[0]) for x, note in call.scores.items() if note is not None]


def carry(tap: Tap, result: Any, scores: Scores) -> Any:
    """Note that a result is scores, and return it."""
    call = tap.current_call()
    if call is not None and isinstance(result, Tensor):
        if torch.compiler.is_compiling():
            call.scores[result] = scores, None
        else:
            call.scores[result] = scores, None if result.is_inference() else result._version
            call.trail.note(result, scores)
    return result


def carry_product(tap: Tap, result: Any, scores: Scores) -> Any:
    """Note that a result is scores and comes from a product of activations, and return it."""
    tap.streams().note_scores(result)
    return carry(tap, result, scores)


def lose(tap: Tap, x: Tensor, operation: str) -> None:
    """Stop following scores, and remember the operation for the error."""
    call = tap.current_call()
    if call is not None:
        call.scores[x] = None
        if not torch.compiler.is_compiling():
            call.trail.note_lost(x, operation)


def together(a: Scores, b: Scores) -> Scores | None:
    """Return what is known of the sum of two score matrices; ``None`` if their axes differ.

    A product of an input and something else, such as relative positions, is left alone then.
    """
    if a is b or not b.products:
        return a
    if not a.products:
        return b
    if a.axes == turned(b.axes):  # one of the products is keys by queries
        if any(one is other for one in a.products for other in b.products):
            return None  # each operand is both the queries and the keys
        swapped = tuple(one.turn() for one in b.products)
        start = b.start[1], b.start[0]
        terms = tuple([term.turn() for term in b.terms])
        b = Scores(swapped, a.axes, transposed(b.read), start, b.signs, b.masked, terms)
    if a.axes != b.axes or a.start != b.start:
        of_inputs = [one for one in (a, b) if any(x.of_inputs for x in one.products)]
        return of_inputs[0] if len(of_inputs) == 1 else None
    new = [one for one in b.products if not any(one is product for product in a.products)]
    products = (*a.products, *new)
    signs, masked, terms = a.signs and b.signs, a.masked or b.masked, (*a.terms, *b.terms)
    return Scores(products, a.axes, both(a.read, b.read), a.start, signs, masked, terms)
