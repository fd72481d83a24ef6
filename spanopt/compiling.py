"""Every global setting of torch.compile that the library makes, and its undoing.

Dynamo, the front end of ``torch.compile``, takes seconds to import, and many programs never do.
What is set here is therefore set when Dynamo is imported, or at once where it has been.
"""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch

__all__ = [
    "before_compilations",
    "constant_when_traced",
    "hold",
    "in_graph",
    "let_go",
    "not_compiled_alone",
    "run_eagerly",
]

_DYNAMO = "torch._dynamo"
_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


def constant_when_traced(function: _F) -> _F:
    """Have Dynamo call a function as it traces it, and take the result for a constant.

    That is ``torch.compiler.assume_constant_result``, which imports Dynamo.

    Args:
        function: One that returns a bool, an integer, a string or ``None``: torch 2.6 takes no
            float for a constant in the backward pass of an ``autograd.Function``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_graph(function: _F) -> _F:
    """Have Dynamo put calls of a function into its graph as they are, from the first hook on.

    Args:
        function: As ``torch.compiler.allow_in_graph`` takes it.
    """
    _in_graph.append(function)
    return function


def not_compiled_alone(tap: type[_T]) -> type[_T]:
    """Have Dynamo leave a tap alone that is called by code that it does not compile.

    That is so after a graph break. Compiled by itself, the tap could be given the result of another
    function: Dynamo tells functions by their address, and that of ``Tensor.is_nested.__get__`` and
    its like is free for another one after the call. In compiled code the tap is traced as ever.

    Args:
        tap: A class with a ``__torch_function__`` of its own.
    """
    _not_compiled_alone.append(tap.__torch_function__.__code__)  # type: ignore[attr-defined]
    return tap


def hold(holder: object) -> None:
    """Have compiled code and hooks notice each other, until all holders have let go.

    By default Dynamo takes a module without hooks to stay so (pytorch#117758). A model that was
    compiled and run before it was hooked, or one of the same class as such a model, would be
    silently unscaled. What was compiled under that setting is therefore compiled anew.

    Args:
        holder: What has hooks on a model. It counts as long as it lives.
    """
    _holders.add(holder)
    _when_imported(_set)


def let_go(holder: object) -> None:
    """Let a holder go. The last one that goes restores what the user had set.

    Args:
        holder: As given to :func:`hold`; others are passed over.
    """
    _holders.discard(holder)
    if not _holders:
        _forget(_set)
        _restore()


def before_compilations(action: Callable[..., None]) -> None:
    """Have something done before each compilation, as far as Dynamo is imported.

    ``torch.compiler.reset`` takes this off again, so ask for it whenever it is needed.

    Args:
        action: Called with one argument. Asking for the same function again is harmless.
    """
    callbacks: Any = sys.modules.get(f"{_DYNAMO}.callback")
    if callbacks is not None and action not in callbacks.callback_handler.start_callbacks:
        callbacks.callback_handler.register_start_callback(action)


def run_eagerly() -> Callable[[], None]:
    """Have all code that torch.compile has compiled run eagerly in this process.

    Returns:
        A function that ends it; the stance of torch.compile is then what the user has set. Calling
        it twice is harmless. While others ask for the same, code goes on running eagerly.
    """
    asking = object()
    _eager.add(asking)
    _when_imported(_set_stance)

    def end() -> None:
        _eager.discard(asking)
        if not _eager:
            _forget(_set_stance)
            _restore_stance()

    return end


_in_graph: list[Callable[..., Any]] = []
_not_compiled_alone: list[Any] = []

# Those that have hooks on a model just now, and those who have asked that compiled code run
# eagerly.
_holders: weakref.WeakSet[object] = weakref.WeakSet()
_eager: set[object] = set()

# The value of skip_nnmodule_hook_guards that the user had set, while it is ours; else empty.
_users_value: list[bool] = []


def _set() -> None:
    dynamo: Any = sys.modules[_DYNAMO]
    for function in _in_graph:
        torch.compiler.allow_in_graph(function)
    for code in _not_compiled_alone:
        _leave_alone(code)
    if dynamo.config.skip_nnmodule_hook_guards:
        _users_value[:] = [True]
        dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def _restore() -> None:
    if _users_value:
        dynamo: Any = sys.modules[_DYNAMO]
        dynamo.config.skip_nnmodule_hook_guards = _users_value.pop()


def _leave_alone(code: Any) -> None:
    frames: Any = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP  # this frame, and those that it calls
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
    else:  # torch 2.6
        frames.skip_code(code)


class _EagerWhileAsked:
    """A stance of torch.compile: ``"force_eager"`` while somebody asks for it, else the user's.

    Others set stances too, and set them back in any order. Where this one is put back after its
    time, it is the user's stance by then, so that nothing is left in force.
    """

    def __init__(self, stance: Any) -> None:
        self.users = stance

    @property
    def stance(self) -> str:
        name: str = self.users.stance
        return "force_eager" if _eager else name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.users, name)


def _set_stance() -> None:
    frames: Any = sys.modules[f"{_DYNAMO}.eval_frame"]
    # torch.compiler.set_stance would do for one caller, and knows only the stance before it.
    if not isinstance(frames._stance, _EagerWhileAsked):
        frames._stance = _EagerWhileAsked(frames._stance)


def _restore_stance() -> None:
    frames: Any = sys.modules.get(f"{_DYNAMO}.eval_frame")
    if frames is not None and isinstance(frames._stance, _EagerWhileAsked):
        frames._stance = frames._stance.users


# What to do when Dynamo has been imported.
_after_import: set[Callable[[], None]] = set()


def _when_imported(action: Callable[[], None]) -> None:
    """Do something as soon as Dynamo is imported: now, if it is."""
    if _DYNAMO in sys.modules:
        importlib.import_module(_DYNAMO)  # waits for a thread that is importing it
        action()
        return
    _after_import.add(action)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _forget(action: Callable[[], None]) -> None:
    """Do nothing, after all, when Dynamo is imported."""
    _after_import.discard(action)
    if not _after_import and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _Finder(MetaPathFinder):
    """Finds Dynamo where the others do, and does what is to be done after its import."""

    def __init__(self) -> None:
        self.is_asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _DYNAMO or self.is_asking:
            return None
        self.is_asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.is_asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_set(module: ModuleType) -> None:
            execute(module)
            for action in [*_after_import]:
                _forget(action)
                action()

        spec.loader.exec_module = execute_and_set  # type: ignore[method-assign]
        return spec


_finder = _Finder()
