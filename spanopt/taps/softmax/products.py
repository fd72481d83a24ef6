"""Products of two activations, by matmul, bmm and einsum. Scores come from these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spanopt.node import switched_node
from spanopt.taps.mode import keeping
from spanopt.taps.real import Tokens, by_document
from spanopt.taps.running import Place
from spanopt.taps.sides import other_sides
from spanopt.taps.softmax.equations import layouts_of, terms_of
from spanopt.taps.softmax.masking import note_mask
from spanopt.taps.softmax.mixing import mixed_by_einsum, mixed_by_product
from spanopt.taps.softmax.scores import (
    Operand,
    Product,
    Scores,
    carry,
    carry_product,
    scores_of,
    together,
)
from spanopt.taps.tap import Tap

__all__ = ["bmm", "einsum", "matmul"]


def matmul(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Multiply two activations with nodes on them, or mix the heads of scores."""
    if len(args) != 2 or kwargs:
        return func(*args, **kwargs)
    left, right = args[::-1] if func is Tensor.__rmatmul__ else args
    mixed = mixed_by_product(tap, left, right)
    if mixed is not None:
        return carry(tap, func(*args), mixed)
    place = _place_of_attention(tap, left, right)
    if place is None:
        return func(*args)
    x, y = _as_multiplied(left, right)
    product = _product(tap, place, left, right, x, y.mT)
    result = torch.matmul(product.left.node, product.right.node.mT)
    return carry_product(tap, result, Scores((product,)))


def _as_multiplied(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Make the copies that matmul would make and save, so that nodes save these and no others."""
    if left.ndim < 4 or left.shape[:-2] != right.shape[:-2]:
        return left, right
    batch = left.shape[:-2].numel()
    left, right = (x.reshape(batch, *x.shape[-2:]).view(x.shape) for x in (left, right))
    return left, right


def bmm(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Multiply two batches of matrices with nodes on them. What baddbmm adds may be a mask."""
    place = _place_of_attention(tap, *args[-2:]) if len(args) > 1 else None
    if place is None:
        return func(*args, **kwargs)
    *bias, left, right = args
    product = _product(tap, place, left, right, left, right.mT)
    of_bias = scores_of(tap, bias[0]) if bias else None
    result = func(*bias, product.left.node, product.right.node.mT, **kwargs)
    beta = kwargs.get("beta", 1)
    scores = Scores((product,))
    if bias and beta != 0 and of_bias is not None:  # a sum of two products
        of_both = None if of_bias.masked and beta < 0 else together(of_bias, scores)
        return result if of_both is None else carry_product(tap, result, of_both)
    carry_product(tap, result, scores)
    if bias and beta != 0:
        value = bias[0].detach() * beta
        note_mask(tap, result, value, sources=bias)
    return result


def einsum(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Contract two activations with nodes on them, or mix the heads of scores."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    terms = terms_of(equation, *operands) if len(operands) == 2 else None
    if terms is None:
        return func(*args, **kwargs)
    left, right = operands
    mixed = mixed_by_einsum(tap, terms, left, right)
    if mixed is not None:
        return carry(tap, func(*args, **kwargs), mixed)
    layouts = layouts_of(*terms)
    place = None if layouts is None else _place_of_attention(tap, left, right)
    if layouts is None or place is None:
        return func(*args, **kwargs)
    of_left, of_right, axes = layouts
    product = _product(tap, place, left, right, of_left.lay_out(left), of_right.lay_out(right))
    nodes = of_left.lay_back(product.left.node, left), of_right.lay_back(product.right.node, right)
    return carry_product(tap, func(equation, *nodes), Scores((product,), axes))


def _place_of_attention(tap: Tap, left: Any, right: Any) -> Place | None:
    """Return the place of a product if it may be that of Q and K, otherwise ``None``."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    for x in (left, right):
        scores = scores_of(tap, x)
        if scores is None:
            continue
        # Attention weights are multiplied by values, and scores are not queries. But queries may
        # themselves be a product, such as one with a rotation that no input went into.
        if not scores.products or any(product.of_inputs for product in scores.products):
            return None
    place = tap.place()
    if not place.inside:
        return None
    for x in (left, right):
        if x.is_nested or x.layout != torch.strided:
            _note_multiplied(tap)  # so that the layer is reported as unscaled
            return None
    if not left.is_floating_point() or not right.is_floating_point():
        return None
    streams = tap.streams()
    # A product with a parameter is a linear map. So is one with a matrix that has no batch
    # dimension, unless both matrices were computed from inputs of the layer.
    if streams.is_weight(right):
        return None
    if min(left.ndim, right.ndim) < 3 and not (
        left.ndim == right.ndim == 2 and streams.of(left) and streams.of(right)
    ):
        return None
    _note_multiplied(tap)
    return place


def _note_multiplied(tap: Tap) -> None:
    call = tap.current_call()
    if call is not None:
        call.multiplied = True


def _product(tap: Tap, place: Place, left: Tensor, right: Tensor, x: Tensor, y: Tensor) -> Product:
    """Put nodes on x (..., N, d) and y (..., M, d), which hold the entries of left and right."""
    of_left, of_right = tap.given() or (None, None)
    same = tap.is_self_attention(left, right) and x.shape[-2] == y.shape[-2]
    of_x = of_y = None
    if tap.projects(x, y):
        of_x, of_y = other_sides(tap.rescaling.setup, tap.site.name, x, y)
    operands = _operand(tap, place, x, of_left, of_x), _operand(tap, place, y, of_right, of_y)
    streams = tap.streams()
    return Product(*operands, same, [], bool(streams.of(left) and streams.of(right)))


def _operand(
    tap: Tap, place: Place, x: Tensor, given: Tokens | None, other: Tensor | None
) -> Operand:
    query, key = tap.query, tap.key
    if not (x.requires_grad and torch.is_grad_enabled()) or tap.is_idle():
        return Operand(x, x, None)
    with keeping(place):
        node, switch, real = switched_node(
            x,
            query,
            key,
            other=other,
            documents=None if given is None else by_document(given, x.shape),
        )
    return Operand(x, node, (switch, real), other)
