"""Softmax tap: attention written out by hand, as a product of Q and K that reaches a softmax.

When two activations are multiplied nobody knows yet whether the product will be attention scores.
So switched nodes are put on both, the product is followed through scaling, masking, casts and
reshapes, and a softmax over it turns them on. What the softmax normalises over are the keys. A
product that reaches no softmax, or by a way that is not followed, is left alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spanopt.node import switch_on, switched_node
from spanopt.taps.masks import Read, Tokens, allowed, allowed_by_fill, both, by_document, read
from spanopt.taps.tap import Handler, Tap

__all__ = ["HANDLERS"]

_TAG = "_spanopt_scores"


class _Operand(NamedTuple):
    """One side of a product.

    Attributes:
        x: Shape ``(B, ..., L, d)``.
        node: The same with a node on it.
        switches: Those of the node; ``None`` where there is nothing to do.
    """

    x: Tensor
    node: Tensor
    switches: tuple[Tensor, Tensor] | None


class _Product(NamedTuple):
    """Two operands, and whether they were computed from the same input of the layer."""

    left: _Operand
    right: _Operand
    self_attention: bool


class _Scores:
    """What is known of a score matrix, or of its softmax. Kept as an attribute of the tensor.

    Attributes:
        products: The products that add up to the scores; empty after the softmax.
        axes: Dimensions, counted from the end, of the left and of the right operand's tokens.
        read: The real tokens, left and right, as the masks met so far tell.
    """

    def __init__(
        self,
        products: tuple[_Product, ...] = (),
        axes: tuple[int, int] = (-2, -1),
        read: Read = None,
    ) -> None:
        self.products = products
        self.axes = axes
        self.read = read

    def __reduce__(self) -> tuple[Any, ...]:  # a copy or pickle of the tensor has none of it
        return bool, ()


_WEIGHTS = _Scores()


def _scores(x: Any) -> _Scores | None:
    return getattr(x, _TAG, None) if isinstance(x, Tensor) else None


def _carry(result: Any, scores: _Scores) -> Any:
    if isinstance(result, Tensor):
        setattr(result, _TAG, scores)
    return result


# Products, where scores come from.


def _matmul(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 2 or kwargs:
        return func(*args, **kwargs)
    left, right = args[::-1] if func is Tensor.__rmatmul__ else args
    if not _may_be_attention(tap, left, right):
        return func(*args)
    product = _product(tap, left, right, left, right.mT)
    result = torch.matmul(product.left.node, product.right.node.mT)
    return _carry(result, _Scores((product,)))


def _bmm(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) < 2 or not _may_be_attention(tap, *args[-2:]):
        return func(*args, **kwargs)
    *bias, left, right = args
    product = _product(tap, left, right, left, right.mT)
    result = func(*bias, product.left.node, product.right.node.mT, **kwargs)
    scores = _Scores((product,))
    if bias and kwargs.get("beta", 1) != 0:
        scores = _masked(scores, result, allowed(bias[0]))
    return _carry(result, scores)


def _einsum(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return func(*args, **kwargs)
    left, right = operands
    orders = _orders(equation, left.ndim, right.ndim)
    if orders is None or not _may_be_attention(tap, left, right):
        return func(*args, **kwargs)
    left_order, right_order, axes = orders
    product = _product(tap, left, right, left.permute(left_order), right.permute(right_order))
    nodes = (
        product.left.node.permute(_inverse(left_order)),
        product.right.node.permute(_inverse(right_order)),
    )
    return _carry(func(equation, *nodes), _Scores((product,), axes))


def _orders(
    equation: str, left_ndim: int, right_ndim: int
) -> tuple[list[int], list[int], tuple[int, int]] | None:
    """Return what permutes the operands of an einsum to (..., N, d), and the tokens' axes.

    ``None`` where the equation is no product of queries and keys: a batch of outer products over
    tokens with one contracted dimension.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    # The dimensions of an ellipsis are named by digits, aligned at the last.
    ellipses = [
        "9876543210"[10 - (ndim - len(term.replace("...", ""))) :]
        for term, ndim in zip(terms, (left_ndim, right_ndim), strict=True)
    ]
    left, right = (term.replace("...", dims) for term, dims in zip(terms, ellipses, strict=True))
    out = out.replace("...", max(ellipses, key=len))
    contracted = [c for c in left if c in right and c not in out]
    kept = [c for c in left + right if c not in contracted]
    repeated = any(len(set(term)) < len(term) for term in (left, right, out))
    if len(contracted) != 1 or repeated or sorted(set(kept)) != sorted(out):
        return None
    tokens = []
    for own, other in ((left, right), (right, left)):
        only = [c for c in out if c in own and c not in other and not c.isdigit()]
        # Keys that all heads share leave two such letters, of which h or g is that of the heads.
        only = [c for c in only if c not in "hg"] or only
        if not only:
            return None
        tokens.append(only[-1])
    orders = [
        [term.index(c) for c in out if c in term and c != token]
        + [term.index(token), term.index(contracted[0])]
        for term, token in zip((left, right), tokens, strict=True)
    ]
    axes = (out.index(tokens[0]) - len(out), out.index(tokens[1]) - len(out))
    return orders[0], orders[1], axes


def _inverse(order: list[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def _may_be_attention(tap: Tap, left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    for x in (left, right):
        scores = _scores(x)
        if scores is not None and not scores.products:  # the softmax's result, times the values
            return False
    if left.is_nested or right.is_nested:
        tap.refuse(left=left, right=right)
    if min(left.ndim, right.ndim) < 2 or not (
        left.is_floating_point() and right.is_floating_point()
    ):
        return False
    # Against a matrix without a batch dimension, or a parameter, it is a linear map.
    if min(left.ndim, right.ndim) == 2 and (
        left.ndim != right.ndim or _is_parameter(left) or _is_parameter(right)
    ):
        return False
    return tap.is_live()


def _is_parameter(x: Tensor) -> bool:
    if isinstance(x, nn.Parameter):
        return True
    return not torch.compiler.is_compiling() and isinstance(x._base, nn.Parameter)


def _product(tap: Tap, left: Tensor, right: Tensor, x: Tensor, y: Tensor) -> _Product:
    """Put nodes on x (..., N, d) and y (..., M, d), which are views of left and right."""
    of_left, of_right = tap.given() or (None, None)
    same = tap.is_self_attention(left, right) and x.shape[-2] == y.shape[-2]
    return _Product(_operand(tap, x, of_left), _operand(tap, y, of_right), same)


def _operand(tap: Tap, x: Tensor, given: Tokens | None) -> _Operand:
    query, key = tap.query, tap.key
    if not (x.requires_grad and torch.is_grad_enabled()) or query.mode == key.mode == "identity":
        return _Operand(x, x, None)
    node, switch, real = switched_node(
        x,
        (query.parallel, query.violation),
        (key.parallel, key.violation),
        project="general" in (query.mode, key.mode),
        ridge=query.ridge,
        documents=None if given is None else by_document(given, x.shape),
    )
    return _Operand(x, node, (switch, real))


# The way from the product to the softmax.


def _elementwise(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    found = [scores for scores in map(_scores, args) if scores is not None]
    if not found or not _keeps_axes(result, args, found[0]):
        return result
    scores = found[0]
    if len(found) > 1 and found[1] is not scores and scores.axes == found[1].axes:
        products = scores.products + found[1].products
        scores = _Scores(products, scores.axes, both(scores.read, found[1].read))
    return _carry(result, scores)


def _keeps_axes(result: Any, args: Any, scores: _Scores) -> bool:
    """Whether the axes of the scores are where they were, at the end of the same size."""
    if not isinstance(result, Tensor):
        return False
    x = next(x for x in args if _scores(x) is scores)
    if result.shape == x.shape:
        return True
    tail = -min(scores.axes)
    return result.ndim >= tail and result.shape[-tail:] == x.shape[-tail:]


def _add(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = _elementwise(tap, func, *args, **kwargs)
    scores = _scores(result)
    if scores is not None and len(args) > 1:
        masks = [x for x in args[:2] if isinstance(x, Tensor) and _scores(x) is None]
        if masks and masks[0].ndim > 1:
            _carry(result, _masked(scores, result, allowed(masks[0])))
    return result


def _sub(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = _elementwise(tap, func, *args, **kwargs)
    scores = _scores(result)
    if scores is not None and _scores(args[0]) is not None and isinstance(args[1], Tensor):
        mask = args[1]
        if mask.ndim > 1 and mask.shape[-1] > 1:  # not the maximum of each row
            _carry(result, _masked(scores, result, allowed(-mask.detach())))
    return result


def _masked_fill(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = _elementwise(tap, func, *args, **kwargs)
    scores = _scores(result)
    if scores is not None:
        where, value = (*args[1:], *kwargs.values())
        _carry(result, _masked(scores, result, allowed_by_fill(where, value)))
    return result


def _where(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = _elementwise(tap, func, *args, **kwargs)
    scores = _scores(result)
    if scores is not None and len(args) == 3:
        condition, x, y = args if args[0].dtype == torch.bool else (args[1], args[0], args[2])
        if _scores(x) is None:
            condition, y = ~condition, x
        _carry(result, _masked(scores, result, allowed_by_fill(~condition, y)))
    return result


def _setitem(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    func(*args, **kwargs)
    x, index, value = args
    scores = _scores(x)
    by_mask = isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim == x.ndim
    if scores is not None and by_mask and not (isinstance(value, Tensor) and value.ndim):
        _carry(x, _masked(scores, x, allowed_by_fill(index, value)))


def _masked(scores: _Scores, x: Tensor, allowed: Tensor) -> _Scores:
    """Return the scores x after a mask that is broadcast to them."""
    if not any(side.switches for product in scores.products for side in product[:2]):
        return scores
    allowed = allowed[(None,) * (x.ndim - allowed.ndim)]
    told = read(allowed.movedim(scores.axes, (-2, -1)), x.ndim)
    return _Scores(scores.products, scores.axes, both(scores.read, told))


def _permute(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    scores = _scores(args[0])
    if scores is None:
        return result
    ndim = args[0].ndim
    order = list(range(ndim))
    if func.__name__ == "permute":
        dims = args[1:] if isinstance(args[1], int) else args[1]
        order = [dim % ndim for dim in dims]
    elif len(args) == 3:
        a, b = (dim % ndim for dim in args[1:])
        order[a], order[b] = b, a
    elif func.__name__ == "__get__":
        order[-1], order[-2] = ndim - 2, ndim - 1
    else:
        return result
    axes = tuple(order.index(axis + ndim) - ndim for axis in scores.axes)
    return _carry(result, _Scores(scores.products, axes, scores.read))


def _get(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the transpose, which is a property; torch.compile does not show properties."""
    if getattr(getattr(func, "__self__", None), "__name__", "") == "mT":
        return _permute(tap, func, *args, **kwargs)
    return func(*args, **kwargs)


def _cat(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    tensors = args[0] if isinstance(args[0], (list, tuple)) else ()
    found = [scores for scores in map(_scores, tensors) if scores is not None]
    if len(found) == 1 and _scores(tensors[0]) is found[0]:  # an attention sink is a further key
        _carry(result, found[0])
    return result


# The softmax.


def _softmax(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    scores = _scores(args[0]) if args else None
    if scores is None:
        return func(*args, **kwargs)
    if not scores.products:
        return _carry(func(*args, **kwargs), scores)
    x, *rest = args
    dim = kwargs.get("dim", rest[0] if rest else None)
    axis = dim - x.ndim if isinstance(dim, int) and dim >= 0 else dim
    if axis not in scores.axes:
        return func(*args, **kwargs)
    for product in scores.products:
        x = _switch_on(tap, x, product, scores.read, swapped=axis == scores.axes[0])
    return _carry(func(x, *rest, **kwargs), _WEIGHTS)


def _switch_on(tap: Tap, x: Tensor, product: _Product, read: Read, swapped: bool) -> Tensor:
    query, key = product.left, product.right
    if swapped:
        query, key = key, query
        read = read and read[::-1]
    tap.observe(query.x, key.x, "softmax")
    tokens = tap.tokens(query.x, key.x, read, product.self_attention)
    of_query, of_key = tap.given() or (None, None)
    if swapped and of_query is not of_key and any(side.documents is not None for side in tokens):
        raise ValueError(
            f"layer {tap.site.name!r} multiplies keys by queries, in this order: token_mask can "
            "give it documents only if they are the same for both"
        )
    for side, operand, real in zip(("query", "key"), (query, key), tokens, strict=True):
        if operand.switches is not None:
            mask = None if real.mask is None else real.mask.reshape(-1, real.mask.shape[-1])
            x = switch_on(x, *operand.switches, side=side, mask=mask)
    return x


# fmt: off
_ELEMENTWISE = (
    "mul", "mul_", "multiply", "div", "div_", "divide", "true_divide", "neg", "negative",
    "__mul__", "__rmul__", "__imul__", "__truediv__", "__itruediv__", "__idiv__", "__rsub__",
    "__neg__", "tanh", "tanh_", "clamp", "clamp_", "clip", "clamp_min", "clamp_max", "nan_to_num",
    "max", "maximum", "min", "minimum", "dropout", "dropout_", "to", "float", "half", "bfloat16",
    "double", "type", "type_as", "contiguous", "clone", "view", "reshape", "view_as", "reshape_as",
    "expand", "expand_as", "unflatten", "flatten", "unsqueeze", "squeeze",
)
# fmt: on

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__"), _matmul),
    **dict.fromkeys(("mm", "bmm", "baddbmm"), _bmm),
    "einsum": _einsum,
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _add),
    **dict.fromkeys(("sub", "sub_", "subtract", "__sub__", "__isub__"), _sub),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _masked_fill),
    "where": _where,
    "__setitem__": _setitem,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "permute"), _permute),
    "__get__": _get,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "softmax": _softmax,
}
