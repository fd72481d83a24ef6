"""Precision of the mathematics: the dtype that is computed in, its rounding unit, the ridge."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["compute_dtype", "default_ridge", "full_precision", "matmul_eps"]


def default_ridge(dtype: torch.dtype) -> float:
    """Return the relative ridge that :func:`project` uses by default for a basis of this dtype.

    It is ``eps ** 1.6``, where ``eps`` is the rounding unit of the matrix products. This ridge is
    8e-12 in float32 and 9e-26 in float64. float16 and bfloat16 are computed in float32. If
    ``torch.set_float32_matmul_precision`` allows float32 products of fewer bits, ``eps`` is that of
    such products.

    Args:
        dtype: A real floating-point dtype.

    Returns:
        The ridge, relative to the squared Frobenius norm of the basis.

    Example:
        >>> import torch
        >>> f"{default_ridge(torch.float64):.0e}"
        '9e-26'
    """
    return float(matmul_eps(compute_dtype(dtype)) ** 1.6)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that tensors of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_eps(dtype: torch.dtype) -> float:
    """Return the rounding unit of a matrix product of this dtype under the user's settings."""
    if dtype == torch.float32 and _float32_products_are_shortened():
        return 2.0**-10
    return torch.finfo(dtype).eps


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Return a context in which autocast does not compute matrix products in half precision."""
    if not _has_autocast(device_type):
        return nullcontext()
    # Entering the context takes longer than checking whether it is needed.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _float32_products_are_shortened() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


# This is what torch.compiler.assume_constant_result does, but that takes seconds to import the
# compiler. Torch 2.6 cannot trace these two functions. It takes a bool as a constant, but no float.
_constants: tuple[Any, ...] = (_has_autocast, _float32_products_are_shortened)
for _constant in _constants:
    _constant._dynamo_marked_constant = True
