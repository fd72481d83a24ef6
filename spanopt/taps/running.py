"""Finding which layer is running. No other file of the package walks Python frames."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.checkpoint import __file__ as _CHECKPOINT_FILE

__all__ = [
    "Place",
    "calling_frame",
    "calls_forward_directly",
    "calls_of",
    "is_checkpointed",
    "is_own",
    "place_in",
    "roots_of_backward",
    "traced_place_in",
]

_CALL: CodeType = nn.Module._call_impl.__code__
# The functions that run a backward pass, with their arguments for the tensors it begins at.
_ROOTS = {torch.autograd.backward.__code__: "tensors", torch.autograd.grad.__code__: "outputs"}


class Place(NamedTuple):
    """Where code runs in relation to a layer.

    Attributes:
        inside: Whether the layer's forward pass is on this thread's stack, with no module of
            another model between it and the code.
        repeated: Whether activation checkpointing lies between. Backward will run this part again
            without the layer, so its nodes must keep what they save.
    """

    inside: bool
    repeated: bool = False


def calling_frame() -> tuple[FrameType | None, int]:
    """Return the frame of the module call whose hook is running, and its position in its code.

    A frame that an exception has left is no longer at that position, since ``Module._call_impl``
    catches every exception and raises it again. The frame is ``None`` if another function calls
    the hook, or ``_call_impl`` as ``torch.compile`` has rewritten it, which catches none.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(6):
        if frame is None:
            break
        if frame.f_code is _CALL:
            return frame, frame.f_lasti
        frame = frame.f_back
    return None, 0


def place_in(module: nn.Module, frame: FrameType | None = None) -> Place:
    """Return where the caller runs in relation to a layer.

    Args:
        module: The layer.
        frame: The frame of the layer's innermost call, if it is known.
    """
    repeated = forward = False
    known: nn.Module | None = module
    for name, owner, at in _frames():
        if owner is module:
            if at is frame or (frame is None and "_call_impl" in name):
                return Place(True, repeated)
            forward = forward or (frame is None and "forward" in name)
        elif owner is None:
            repeated = True
        elif owner is not known and not forward:
            if not is_own(owner, module):
                return Place(False)
            known = owner
    return Place(forward)


def is_own(other: nn.Module, layer: nn.Module) -> bool:
    """Return whether what a module computes inside a layer is the layer's own computation.

    It is if the module is the layer, lies in it, contains it, or has no parameters but the layer's.
    It is not if ``torch.compile`` made the module: such a graph already has its nodes in it.
    """
    if hasattr(other, "compile_subgraph_reason"):
        return False
    if any(part is other for part in layer.modules()):
        return True
    own = set(layer.parameters())
    if all(parameter in own for parameter in other.parameters()):
        return True
    return any(part is layer for part in other.modules())


def calls_of(module: nn.Module) -> int:
    """Return how many calls of the module are under way in this thread."""
    calls, forwards = 0, 0
    for name, owner, _ in _frames():
        if owner is module:
            calls += "_wrapped_call_impl" in name
            forwards += "_call_impl" in name or "forward" in name
    return calls or min(forwards, 1)


def calls_forward_directly(module: nn.Module, *, traced: bool = False) -> bool:
    """Return whether this thread is in a module's forward that no call of the module made.

    Args:
        module: The module.
        traced: Look only at what ``torch.compile`` is tracing.
    """
    forward = False
    for name, owner, frame in _frames():
        if owner is module:
            if "_call_impl" in name:
                return False
            forward = forward or (name == "forward" and not (traced and frame is not None))
    if forward and traced:
        # A forward that is compiled by itself may also be run by calls of the module.
        return all(owner is not module for _, owner, _ in _traced(_translators()[-1]))
    return forward


def roots_of_backward() -> list[Any]:
    """Return the nodes of the autograd graph that the current backward pass begins at.

    Autograd may run on a thread of its own for a device. Then these are the nodes of all backward
    passes that other threads are in.
    """
    own = _roots_in(sys._getframe(1))
    if own is not None:
        return own
    others = [_roots_in(frame) or [] for frame in sys._current_frames().values()]
    return [node for nodes in others for node in nodes]


def _roots_in(frame: FrameType | None) -> list[Any] | None:
    """Return the nodes that a thread's innermost backward pass begins at; ``None`` without one."""
    while frame is not None:
        name = _ROOTS.get(frame.f_code)
        if name is not None:
            given = frame.f_locals[name]
            tensors = given if isinstance(given, (tuple, list)) else [given]
            nodes = [getattr(x, "grad_fn", None) or getattr(x, "node", None) for x in tensors]
            return [node for node in nodes if node is not None]
        frame = frame.f_back
    return None


def is_checkpointed() -> bool:
    """Return whether this thread is in a checkpoint that backward will run again."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            # If no input needs a gradient, backward will not run it again.
            return bool(frame.f_locals["ctx"].next_functions)
        frame = frame.f_back
    return False


def _frames() -> Iterator[tuple[str, nn.Module | None, FrameType | None]]:
    """Yield function name, module and frame of the calls under way in this thread, innermost first.

    These are the calls of modules' methods, and of activation checkpointing, which has no module.
    What ``torch.compile`` is tracing has no frame. It comes before the calls around the tracer.
    """
    frame: FrameType | None = sys._getframe(1)
    traced: Any = None
    while frame is not None:
        # Names are compared, since torch.compile replaces the code. Its new name contains the old.
        code = frame.f_code
        name = code.co_name
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                yield name, owner, frame
            elif owner is not traced and hasattr(owner, "symbolic_locals"):
                traced = owner
                yield from _traced(owner)
        elif name == "checkpoint" and code.co_filename == _CHECKPOINT_FILE:
            yield name, None, frame
        frame = frame.f_back


def _traced(translator: Any) -> Iterator[tuple[str, nn.Module | None, FrameType | None]]:
    """Yield the same for a frame that ``torch.compile`` is tracing, if it has a module."""
    owner = getattr(_variable_of_self(translator), "value", None)
    if isinstance(owner, nn.Module):
        yield translator.f_code.co_name, owner, None


def _variable_of_self(translator: Any) -> Any:
    """Return Dynamo's variable for ``self`` in a frame that ``torch.compile`` is tracing."""
    variable = translator.symbolic_locals.get("self")
    return getattr(variable, "_cache", variable)  # Dynamo creates some variables lazily


class TracedPlace(NamedTuple):
    """Where code that ``torch.compile`` is tracing runs in relation to a layer.

    Attributes:
        inside: Whether the layer's forward is on this thread's stack.
        whole: Whether the layer's call is being traced too. If not, the layer runs uncompiled and
            calls what is being traced.
        known: Whether the place is settled: the compiled code will run here only, or no graph
            break is allowed.
    """

    inside: bool
    whole: bool
    known: bool


def traced_place_in(module: nn.Module) -> TracedPlace:
    """Return where the code that is being traced runs in relation to a layer.

    Args:
        module: The layer.
    """
    inside = place_in(module).inside
    translators = _translators()
    if any(
        "_call_impl" in name and owner is module
        for translator in translators
        for name, owner, _ in _traced(translator)
    ):
        return TracedPlace(inside, True, True)
    whole = translators[-1] if translators else None
    variable: Any = None if whole is None else _variable_of_self(whole)
    if isinstance(getattr(variable, "value", None), nn.Module):
        from torch._dynamo.guards import GuardBuilder, install_guard

        # The code is a method of a module. The guard keeps it from running for other modules.
        install_guard(variable.source.make_guard(GuardBuilder.ID_MATCH))
        return TracedPlace(inside, False, True)
    can_break = not (getattr(whole, "one_graph", True) or _forbids_breaks(translators))
    return TracedPlace(inside, False, not can_break)


def _forbids_breaks(translators: list[Any]) -> bool:
    return any(getattr(x, "error_on_graph_break", False) for x in translators)


def _translators() -> list[Any]:
    """Return the tracers of the frames that ``torch.compile`` is tracing, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    found: list[Any] = []
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if hasattr(owner, "symbolic_locals") and not any(owner is x for x in found):
                found.append(owner)
        frame = frame.f_back
    return found
