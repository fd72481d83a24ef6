"""Powers of two that bring the largest entry of each matrix near 1."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_power", "largest_entries"]


def largest_entries(x: Tensor) -> Tensor:
    """Return the largest absolute value in each matrix (..., N, d), shape (..., 1, 1).

    It is NaN if the matrix contains a NaN, and 0 if the matrix is empty.
    """
    if 0 in x.shape[-2:]:
        return x.new_zeros(*x.shape[:-2], 1, 1)
    # Two reductions are faster than one over a copy of absolute values.
    return torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))


def inverse_power(x: Tensor) -> Tensor:
    """Return a power of two near 1 / x: x times this power is at least 1 and below 4.

    It is computed from the bits of the exponent, without rounding. Zero and numbers below the
    smallest normal number get the largest power that exists. Infinity and NaN get the smallest.
    """
    integer, bits = (torch.int64, 52) if x.dtype == torch.float64 else (torch.int32, 23)
    one = 1 << bits  # the last bit of the exponent
    exponent = (1 << (torch.finfo(x.dtype).bits - 1)) - one
    # The largest exponent field of a finite number is twice the bias. So the difference of this and
    # the exponent field of x is the exponent field of the inverse.
    return (exponent - one - (x.view(integer) & exponent)).clamp(min=one).view(x.dtype)
