"""Softmax tap: attention written out by hand, as a product of Q and K that reaches a softmax.

When two activations are multiplied nobody knows yet whether the product will be attention scores.
So switched nodes are put on both, the product is followed through scaling, masking, casts and
reshapes, and a softmax over it turns them on. What the softmax normalises over are the keys. A
product that reaches no softmax, or by a way that is not followed, is left alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanopt.node import switch_on, switched_node
from spanopt.taps.axes import PLAIN, Axes, in_order, permuted, reshaped, tail, turned
from spanopt.taps.masks import Read, allowed, allowed_by_fill, both, read, transposed
from spanopt.taps.real import Tokens, by_document
from spanopt.taps.tap import Handler, Tap, other_sides
from spanopt.taps.watcher import Watched, watch_node

__all__ = ["HANDLERS"]


class _Operand(NamedTuple):
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


class _Product(NamedTuple):
    """A product of Q and K, or of any two activations.

    Attributes:
        left: The first operand.
        right: The second.
        self_attention: Whether both were computed from the same input of the layer.
        swapped: Empty until a softmax tells; then whether the first operand are the keys.
        of_inputs: Whether both were computed from inputs of the layer.
    """

    left: _Operand
    right: _Operand
    self_attention: bool
    swapped: list[bool]
    of_inputs: bool


class _Scores:
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
        products: tuple[_Product, ...] = (),
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

    def at(self, axes: Axes) -> _Scores:
        """Return what is known of the same scores with the tokens in other dimensions."""
        return _Scores(self.products, axes, self.read, self.widened, self.signs)


_WEIGHTS = _Scores()


def _scores(tap: Tap, x: Any) -> _Scores | None:
    call = tap.current_call()
    scores = None if call is None else call.scores.of(x)
    if scores is not None or call is None or torch.compiler.is_compiling():
        return scores
    if not isinstance(x, Tensor) or x.grad_fn is None or call.streams.knows(x):
        return None
    # Made by a function that no mode sees, such as one of torch.jit.script.
    scores = call.trail.through_elementwise(x, tap.site.module)
    if scores is not None:
        _carry_product(tap, x, scores)
    return scores


def _carry(tap: Tap, result: Any, scores: _Scores) -> Any:
    call = tap.current_call()
    if call is not None and isinstance(result, Tensor):
        call.scores[result] = scores
        if not torch.compiler.is_compiling():
            call.trail.note(result, scores)
    return result


def _carry_product(tap: Tap, result: Any, scores: _Scores) -> Any:
    tap.streams().note_scores(result)
    return _carry(tap, result, scores)


# Products, where scores come from.


def _matmul(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 2 or kwargs:
        return func(*args, **kwargs)
    left, right = args[::-1] if func is Tensor.__rmatmul__ else args
    mixed = _mixed_by_product(tap, left, right)
    if mixed is not None:
        return _carry(tap, func(*args), mixed)
    if not _may_be_attention(tap, left, right):
        return func(*args)
    x, y = _as_multiplied(left, right)
    product = _product(tap, left, right, x, y.mT)
    result = torch.matmul(product.left.node, product.right.node.mT)
    return _carry_product(tap, result, _Scores((product,)))


def _as_multiplied(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Make the copies that matmul makes and saves for backward, so that nodes save no others."""
    if left.ndim < 4 or left.shape[:-2] != right.shape[:-2]:
        return left, right
    batch = left.shape[:-2].numel()
    left, right = (x.reshape(batch, *x.shape[-2:]).view(x.shape) for x in (left, right))
    return left, right


def _bmm(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) < 2 or not _may_be_attention(tap, *args[-2:]):
        return func(*args, **kwargs)
    *bias, left, right = args
    product = _product(tap, left, right, left, right.mT)
    result = func(*bias, product.left.node, product.right.node.mT, **kwargs)
    scores = _Scores((product,))
    _carry_product(tap, result, scores)
    if bias and kwargs.get("beta", 1) != 0:
        _mask(tap, result, allowed(bias[0]), bias[0])
    return result


def _einsum(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    terms = _terms(equation, *operands) if len(operands) == 2 else None
    if terms is None:
        return func(*args, **kwargs)
    left, right = operands
    mixed = _mixed_scores(tap, terms, left, right)
    if mixed is not None:
        return _carry(tap, func(*args, **kwargs), mixed)
    layouts = _layouts(*terms)
    if layouts is None or not _may_be_attention(tap, left, right):
        return func(*args, **kwargs)
    of_left, of_right, axes = layouts
    product = _product(tap, left, right, of_left.lay_out(left), of_right.lay_out(right))
    nodes = of_left.lay_back(product.left.node, left), of_right.lay_back(product.right.node, right)
    return _carry_product(tap, func(equation, *nodes), _Scores((product,), axes))


def _terms(equation: Any, left: Any, right: Any) -> tuple[str, str, str] | None:
    """Return the letters of both operands of an einsum and of its result.

    The dimensions of an ellipsis are named by digits, aligned at the last.
    """
    if not all(isinstance(x, Tensor) for x in (left, right)) or not isinstance(equation, str):
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    ellipses = [
        "9876543210"[10 - (x.ndim - len(term.replace("...", ""))) :]
        for term, x in zip(terms, (left, right), strict=True)
    ]
    one, other = (term.replace("...", dims) for term, dims in zip(terms, ellipses, strict=True))
    return one, other, out.replace("...", max(ellipses, key=len))


class _Layout(NamedTuple):
    """How an operand of an einsum becomes (B, ..., N, d).

    Attributes:
        groups: Its dimensions, in the order wanted; those of a group become one.
    """

    groups: tuple[tuple[int, ...], ...]

    def lay_out(self, x: Tensor) -> Tensor:
        """Return the operand as (B, ..., N, d): a view, unless dimensions become one."""
        y = x.permute([i for group in self.groups for i in group])
        for at, group in enumerate(self.groups):
            if len(group) > 1:
                y = y.flatten(at, at + len(group) - 1)
        return y

    def lay_back(self, y: Tensor, x: Tensor) -> Tensor:
        """Return such a tensor in the layout of the operand x."""
        order = [i for group in self.groups for i in group]
        if len(order) > len(self.groups):
            y = y.reshape([x.shape[i] for i in order])
        return y.permute([order.index(i) for i in range(len(order))])


def _layouts(left: str, right: str, out: str) -> tuple[_Layout, _Layout, Axes] | None:
    """Return how the operands of an einsum become (B, ..., N, d), and the axes of the tokens.

    ``None`` where it is no product of queries and keys: a batch of outer products over tokens.
    Several contracted dimensions are one set of features, such as those of all rows in attention
    that is tied over the rows of an alignment.
    """
    contracted = [c for c in left if c in right and c not in out]
    kept = [c for c in left + right if c not in contracted]
    repeated = any(len(set(term)) < len(term) for term in (left, right, out))
    batch = [c for c in left if c in right and c in out]
    if not contracted or not batch or repeated or sorted(set(kept)) != sorted(out):
        return None
    tokens = []
    for own, other in ((left, right), (right, left)):
        only = [c for c in out if c in own and c not in other and not c.isdigit()]
        # Keys that all heads share leave two such letters, of which h or g is that of the heads.
        only = [c for c in only if c not in "hg"] or only
        if len(only) != 1:
            return None
        tokens.append(only[0])
    rest = [c for c in out if c not in tokens]
    heads = [c for c in rest if c in "hg"]
    rows = [c for c in rest if c not in heads]
    first = bool(heads and rows) and out.index(heads[0]) < out.index(rows[-1])
    leading = [rows, heads] if first else [[c] for c in rest]
    layouts = []
    for term, token in zip((left, right), tokens, strict=True):
        groups = [[c for c in group if c in term] for group in (*leading, [token], contracted)]
        layouts.append(_Layout(tuple(tuple(map(term.index, group)) for group in groups if group)))
    left_axes, right_axes, of_heads = (
        tuple(out.index(c) - len(out) for c in group)
        for group in (tokens[:1], tokens[1:], heads if first else [])
    )
    return layouts[0], layouts[1], (left_axes, right_axes, of_heads)


# Scores of several heads, mixed: each entry of the result is of the same query and key as before.


def _mixed_scores(
    tap: Tap, terms: tuple[str, str, str], left: Tensor, right: Tensor
) -> _Scores | None:
    """Return what is known of the scores that an einsum makes of others, if it does."""
    own, other, out = terms
    scores = _scores(tap, left)
    if scores is None:
        own, other, scores = other, own, _scores(tap, right)
    elif _scores(tap, right) is not None:
        return None
    if scores is None or not scores.products:
        return None
    groups = [[own[axis + len(own)] for axis in group] for group in scores.axes]
    if any(letter not in out for group in groups[:2] for letter in group):
        return None
    if groups[2]:
        groups[2] = [c for c in out if c in groups[2] or (c in other and c not in own)]
    of_left, of_right, heads = (tuple(out.index(c) - len(out) for c in group) for group in groups)
    return scores.at((of_left, of_right, heads))


def _mixed_by_product(tap: Tap, left: Any, right: Any) -> _Scores | None:
    """Return what is known of the product of scores with a matrix of other dimensions."""
    if not all(isinstance(x, Tensor) and x.ndim > 1 for x in (left, right)):
        return None
    for x, contracted in ((left, -1), (right, -2)):
        scores = _scores(tap, x)
        if scores is None or not scores.products:
            continue
        if contracted not in (*scores.axes[0], *scores.axes[1]):
            return scores
    return None


def _linear(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Mix heads that are the last dimension."""
    result = func(*args, **kwargs)
    scores = _scores(tap, args[0])
    if scores is not None and -1 not in (*scores.axes[0], *scores.axes[1]):
        return _carry(tap, result, scores)
    return result


def _convolution(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Mix heads that are channels."""
    result = func(*args, **kwargs)
    scores, x, weight = _scores(tap, args[0]), *args[:2]
    space = weight.ndim - 2
    of_each_entry = weight.shape[2:].numel() == 1 and result.shape[-space:] == x.shape[-space:]
    if scores is not None and of_each_entry and tail(scores.axes) <= space:
        return _carry(tap, result, scores)
    return result


def _may_be_attention(tap: Tap, left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    for x in (left, right):
        scores = _scores(tap, x)
        if scores is None:
            continue
        # The softmax's result, times the values; or scores, which are no queries. Queries may be a
        # product themselves, such as one with a rotation, which no input is in.
        if not scores.products or any(product.of_inputs for product in scores.products):
            return False
    if not tap.is_live():
        return False
    for x in (left, right):
        if x.is_nested or x.layout != torch.strided:
            tap.multiplied = True  # so that the layer is reported as one that was not scaled
            return False
    if not left.is_floating_point() or not right.is_floating_point():
        return False
    streams = tap.streams()
    # Against a parameter it is a linear map, and against a matrix without a batch dimension,
    # unless both were computed from what the layer was called with.
    if streams.is_weight(right):
        return False
    if min(left.ndim, right.ndim) < 3 and not (
        left.ndim == right.ndim == 2 and streams.of(left) and streams.of(right)
    ):
        return False
    tap.multiplied = True
    return True


def _product(tap: Tap, left: Tensor, right: Tensor, x: Tensor, y: Tensor) -> _Product:
    """Put nodes on x (..., N, d) and y (..., M, d), which are views of left and right."""
    of_left, of_right = tap.given() or (None, None)
    same = tap.is_self_attention(left, right) and x.shape[-2] == y.shape[-2]
    of_x = of_y = None
    if tap.projects(x, y):
        of_x, of_y = other_sides(tap.method.setup, tap.site.name, x, y)
    operands = _operand(tap, x, of_left, of_x), _operand(tap, y, of_right, of_y)
    streams = tap.streams()
    return _Product(*operands, same, [], bool(streams.of(left) and streams.of(right)))


def _operand(tap: Tap, x: Tensor, given: Tokens | None, other: Tensor | None) -> _Operand:
    query, key = tap.query, tap.key
    if not (x.requires_grad and torch.is_grad_enabled()) or tap.is_idle():
        return _Operand(x, x, None)
    with tap.keeping():
        node, switch, real = switched_node(
            x,
            query.factors,
            key.factors,
            project=query.projects() or key.projects(),
            method=tap.method,
            other=other,
            documents=None if given is None else by_document(given, x.shape),
        )
    return _Operand(x, node, (switch, real), other)


# The way from the product to the softmax.


def _elementwise(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    found = [scores for scores in (_scores(tap, x) for x in args) if scores is not None]
    found = [scores for scores in found if not scores.signs] or found
    if not found or not _keeps_axes(tap, result, args, found[0]):
        return result
    scores = found[0]
    for other in found[1:]:
        scores = _together(scores, other)
    return _carry(tap, result, scores)


def _together(a: _Scores, b: _Scores) -> _Scores:
    """Return the sum of two scores, or of a tensor with itself."""
    if a is b:
        return a
    if a.axes == turned(b.axes):  # one of the products is keys by queries
        swapped = tuple(
            _Product(product.right, product.left, product.self_attention, [], product.of_inputs)
            for product in b.products
        )
        b = _Scores(swapped, a.axes, transposed(b.read), b.widened)
    if a.axes != b.axes:
        return a
    new = [one for one in b.products if not any(one is product for product in a.products)]
    products = (*a.products, *new)
    return _Scores(products, a.axes, both(a.read, b.read), a.widened or b.widened)


def _signs(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    scores = _scores(tap, args[0])
    if scores is None:
        return result
    signs = _Scores(scores.products, scores.axes, scores.read, scores.widened, signs=True)
    return _carry(tap, result, signs)


def _reshaped(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    scores = _scores(tap, args[0]) if args else None
    if scores is None:
        return result
    axes = reshaped(scores.axes, args[0].shape, result.shape)
    return result if axes is None else _carry(tap, result, scores.at(axes))


def _getitem(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Take all of the scores, with further dimensions of size 1."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    for part in index:
        if not (part is None or part is ... or (isinstance(part, slice) and part == slice(None))):
            return func(*args, **kwargs)
    return _reshaped(tap, func, *args, **kwargs)


def _keeps_axes(tap: Tap, result: Any, args: Any, scores: _Scores) -> bool:
    """Whether the axes of the scores are where they were, at the end of the same size."""
    if not isinstance(result, Tensor):
        return False
    x = next(x for x in args if _scores(tap, x) is scores)
    count = tail(scores.axes)
    return result.ndim >= count and result.shape[-count:] == x.shape[-count:]


def _add(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = _elementwise(tap, func, *args, **kwargs)
    scores = _scores(tap, result)
    masks = [x for x in args[:2] if isinstance(x, Tensor) and _scores(tap, x) is None]
    if scores is not None and masks and masks[0].dtype != torch.bool:
        mask = masks[0].detach() * kwargs.get("alpha", 1)
        _mask(tap, result, allowed(mask), masks[0])
    return result


def _sub(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = _elementwise(tap, func, *args, **kwargs)
    scores = _scores(tap, result)
    if scores is None or len(args) < 2 or not isinstance(args[1], Tensor):
        return result
    if _scores(tap, args[1]) is None and args[1].ndim and args[1].shape[-1] > 1:
        mask = -args[1].detach() * kwargs.get("alpha", 1)  # it is no maximum of each row
        _mask(tap, result, allowed(mask), args[1])
    return result


def _masked_fill(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = _elementwise(tap, func, *args, **kwargs)
    if _scores(tap, result) is not None:
        _, where, value = args
        _mask(tap, result, allowed_by_fill(where.bool(), value), where)
    return result


def _where(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = _elementwise(tap, func, *args, **kwargs)
    if _scores(tap, result) is not None and len(args) == 3:
        # torch.where(condition, x, y) or x.where(condition, y)
        condition, x, y = args if _scores(tap, args[0]) is None else (args[1], args[0], args[2])
        where = ~condition.bool()
        if _scores(tap, x) is None:
            where, y = ~where, x
        _mask(tap, result, allowed_by_fill(where, y), condition)
    return result


def _setitem(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    func(*args, **kwargs)
    x, index, value = args
    scores = _scores(tap, x)
    by_mask = isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim == x.ndim
    if scores is not None and by_mask and not (isinstance(value, Tensor) and value.ndim):
        _mask(tap, x, allowed_by_fill(index, value), index)


def _forget(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Change the order of the axes in place."""
    result = func(*args, **kwargs)
    call = tap.current_call()
    if call is not None and _scores(tap, args[0]) is not None:
        call.scores[args[0]] = None
    return result


def _mask(tap: Tap, x: Tensor, allowed: Tensor, source: Tensor) -> None:
    """Note that the scores x are masked, by what was computed from ``source``."""
    scores = _scores(tap, x)
    if scores is None or scores.widened or tap.streams().is_of_scores(source):
        return
    if not any(side.switches for product in scores.products for side in product[:2]):
        return
    allowed = in_order(allowed, scores.axes, x.shape)
    left, right = (side.x.shape[-2] for side in scores.products[0][:2])
    told = read(allowed[..., :left, :right], allowed.ndim)  # without keys that were appended
    _carry(tap, x, _Scores(scores.products, scores.axes, both(scores.read, told)))


def _permute(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    scores = _scores(tap, args[0])
    if scores is None:
        return result
    ndim = args[0].ndim
    order = list(range(ndim))
    if func.__name__ == "permute":
        dims = kwargs["dims"] if len(args) == 1 else args[1]
        dims = args[1:] if isinstance(dims, int) else dims
        order = [dim % ndim for dim in dims]
    elif len(args) == 3:
        a, b = (dim % ndim for dim in args[1:])
        order[a], order[b] = b, a
    elif func.__name__ == "__get__":
        order[-1], order[-2] = ndim - 2, ndim - 1
    else:
        return result
    return _carry(tap, result, scores.at(permuted(scores.axes, order)))


def _get(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the transpose, which is a property; torch.compile does not show properties."""
    if getattr(getattr(func, "__self__", None), "__name__", "") == "mT":
        return _permute(tap, func, *args, **kwargs)
    return func(*args, **kwargs)


def _cat(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    tensors = args[0] if isinstance(args[0], (list, tuple)) else ()
    found = [scores for scores in (_scores(tap, x) for x in tensors) if scores is not None]
    if len(found) == 1:  # an attention sink is a further key
        scores = found[0]
        widened = scores.widened or _scores(tap, tensors[0]) is None
        _carry(tap, result, _Scores(scores.products, scores.axes, scores.read, widened))
    return result


# The softmax.


def _softmax(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    tap.site.takes_softmax = True
    scores = _scores(tap, args[0]) if args else None
    if scores is None:
        may_be = tap.multiplied and args and tap.streams().may_be_of_scores(args[0])
        if may_be and tap.is_live():
            tap.lost = True
            _note_where_lost(tap, args[0])
        return func(*args, **kwargs)
    if not scores.products:
        return _carry(tap, func(*args, **kwargs), scores)
    x, *rest = args
    dim = kwargs.get("dim", rest[0] if rest else None)
    axis = dim - x.ndim if isinstance(dim, int) and dim >= 0 else dim
    sides = [group for group in scores.axes[:2] if group == (axis,)]
    if not sides:
        tap.site.lost_at = "a softmax that is not over one side's tokens"
        return func(*args, **kwargs)
    for product in scores.products:
        # Where there are softmaxes over both axes, the first one tells which are the keys.
        if not product.swapped:
            product.swapped.append(sides[0] is scores.axes[0])
        x, real = _switch_on(tap, x, product, scores.read)
    weights = func(x, *rest, **kwargs)
    watcher = tap.watching()
    if watcher is not None:
        by_query = weights.detach() if axis == -1 else weights.detach().transpose(axis, -1)
        watcher.weights(tap.site.name, by_query, real)
    return _carry(tap, weights, _WEIGHTS)


def _note_where_lost(tap: Tap, x: Tensor) -> None:
    call = tap.current_call()
    if call is not None and not torch.compiler.is_compiling():
        tap.site.lost_at = call.trail.lost_at(x) or tap.site.lost_at


def _switch_on(tap: Tap, x: Tensor, product: _Product, read: Read) -> tuple[Tensor, Tensor | None]:
    """Turn the nodes of a product on, in its scores, and tell the real queries."""
    query, key = product.left, product.right
    (swapped,) = product.swapped
    if swapped:
        query, key = key, query
        read = transposed(read)
    tap.observe(query.x, key.x, "softmax")
    tokens = tap.tokens(query.x, key.x, read, product.self_attention)
    of_query, of_key = tap.given() or (None, None)
    watcher = tap.watching()
    if swapped and of_query is not of_key and any(side.documents is not None for side in tokens):
        raise ValueError(
            f"layer {tap.site.name!r} multiplies keys by queries, in this order: token_mask can "
            "give it documents only if they are the same for both"
        )
    for side, operand, real in zip(("query", "key"), (query, key), tokens, strict=True):
        if operand.switches is not None:
            mask = None if real.mask is None else real.mask.reshape(-1, real.mask.shape[-1])
            x = switch_on(x, *operand.switches, side=side, mask=mask)
            if watcher is not None:
                of_node = tap.site.name, side, operand.x, tap.method, *real, operand.other
                watch_node(watcher, Watched(*of_node), operand.node)
    return x, tokens[0].mask


# fmt: off
_ELEMENTWISE = (
    "mul", "mul_", "multiply", "div", "div_", "divide", "true_divide", "neg", "negative",
    "__mul__", "__rmul__", "__imul__", "__truediv__", "__itruediv__", "__idiv__", "__rsub__",
    "__neg__", "tanh", "tanh_", "clamp", "clamp_", "clip", "clamp_min", "clamp_max", "nan_to_num",
    "max", "maximum", "min", "minimum", "dropout", "dropout_", "float", "half", "bfloat16",
    "double", "type", "contiguous", "clone", "abs", "abs_", "absolute", "__abs__", "relu", "relu_",
    "relu6", "leaky_relu", "elu", "gelu", "silu", "softplus", "sqrt", "square", "pow", "__pow__",
    "log1p",
)
_RESHAPED = (
    "view", "reshape", "expand", "unflatten", "flatten", "unsqueeze", "squeeze", "to", "type_as",
    "view_as", "reshape_as", "expand_as",
)


# Arguments that may be given by name, in the order in which functions have them.
_NAMES = (
    "condition", "tensors", "input", "weight", "other", "mat2", "batch1", "batch2", "dims", "dim0",
    "dim1", "axis0", "axis1", "mask", "value",
)
# fmt: on


def _by_position(handler: Handler) -> Handler:
    def handle(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
        named = [name for name in _NAMES if name in kwargs]
        if named:
            args = (*args, *(kwargs[name] for name in named))
            kwargs = {name: x for name, x in kwargs.items() if name not in named}
        return handler(tap, func, *args, **kwargs)

    return handle


def _with_scores(handler: Handler) -> Handler:
    """Spare calls the handler as long as there are no scores, as where they are never seen."""

    def handle(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
        call = tap.current_call()
        if call is None or call.scores.is_empty():
            return func(*args, **kwargs)
        return handler(tap, func, *args, **kwargs)

    return handle


_BY_NAME: dict[str, Handler] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_RESHAPED, _reshaped),
    **dict.fromkeys(("sign", "sgn"), _signs),
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "__getitem__": _getitem,
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
    **dict.fromkeys(("transpose_", "swapaxes_", "swapdims_", "t_", "squeeze_"), _forget),
    **dict.fromkeys(("unsqueeze_", "resize_", "resize_as_", "copy_"), _forget),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "softmax": _softmax,
}
# Where scores come from or are missed; the others only follow them.
_SOURCES = (_matmul, _bmm, _einsum, _softmax)
HANDLERS = {
    name: _by_position(handler) if handler in _SOURCES else _with_scores(_by_position(handler))
    for name, handler in _BY_NAME.items()
}
