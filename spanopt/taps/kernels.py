"""Registering a user's attention function, such as a kernel, so that its layers are scaled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from spanopt.declarations import Declaration, declare
from spanopt.taps.calls import thread
from spanopt.taps.score import nodes_on
from spanopt.taps.tap import Tap

__all__ = ["register"]


def register(
    function: Any,
    name: str,
    *,
    query: str = "q",
    key: str = "k",
    tokens_first: bool = False,
) -> Any:
    """Make an attention function known, so that layers that call it are found and scaled.

    The function must compute softmax attention of a query and a key with 4 dimensions. Its mask is
    not read: use :func:`spanopt.token_mask` where tokens are padding. Register the function before
    the model is searched or hooked. If other modules have imported a Python function by name,
    replace it there with the result of this call.

    Args:
        function: An operator of ``torch.ops``, a result of ``torch.library.custom_op``, or a
            Python function.
        name: The name of this tap, as tables show it.
        query: Name of the function's argument for the query, shape ``(B, H, N, d)``.
        key: Name of the argument for the key, shape ``(B, H', M, d)``, where H is a multiple
            of H'.
        tokens_first: Whether the shapes are ``(B, N, H, d)`` and ``(B, M, H', d)`` instead.

    Returns:
        What layers must call. For an operator this is the operator itself. For a Python function
        it is a function that does the same and that taps can see.

    Raises:
        ValueError: The function has no such arguments, or its name or ``name`` is taken.

    Example:
        >>> import spanopt
        >>> from spanopt.declarations import withdraw
        >>> def flash_attn_func(q, k, v, causal=False):  # stands for that of flash-attn
        ...     q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        ...     y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        ...     return y.transpose(1, 2)
        >>> flash_attn_func = register(flash_attn_func, "flash", tokens_first=True)
        >>> withdraw("flash")
    """
    named = _name_of(function)
    parameters = _parameters_of(function)
    missing = [argument for argument in (query, key) if argument not in parameters]
    if missing:
        raise ValueError(f"{named} has no argument {missing[0]!r}; it has {', '.join(parameters)}")
    places = tuple((argument, parameters.index(argument)) for argument in (query, key))

    def handle(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
        if not tap.is_live():
            return func(*args, **kwargs)
        if tap.focus is not None:
            raise tap.focus.unseen(tap.site, f"calls {named}, which can't be seen into")
        tensors: list[Tensor] = [kwargs[at] if at in kwargs else args[i] for at, i in places]
        for x in tensors:
            if x.ndim != 4:
                raise ValueError(
                    f"layer {tap.site.name!r} calls {named} on {tuple(x.shape)}: a query and a key "
                    "must have 4 dimensions; packed sequences are not supported"
                )
        of_query, of_key = (x.transpose(1, 2) if tokens_first else x for x in tensors)
        nodes = nodes_on(tap, of_query, of_key)
        tap.site.tap = name
        args, kwargs = (*args,), {**kwargs}
        for (at, i), x in zip(places, nodes, strict=True):
            x = x.transpose(1, 2) if tokens_first else x
            if at in kwargs:
                kwargs[at] = x
            else:
                args = (*args[:i], x, *args[i + 1 :])
        return func(*args, **kwargs)

    visible = function if _is_operator(function) else _visible(function, handle)
    declare(
        Declaration(
            name,
            f"in the call of {named}",
            {named: handle, f"{named}.default": handle},
            {named: visible},
        )
    )
    return visible


def _is_operator(function: Any) -> bool:
    return hasattr(function, "overloads") or hasattr(function, "_opoverload")


def _name_of(function: Any) -> str:
    qualified: str = getattr(function, "_name", None) or function.__name__
    return qualified.rpartition("::")[2]


def _parameters_of(function: Any) -> list[str]:
    overload = getattr(function, "_opoverload", None)
    if overload is None and hasattr(function, "overloads"):
        overload = getattr(function, function.overloads()[0])
    if overload is not None:
        return [argument.name for argument in overload._schema.arguments]
    return list(inspect.signature(function).parameters)


def _visible(function: Callable[..., Any], handle: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same and that function modes can intercept."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # Dynamo shows function modes only torch's functions
            running = thread.calls.innermost
            if running is None or thread.busy:
                return function(*args, **kwargs)
            thread.busy = True
            try:
                return handle(running.tap, function, *args, **kwargs)
            finally:
                thread.busy = False
        tensors = tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(call, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return call
