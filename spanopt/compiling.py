"""Every global setting of ``torch.compile`` that the library makes, and how each is undone.

Dynamo, the front end of ``torch.compile``, takes seconds to import, and many programs never import
it. So these settings are made when Dynamo is imported, or at once if it has been imported already.
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
    """Make Dynamo call a function while tracing, and use the result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports Dynamo.

    Args:
        function: A function that returns a bool, an integer, a string or ``None``. Torch 2.6 does
            not accept a float constant in the backward pass of an ``autograd.Function``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_graph(function: _F) -> _F:
    """Make Dynamo put calls of a function into its graph untraced, once a model is hooked.

    Args:
        function: A function that ``torch.compiler.allow_in_graph`` accepts.
    """
    _in_graph.append(function)
    return function


def not_compiled_alone(tap: type[_T]) -> type[_T]:
    """Keep Dynamo from compiling a tap by itself when uncompiled code calls it.

    Uncompiled code calls the tap after a graph break. A tap compiled by itself could get the result
    of another function, since Dynamo tells functions apart by their address. The address of a
    function such as ``Tensor.is_nested.__get__`` can be reused after the call. In compiled code the
    tap is still traced.

    Args:
        tap: A class that defines ``__torch_function__``.
    """
    _not_compiled_alone.append(tap.__torch_function__.__code__)  # type: ignore[attr-defined]
    return tap


def hold(holder: object) -> None:
    """Make compiled code notice hooks, until all holders have let go.

    By default Dynamo assumes that a module without hooks never gets any (pytorch#117758). Suppose
    that a model was compiled and run before it was hooked. It, and models of its class, would then
    silently be unscaled. So what was compiled under that setting is compiled anew.

    Args:
        holder: An object that has hooks on a model. It counts as long as it is alive.
    """
    _holders.add(holder)
    _when_imported(_set)


def let_go(holder: object) -> None:
    """Let a holder go. When the last one goes, the user's setting is restored.

    Args:
        holder: An object that was given to :func:`hold`. Other objects are ignored.
    """
    _holders.discard(holder)
    if not _holders:
        _forget(_set)
        _restore()


def before_compilations(action: Callable[..., None]) -> None:
    """Call a function before each compilation. This does nothing if Dynamo is not imported.

    ``torch.compiler.reset`` undoes this, so ask for it whenever it is needed.

    Args:
        action: The function. It gets one argument. Asking for the same function again is harmless.
    """
    callbacks: Any = sys.modules.get(f"{_DYNAMO}.callback")
    if callbacks is not None and action not in callbacks.callback_handler.start_callbacks:
        callbacks.callback_handler.register_start_callback(action)


def run_eagerly() -> Callable[[], None]:
    """Run all code that ``torch.compile`` has compiled eagerly in this process.

    Returns:
        A function that ends this. The stance of ``torch.compile`` is then what the user has set.
        Calling it twice is harmless. Code goes on running eagerly while others ask for the same.
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

# The objects that have hooks on a model now, and a token for each request to run eagerly.
_holders: weakref.WeakSet[object] = weakref.WeakSet()
_eager: set[object] = set()

# The user's value of skip_nnmodule_hook_guards, while the library has changed it; otherwise empty.
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
        skip = frames._FrameAction.SKIP  # for this frame and for those that it calls
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
    else:  # torch 2.6
        frames.skip_code(code)


class _EagerWhileAsked:
    """A stance of torch.compile: ``"force_eager"`` while this is asked for, else the user's.

    Other code sets stances too, and restores them in any order. It may restore this object after
    the last request has ended. This object then acts as the user's stance, so nothing stays forced.
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
    # torch.compiler.set_stance would be enough for one caller only. It restores just the stance
    # that came before.
    if not isinstance(frames._stance, _EagerWhileAsked):
        frames._stance = _EagerWhileAsked(frames._stance)


def _restore_stance() -> None:
    frames: Any = sys.modules.get(f"{_DYNAMO}.eval_frame")
    if frames is not None and isinstance(frames._stance, _EagerWhileAsked):
        frames._stance = frames._stance.users


# The functions to call when Dynamo has been imported.
_after_import: set[Callable[[], None]] = set()


def _when_imported(action: Callable[[], None]) -> None:
    """Call a function as soon as Dynamo is imported; now, if it already is."""
    if _DYNAMO in sys.modules:
        importlib.import_module(_DYNAMO)  # waits if another thread is importing it
        action()
        return
    _after_import.add(action)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _forget(action: Callable[[], None]) -> None:
    """Take back a request that was made to :func:`_when_imported`."""
    _after_import.discard(action)
    if not _after_import and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _Finder(MetaPathFinder):
    """Finds Dynamo by the other finders, and calls the waiting functions after its import."""

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
