"""Settings of torch.compile that taps need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo

__all__ = ["keep_eager_taps_eager", "let_compiled_code_notice_hooks", "run_eagerly"]


def let_compiled_code_notice_hooks() -> None:
    """Have torch.compile guard on hooks, so that compiled code is never run in their place.

    By default it takes a module without hooks to stay so (pytorch#117758): a model that was
    compiled and run before it was hooked, or one of the same class as a model that was, would be
    silently unscaled. What was compiled under the default is compiled anew.
    """
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def keep_eager_taps_eager(*taps: type) -> None:
    """Have torch.compile leave a tap alone that is called by code that it does not compile.

    That is so after a graph break. Compiled by itself, the tap could be given the result of another
    function: Dynamo tells functions by their address, and that of ``Tensor.is_nested.__get__`` and
    its like is free for another one after the call. In compiled code the tap is traced as ever.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    for tap in taps:
        code = tap.__torch_function__.__code__  # type: ignore[attr-defined]
        if hasattr(dynamo, "set_code_exec_strategy"):
            skip = dynamo._FrameAction.SKIP  # this frame, and those that it calls
            dynamo.set_code_exec_strategy(code, dynamo._FrameExecStrategy(skip, skip))
        else:  # torch 2.6
            dynamo.skip_code(code)


# Those who have asked that compiled code run eagerly.
_eager: set[object] = set()


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


def run_eagerly() -> Callable[[], None]:
    """Have all code that torch.compile has compiled run eagerly in this process.

    Returns:
        A function that ends it; the stance of torch.compile is then what the user has set. Calling
        it twice is harmless. While others ask for the same, code goes on running eagerly.
    """
    from torch._dynamo import eval_frame

    asking = object()
    _eager.add(asking)
    # torch.compiler.set_stance would do for one caller, and knows only the stance before it.
    if not isinstance(eval_frame._stance, _EagerWhileAsked):
        eval_frame._stance = _EagerWhileAsked(eval_frame._stance)  # type: ignore[assignment]

    def end() -> None:
        _eager.discard(asking)
        if not _eager and isinstance(eval_frame._stance, _EagerWhileAsked):
            eval_frame._stance = eval_frame._stance.users

    return end
