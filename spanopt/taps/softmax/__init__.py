"""Softmax tap: attention written out by hand, as a product of Q and K that reaches a softmax.

When two activations are multiplied, it is not known yet whether the product will be attention
scores. So the tap puts switched nodes on both and follows the product through scaling, masking,
casts and reshapes. A softmax over the product turns the nodes on. The axis that the softmax
normalises over holds the keys. A product is left alone if it reaches no softmax, or if a function
on the way is not followed.
"""

from __future__ import annotations

from typing import Any

from spanopt.declarations import Declaration, declare
from spanopt.taps.softmax.bounds import FACTORS
from spanopt.taps.softmax.changing import (
    IN_PLACE,
    IN_PLACE_IF_ASKED,
    changing,
    changing_if_asked,
    forget,
)
from spanopt.taps.softmax.following import (
    cat,
    elementwise,
    get,
    getitem,
    permute,
    reshape,
    signs,
)
from spanopt.taps.softmax.masking import (
    add,
    limit,
    masked_fill,
    rescale,
    setitem,
    sub,
    where,
)
from spanopt.taps.softmax.mixing import convolution, linear
from spanopt.taps.softmax.products import bmm, einsum, matmul
from spanopt.taps.softmax.switching import softmax
from spanopt.taps.tap import Handler, Tap

__all__ = ["HANDLERS"]

# fmt: off
_ELEMENTWISE = (
    "neg", "neg_", "negative", "negative_", "__neg__", "__rsub__", "tanh", "tanh_", "nan_to_num",
    "nan_to_num_", "dropout", "dropout_", "float", "half", "bfloat16", "double", "type",
    "contiguous", "clone", "abs", "abs_", "absolute", "absolute_", "__abs__", "relu", "relu_",
    "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "gelu", "silu", "softplus", "sqrt",
    "sqrt_", "square", "square_", "pow", "pow_", "__pow__", "__ipow__", "log1p", "log1p_",
)
_LIMITED = (
    "clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "max",
    "maximum", "min", "minimum",
)
_RESHAPED = (
    "view", "reshape", "expand", "unflatten", "flatten", "unsqueeze", "squeeze", "to", "type_as",
    "view_as", "reshape_as", "expand_as",
)


# Arguments that may be given by name, in the order in which the functions take them.
_NAMES = (
    "condition", "tensors", "input", "x", "weight", "other", "x2", "mat2", "batch1", "batch2",
    "dims", "dim0", "dim1", "axis0", "axis1", "mask", "value",
)
# fmt: on


def _by_position(handler: Handler) -> Handler:
    def handle(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            named = [name for name in _NAMES if name in kwargs]
            args = (*args, *(kwargs[name] for name in named))
            kwargs = {name: x for name, x in kwargs.items() if name not in named}
        return handler(tap, func, *args, **kwargs)

    return handle


def _with_scores(handler: Handler) -> Handler:
    """Return a handler that does nothing in a call of the layer without scores, to save time."""

    def handle(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
        call = tap.current_call()
        if call is None or call.scores.is_empty():
            return func(*args, **kwargs)
        return handler(tap, func, *args, **kwargs)

    handle.follows_scores = True  # type: ignore[attr-defined]
    return handle


_BY_NAME: dict[str, Handler] = {
    **dict.fromkeys(IN_PLACE, forget),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(FACTORS, rescale),
    **dict.fromkeys(_LIMITED, limit),
    **dict.fromkeys(_RESHAPED, reshape),
    **dict.fromkeys(("sign", "sgn"), signs),
    "linear": linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    "__getitem__": getitem,
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__"), matmul),
    **dict.fromkeys(("mm", "bmm", "baddbmm"), bmm),
    "einsum": einsum,
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), add),
    **dict.fromkeys(("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"), sub),
    **dict.fromkeys(("masked_fill", "masked_fill_"), masked_fill),
    "where": where,
    "__setitem__": setitem,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "permute"), permute),
    "__get__": get,
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "softmax": softmax,
}
# These handlers make scores, or notice that scores were missed. The others only follow scores.
_SOURCES = (matmul, bmm, einsum, softmax)
HANDLERS = {
    name: _by_position(handler) if handler in _SOURCES else _with_scores(_by_position(handler))
    for name, handler in _BY_NAME.items()
}
for _name in IN_PLACE:
    HANDLERS[_name] = _with_scores(changing(_by_position(_BY_NAME[_name])))
for _name, _position in IN_PLACE_IF_ASKED.items():
    HANDLERS[_name] = _with_scores(_by_position(changing_if_asked(_BY_NAME.get(_name), _position)))
declare(Declaration("softmax", "in attention written out as a product and a softmax", HANDLERS))
