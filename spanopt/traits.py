"""What a module class multiplies and calls, read from its code without running it."""

from __future__ import annotations

import contextlib
import dis
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from spanopt.declarations import declared
from spanopt.declarations import names as attention_names

__all__ = ["attention_calls", "quietly", "scripts_of", "traits_of"]

_PRODUCT_NAMES = {"matmul", "bmm", "baddbmm", "einsum"}


def attention_calls() -> set[int]:
    """Return the attention functions that taps have declared, by their ``id``."""
    return {id(x) for one in declared.values() for x in one.functions.values()}


def traits_of(cls: type) -> frozenset[str]:
    """Return what the code of a module class reaches.

    Args:
        cls: A subclass of ``nn.Module``. Its ``forward`` is read, and so are the methods of the
            class and the plain functions and registries that these refer to. Submodules are not.

    Returns:
        Some of ``"call"`` (it calls an attention function), ``"product"`` (it multiplies two
        matrices) and ``"softmax"`` (it takes a softmax).

    Example:
        >>> traits_of(nn.Softmax)
        frozenset({'softmax'})
    """
    traits: set[str] = set()
    ids, called = attention_calls(), attention_names()
    for code, values in _reached(cls, [cls.forward]):  # type: ignore[attr-defined]
        names = set(_names(code))
        # The name alone counts: the function may come from getattr, an inner import or an object.
        if not names.isdisjoint(called):
            traits.add("call")
        if "softmax" in names:
            traits.add("softmax")
        if _PRODUCT_NAMES & names or _has_matrix_product(code):
            traits.add("product")
        if any(id(value) in ids for value in values):
            traits.add("call")
    return frozenset(traits)


def scripts_of(module: nn.Module) -> list[Any]:
    """Return the TorchScript functions and modules that a module and its submodules may run.

    Args:
        module: Any module.

    Returns:
        Objects with an ``inlined_graph``.

    Example:
        >>> scripts_of(nn.Linear(2, 2))
        []
    """
    found: dict[int, Any] = {}
    classes: set[type] = set()
    for part in module.modules():
        values = [part] if isinstance(part, torch.jit.ScriptModule) else list(vars(part).values())
        functions = [value for value in values if quietly(isinstance, value, types.FunctionType)]
        if type(part) not in classes and not _is_torch(type(part)):
            classes.add(type(part))
            functions.append(type(part).forward)
        for _, reached in _reached(type(part), functions):
            values += reached
        kinds = (torch.jit.ScriptFunction, torch.jit.ScriptModule)
        found.update({id(value): value for value in values if quietly(isinstance, value, kinds)})
    return list(found.values())


def _reached(
    cls: type, functions: Iterable[Callable[..., Any]]
) -> Iterator[tuple[types.CodeType, list[Any]]]:
    """Yield the code that functions of a class reach, with the objects that its names refer to."""
    pending = list(functions)
    visited: set[Any] = set()
    while pending:
        function = pending.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in visited:
            continue
        visited.add(code)
        values = list(_referenced(function, cls))
        yield code, values
        for value in values:
            if quietly(isinstance, value, types.FunctionType) and not _is_torch(value):
                pending.append(value)


def _has_matrix_product(code: types.CodeType) -> bool:
    return any(
        instruction.argrepr == "@" or instruction.opname == "BINARY_MATRIX_MULTIPLY"
        for instruction in dis.get_instructions(code)
    )


def _referenced(function: Callable[..., Any], cls: type) -> Iterator[Any]:
    """Yield the objects that the names in a function's code refer to, where no call is needed."""
    code = function.__code__
    closure: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that is not assigned yet
            closure[name] = cell.cell_contents
    names = {*_names(code), *closure}
    for name in names:
        yield from map(_function_of, _methods(cls, name, names))
        value = closure.get(name, function.__globals__.get(name))
        yield from _attributes(value, names)


def _methods(cls: type, name: str, names: set[str]) -> Iterator[Any]:
    """Yield what ``self.name`` or ``super().name`` may refer to in methods of the class."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    own = [base.__dict__[name] for base in bases if name in base.__dict__]
    if not hasattr(nn.Module, name):
        yield from own[:1]
    if "super" in names or any(base.__name__ in names for base in bases):
        yield from own


def _attributes(value: Any, names: set[str], depth: int = 3) -> list[Any]:
    """Return a value and, for a module, what these names refer to in it and its submodules."""
    found = [_function_of(value)]
    if quietly(isinstance, value, Mapping):  # a registry
        found += map(_function_of, quietly(lambda: list(value.values())) or [])
    if quietly(isinstance, value, types.ModuleType) and depth > 0:
        loaded = vars(value)  # this triggers no lazy import
        for name in names & loaded.keys():
            found += _attributes(loaded[name], names, depth - 1)
    return found


def _function_of(value: Any) -> Any:
    """Return the function behind a static method, a bound method or a decorator."""
    for name in ("__func__", "__wrapped__"):
        inner = quietly(getattr, value, name, None)
        value = value if inner is None else inner
    return value


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a call, or ``None`` if it raises an exception.

    It is for objects that may raise on any access.

    Args:
        function: What to call.
        *args: Its arguments.

    Example:
        >>> quietly(getattr, object(), "size") is None
        True
    """
    try:
        return function(*args)
    except Exception:
        return None


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names in the code, and its strings, since ``getattr`` may take them as names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_torch(function: Any) -> bool:
    """Return whether a function or class is one of torch's own."""
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "torch"
