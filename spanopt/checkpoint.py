"""The entries that the wrapper adds to an optimizer's state dict, and how loading checks them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from spanopt.groups import SpanGroup, entries_of, scales_of
from spanopt.patterns import check_same_layers
from spanopt.scale import SpanScale

__all__ = ["extended", "load_into"]

_SCALES = "span_groups"
_PARAMETERS = "span_parameters"
_ELEMENTWISE = {
    "acc_delta",
    "exp_avg",
    "exp_avg_sq",
    "exp_inf",
    "max_exp_avg_sq",
    "momentum_buffer",
    "prev",
    "square_avg",
    "step_size",
    "sum",
}


def extended(optimizer: Optimizer, groups: Sequence[SpanGroup], model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state dict with the scales, and names and shapes of its parameters.

    Args:
        optimizer: The wrapped optimizer. If it is a wrapper too, its scales are kept.
        groups: The scales. If there are none, the optimizer's state dict alone is returned.
        model: The model, for the parameters' names.
    """
    state_dict = dict(optimizer.state_dict())
    if not groups:
        return state_dict
    own = [group.plain() for group in groups]
    described = _described(model, optimizer.param_groups)
    scales = [*state_dict.get(_SCALES, []), *own]
    return {**state_dict, _SCALES: scales, _PARAMETERS: described}


def load_into(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    model: nn.Module,
    groups: Sequence[SpanGroup] | None,
    set_scales: Callable[[Mapping[str, SpanScale]], None],
) -> None:
    """Load a state dict of a wrapper, or of the bare optimizer.

    Args:
        optimizer: The wrapped optimizer.
        state_dict: From :func:`extended`, or the optimizer's own. It is changed in place.
        model: The model, for the parameters' names.
        groups: The scales; ``None`` for a detached wrapper, which loads those of any model.
        set_scales: Sets scales by layer name.

    Raises:
        ValueError: It is not a state dict, or it is one of another model or optimizer. Optimizer
            and scales are then as they were.
    """
    scales = {}
    if groups is not None:
        nested = hasattr(optimizer, "span_groups")
        scales = _take_scales(state_dict, groups, nested=nested)
    check = groups is not None
    _take_parameters(state_dict, model, optimizer.param_groups, check=check)
    _check_state(state_dict, optimizer, model)
    before = {group["name"]: group.scale for group in groups or ()}
    with _restoring(optimizer, state_dict, lambda: set_scales(before)):
        set_scales(scales)
        optimizer.load_state_dict(state_dict)


def _take_scales(
    state_dict: dict[str, Any], groups: Iterable[SpanGroup], *, nested: bool
) -> dict[str, SpanScale]:
    """Take the scales of these groups out of a state dict.

    Args:
        state_dict: From :func:`extended`, or a bare optimizer's. It is changed in place.
        groups: The scales of the model.
        nested: Whether the wrapped optimizer is a wrapper too. Entries of other layers then
            belong to it, and stay in the state dict.

    Returns:
        The scales by layer name; empty if the state dict has none.

    Raises:
        ValueError: The layers are not those of the groups.
    """
    if _SCALES not in state_dict:
        return {}
    saved = state_dict.pop(_SCALES)
    names = [group["name"] for group in groups]
    if not nested:
        own = scales_of(saved)
    else:  # the wrapper inside has put its entries before those of this one
        entries = dict(enumerate(entries_of(saved)))
        last = {name: place for place, (name, _) in entries.items()}
        own = {name: entries.pop(last[name])[1] for name in names if name in last}
        if entries:
            state_dict[_SCALES] = [saved[place] for place in entries]
    advice = "Remove 'span_groups' from the state dict to load the optimizer's state alone"
    check_same_layers(own, names, advice)
    return own


def _check_state(state_dict: Mapping[str, Any], optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse state whose shape is wrong, which PyTorch would load without an error.

    The right shape is known in two cases. The optimizer may have such an entry already. Or the
    entry is a running average of ``torch.optim`` or torch-optimizer: these have the shape of their
    parameter.

    Args:
        state_dict: What will be loaded into the optimizer.
        optimizer: The optimizer.
        model: The model, for the parameters' names.

    Raises:
        ValueError: A tensor has another shape. The message names the parameter.
    """
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    known = type(optimizer).__module__.startswith(("torch.optim.", "torch_optimizer."))
    try:
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        state = state_dict["state"]
        pairs = [(p, state.get(i)) for i, p in zip(indices, _parameters(optimizer), strict=False)]
    except (AttributeError, KeyError, TypeError):
        return  # the optimizer's own error says what is wrong with it
    for parameter, saved in pairs:
        if not isinstance(saved, Mapping):
            continue
        present = optimizer.state.get(parameter, {})
        for key, value in saved.items():
            expected = present.get(key) if isinstance(present, Mapping) else None
            if expected is None and known and key in _ELEMENTWISE:
                expected = parameter
            if not (isinstance(value, Tensor) and isinstance(expected, Tensor)):
                continue
            if value.shape != expected.shape and max(value.ndim, expected.ndim) > 0:
                raise ValueError(
                    f"{names.get(id(parameter), 'a parameter that is not in the model')}: {key} "
                    f"has the shape {tuple(value.shape)} in the checkpoint, and must have "
                    f"{tuple(expected.shape)}"
                )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _take_parameters(
    state_dict: dict[str, Any],
    model: nn.Module,
    param_groups: Iterable[Mapping[str, Any]],
    *,
    check: bool,
) -> None:
    """Take names and shapes of the parameters out of a state dict, and compare them.

    Args:
        state_dict: From :func:`extended`, or a bare optimizer's. It is changed in place.
        model: The model, for the parameters' names.
        param_groups: The optimizer's parameter groups.
        check: Whether to compare.

    Raises:
        ValueError: The shapes are those of another model, or of other parameter groups.
    """
    saved = state_dict.pop(_PARAMETERS, None)
    if saved is None or not check:
        return
    here = _described(model, param_groups)
    try:
        saved = [[(str(name), list(shape)) for name, shape in group] for group in saved]
    except (TypeError, ValueError) as error:
        raise ValueError("'span_parameters' is not what state_dict() saves") from error
    # Compare by position, as the optimizer does: a wrapper of the model changes the names.
    shapes, own = ([[x[1] for x in group] for group in groups] for groups in (saved, here))
    if shapes != own:
        raise ValueError(
            "the checkpoint is of another model or of other parameter groups: "
            + "; ".join(_differences(saved, here))
        )


@contextlib.contextmanager
def _restoring(
    optimizer: Optimizer, state_dict: Mapping[str, Any], undo: Callable[[], None]
) -> Iterator[None]:
    """Put an optimizer back as it was if loading a state dict fails.

    Args:
        optimizer: The optimizer that loads it.
        state_dict: What it loads, for the message.
        undo: Called on failure, to restore what the optimizer does not hold.

    Raises:
        ValueError: What is loaded is not a state dict.
    """
    state, param_groups = optimizer.state, optimizer.param_groups
    try:
        yield
    except BaseException as error:
        undo()
        for name, value in (("state", state), ("param_groups", param_groups)):
            if getattr(optimizer, name) is not value:
                setattr(optimizer, name, value)
        if isinstance(error, (KeyError, TypeError, AttributeError)):
            raise ValueError(
                f"not a state dict of {type(optimizer).__name__}, but one of "
                f"{sorted(map(str, state_dict))}: {type(error).__name__}: {error}"
            ) from error
        raise


def _described(
    model: nn.Module, param_groups: Iterable[Mapping[str, Any]]
) -> list[list[list[Any]]]:
    """Return the name and the shape of each parameter, by parameter group."""
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    return [
        [[names.get(id(p), "not in the model"), list(p.shape)] for p in group["params"]]
        for group in param_groups
    ]


def _differences(saved: Sequence[Any], here: Sequence[Any]) -> list[str]:
    """Say how the parameters of a checkpoint differ from those of a model, in at most 11 lines."""
    was, now = (
        {name: shape for group in groups for name, shape in group} for groups in (saved, here)
    )
    lines = [f"{name}: only in the checkpoint, {was[name]}" for name in was if name not in now]
    lines += [f"{name}: only in the model, {now[name]}" for name in now if name not in was]
    lines += [
        f"{name}: {was[name]} in the checkpoint, {now[name]} in the model"
        for name in was
        if name in now and was[name] != now[name]
    ]
    if not lines:
        sizes = [[len(group) for group in groups] for groups in (saved, here)]
        return [f"parameters by group: {sizes[0]} in the checkpoint, {sizes[1]} in the optimizer"]
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    return [*lines[:10], *more]
