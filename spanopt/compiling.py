"""Settings of torch.compile that taps need."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo

__all__ = ["keep_eager_taps_eager", "let_compiled_code_notice_hooks"]


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
