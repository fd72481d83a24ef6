"""The fused formulation: CholeskyQR2 in one or three kernel launches, as an operator of PyTorch.

The kernels are in :mod:`spanopt.mathematics.triton_kernels`. That module imports Triton, so it is
imported only when a kernel is first run.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spanopt.mathematics.gram import shift_for
from spanopt.mathematics.precision import default_ridge
from spanopt.mathematics.spans import Total

__all__ = ["combined", "why_not"]

WIDEST = 128
"""The largest d of the kernels. A d is padded to a power of two, to 16 at least."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SHARED = {
    "bf16x3": {16: 20_480, 32: 20_480, 64: 49_152, 128: 147_456},
    "bf16x6": {16: 49_152, 32: 49_152, 64: 106_496, 128: 221_184},
}
"""The shared memory in bytes that a program takes, by precision and padded width.

These numbers are what Triton 3.7 reports after compiling the kernels, for Ampere or Hopper,
whichever is more. An A100 has 166,912 bytes, an H100 232,448 and most other cards 101,376.
"""


def why_not(basis: Tensor, x: Tensor, total: Total | None) -> str:
    """Return why the kernels cannot be used for these tensors; an empty text if they can."""
    width = basis.shape[-1]
    if basis.dtype not in _DTYPES or x.dtype not in _DTYPES:
        return f"it takes bfloat16, float16 and float32, not {basis.dtype} and {x.dtype}"
    if x.shape[-1] != width or width > WIDEST:
        return (
            f"it takes a gradient as wide as Q, of at most {WIDEST} features, "
            f"not {x.shape[-1]} and {width}"
        )
    if total is not None:
        return "it takes no sequences whose tokens are spread over processes"
    shared = SHARED[_precision(basis.dtype, x.dtype)][_padded(width)]
    return _unfit_device(basis.device.type, basis.device.index, shared)


def combined(
    basis: Tensor,
    x: Tensor,
    *,
    ridge: float | None,
    mask: Tensor | None,
    factor: Tensor | None = None,
    rest: Tensor | None = None,
    parts: int = 0,
) -> Tensor:
    """Return ``factor * P x + rest * x``: see :func:`spanopt.mathematics.formulations.combined`.

    Args:
        basis: Q, shape ``(..., N, d)``. It counts as a constant.
        x: Shape ``(..., N, d)``. The result is differentiable in it.
        ridge: The ridge as the user gave it; ``None`` for the default.
        mask: Boolean, broadcastable to ``(..., N)``, true at real tokens, or ``None`` if all are.
        factor: Shape ``()`` or ``(H, 1, 1)``; ``None`` for 1.
        rest: Shape ``()`` or ``(H, 1, 1)``; with ``None`` nothing is added.
        parts: The number of parts that the tokens of each matrix are split into; 0 for a number
            that suits the device.
    """
    if not torch.compiler.is_compiling():
        _count_operations()
    precision = _precision(basis.dtype, x.dtype)
    ridge = max(default_ridge(torch.float32), ridge or 0.0)
    if mask is not None:
        mask = mask.expand(basis.shape[:-1])
    return _combined(x, basis.detach(), mask, factor, rest, ridge, precision, parts)


@torch.library.custom_op("spanopt::combined", mutates_args=())
def _combined(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    rest: Tensor | None,
    ridge: float,
    precision: str,
    parts: int,
) -> Tensor:
    out = _like(x)
    if out.numel():
        # A kernel is launched on the current device, so that must be the device of the tensors.
        with torch.cuda.device_of(x):
            _launch(out, _by_head(x), _by_head(basis), mask, factor, rest, ridge, precision, parts)
    return out.view(x.shape)


@_combined.register_fake
def _(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    rest: Tensor | None,
    ridge: float,
    precision: str,
    parts: int,
) -> Tensor:
    return _like(x).view(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, basis, mask, factor, rest, *ctx.options = inputs
    ctx.save_for_backward(basis, mask, factor, rest)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of x: the operator again, since it is linear in x and symmetric."""
    return _combined(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 7


_combined.register_autograd(_backward, setup_context=_save)


def flops(
    x_shape: torch.Size, basis_shape: torch.Size, *args: Any, out_shape: Any = None, **options: Any
) -> int:
    """Return the floating-point operations of the operator, for PyTorch's ``FlopCounterMode``.

    These are the operations of six products over tokens, of three products and two factorisations
    of d x d matrices, and of two inverses of factors.
    """
    *leading, n, d = basis_shape
    matrices = int(torch.Size(leading).numel())
    return matrices * (12 * n * d**2 + 6 * d**3 + 2 * d**3)


@lru_cache(maxsize=1)
def _count_operations() -> None:
    """Register the formula once, when the operator is first used, since this imports Triton."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.spanopt.combined)(flops)


def _launch(
    out: Tensor,
    x: Tensor,
    q: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    rest: Tensor | None,
    ridge: float,
    precision: str,
    parts: int,
) -> None:
    """Run the kernels on tensors (batch, heads, N, d)."""
    import triton

    from spanopt.mathematics import triton_kernels as kernels

    batch, heads, length, d = x.shape
    matrices, width = batch * heads, _padded(d)
    if mask is not None:
        mask = mask.reshape(batch, heads, length).view(torch.uint8)
    of_mask = (0, 0, 0) if mask is None else mask.stride()
    factors = [0 if f is None or f.ndim == 0 else f.stride(0) for f in (factor, rest)]
    shift = max(shift_for(torch.finfo(torch.float32).eps), ridge)
    sizes = heads, length, d
    interpreted = triton.knobs.runtime.interpret  # the interpreter computes in full float32
    options = settings(width, "ieee" if interpreted else precision)
    products = torch.float32 if interpreted else q.dtype
    gram_options = {**options, "GRAM": getattr(triton.language, str(products)[6:])}
    parts = parts or _parts(matrices, length, options["ROWS"], x.device)
    if parts == 1 and width <= 64:  # a wider single kernel would not fit a multiprocessor
        kernels.fused[(matrices,)](
            out, x, q, mask, factor, rest, *x.stride(), *q.stride(), *of_mask, *out.stride(),
            *factors, *sizes, ridge, shift, **gram_options,
        )  # fmt: skip
        return
    grid = (matrices * parts,)
    grams, ms, us = x.new_empty((3, matrices * parts, width, width), dtype=torch.float32)
    scales = x.new_empty(matrices * parts, dtype=torch.float32)
    ts = x.new_empty((matrices, width, width), dtype=torch.float32)
    kept = x.new_empty((matrices, 2), dtype=torch.float32)
    kernels.gram[grid](grams, scales, q, mask, *q.stride(), *of_mask, *sizes, parts, **gram_options)
    kernels.inner[grid](
        ms, us, ts, kept, grams, scales, x, q, mask, *x.stride(), *q.stride(), *of_mask,
        *sizes, parts, shift, **options,
    )  # fmt: skip
    kernels.outer[grid](
        out, ms, us, ts, kept, x, q, mask, factor, rest, *x.stride(), *q.stride(), *of_mask,
        *out.stride(), *factors, *sizes, parts, ridge, shift, **options,
    )  # fmt: skip


def settings(width: int, precision: str) -> dict[str, Any]:
    """Return the settings that the kernels are compiled with.

    They were chosen by what the compiler reports. With them hardly any register is spilled up to a
    width of 64. At a width of 128, blocks of 32 rows leave room for T and the coefficients.
    """
    narrow = width <= 64
    return {
        "WIDTH": width,
        "ROWS": 64 if narrow else 32,
        "PRECISION": precision,
        "num_warps": 4 if narrow else 8,
        "num_stages": 2 if narrow else 1,
    }


def _by_head(x: Tensor) -> Tensor:
    """Return x as (batch, heads, N, d). This is a view if x has no more than four dimensions."""
    heads = x.shape[-3] if x.ndim > 2 else 1
    return x.reshape(x.shape[:-3].numel(), heads, *x.shape[-2:])


def _like(x: Tensor) -> Tensor:
    """Return a new tensor for a result of x, as (batch, heads, N, d)."""
    return torch.empty_like(_by_head(x))


def _padded(d: int) -> int:
    """Return the least power of two that is at least d and at least 16, as tensor cores need."""
    width = 16
    while width < d:
        width *= 2
    return width


def _precision(basis: torch.dtype, x: torch.dtype) -> str:
    """Return Triton's name for the precision: a float32 number is split into bfloat16 terms.

    Two terms (16 bits, ``"bf16x3"``) are enough for bfloat16, and where the user allows shorter
    float32 products. Three terms (24 bits, ``"bf16x6"``) hold all of float32.
    """
    short = basis == x == torch.bfloat16 or default_ridge(torch.float32) > 1e-6
    return "bf16x3" if short else "bf16x6"


def _parts(matrices: int, length: int, rows: int, device: torch.device) -> int:
    """Return into how many parts the tokens are split, so that a multiprocessor gets two programs.

    A part has at least four blocks of rows, so that its products outweigh its factorisation.
    """
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // matrices
    return max(1, min(wanted, length // (4 * rows)))


def _unfit_device(kind: str, index: int | None, shared: int) -> str:
    """Return why the kernels do not run on a device; an empty text if they do."""
    return _found_unfit(kind, index, shared)


# Dynamo calls this function while tracing. It would trace through the cache of the other function.
_unfit_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _found_unfit(kind: str, index: int | None, shared: int) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if kind != "cuda" or torch.version.hip is not None:
        return f"it runs on GPUs of NVIDIA, not on the device {kind!r}"
    properties: Any = torch.cuda.get_device_properties(index)
    if properties.major not in (8, 9):
        found = f"{properties.name} has {properties.major}.{properties.minor}"
        return f"it is made for GPUs of compute capability 8 and 9, and {found}"
    if shared > properties.shared_memory_per_block_optin:
        found = f"{properties.name} has {properties.shared_memory_per_block_optin}"
        return f"it needs {shared} bytes of shared memory a block, and {found}"
    return ""
