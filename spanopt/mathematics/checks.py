"""Checks of the arguments of this package's functions: dtypes, shapes, ridges and factors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["can_be_read", "check_factors", "check_ridge", "check_tensors"]


def can_be_read(x: Tensor) -> bool:
    """Return whether the values of a tensor can be read now without waiting for a device."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack():  # such as a tracer, which would keep what was read
        return False
    return type(x) is Tensor and x.device.type == "cpu"


def check_ridge(ridge: float | None) -> None:
    """Refuse a ridge that is negative or not finite.

    Args:
        ridge: A number, or ``None`` for the default of the dtype.

    Raises:
        TypeError: The ridge is not a number.
        ValueError: The ridge is negative or not finite.

    Example:
        >>> check_ridge(-1.0)
        Traceback (most recent call last):
        ...
        ValueError: the ridge must be finite and at least 0, got -1.0
    """
    if ridge is not None and not isinstance(ridge, (int, float)):
        raise TypeError(f"the ridge must be a number, got {ridge!r}")
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise ValueError(f"the ridge must be finite and at least 0, got {ridge}")


def check_tensors(basis: Tensor, x: Tensor, ridge: float | None, mask: Tensor | None) -> None:
    """Refuse dtypes, layouts, shapes, a ridge or a mask that this package cannot handle."""
    for name, tensor in (("basis", basis), ("gradient", x)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"the {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:  # torch 2.6 traces no tensor.is_*() in a backward
            raise TypeError(f"the {name} must be real floating point, got {tensor.dtype}")
        if not torch.compiler.is_compiling() and tensor.layout != torch.strided:
            raise TypeError(f"the {name} must be a dense tensor, got {tensor.layout}")
    if basis.ndim < 2 or x.ndim < 2 or basis.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            "basis and gradient must be (..., N, d) with equal leading dimensions and tokens, "
            f"got {tuple(basis.shape)} and {tuple(x.shape)}"
        )
    check_ridge(ridge)
    if mask is None:
        return
    if getattr(mask, "dtype", None) != torch.bool:
        found = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"the mask must be boolean, true at real tokens, got {found}")
    try:
        fits = torch.broadcast_shapes(mask.shape, basis.shape[:-1]) == basis.shape[:-1]
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"the mask must broadcast to {tuple(basis.shape[:-1])}, got {tuple(mask.shape)}"
        )


def check_factors(grad: Tensor, *factors: float | Tensor) -> None:
    """Refuse factors that are neither one number nor one number per head of the gradient."""
    for factor in factors:
        if not isinstance(factor, (Tensor, float, int)):
            raise TypeError(f"a factor must be a number or a tensor, got {type(factor).__name__}")
        shape = tuple(factor.shape) if isinstance(factor, Tensor) else ()
        if shape and (grad.ndim < 3 or shape != (grad.shape[-3],)):
            raise ValueError(
                "a factor must have shape () or (H,) for a gradient (..., H, N, d), "
                f"got {shape} for {tuple(grad.shape)}"
            )
