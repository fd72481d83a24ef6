"""The Triton kernels, in Triton's interpreter, which needs no GPU, and through its compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spanopt.mathematics.fused import SHARED, settings

triton = pytest.importorskip("triton", reason="Triton is not installed")


def test_the_kernels_are_right_in_the_interpreter(soak: bool) -> None:
    """Triton looks for the setting of its interpreter when it is imported, so in a new process."""
    file = Path(__file__).with_name("interpreted_triton.py")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-o",
            "addopts=",
            str(file),
            *["--soak"] * soak,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_importing_the_library_imports_no_triton() -> None:
    source = "import sys, spanopt; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)


# Compute capability 8.0 is Ampere, 9.0 Hopper. The others are compiled in the long run.
QUICK = [("gram", 64, "bf16", 80), ("outer", 64, "bf16", 90)]
ALL = [
    (kernel, width, dtype, capability)
    for kernel in ("fused", "gram", "inner", "outer")
    for width in (16, 32, 64, 128)
    for dtype in ("bf16", "fp32")
    for capability in (80, 90)
    if (kernel, width) != ("fused", 128)
]


@pytest.mark.parametrize("case", ALL, ids=lambda case: "-".join(map(str, case)))
def test_the_compiled_kernels_take_no_more_memory_than_is_said(case: tuple, soak: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spanopt.mathematics import triton_kernels

    if case not in QUICK and not soak:
        pytest.skip("compiled in the long run")
    name, width, dtype, capability = case
    precision = "bf16x3" if dtype == "bf16" else "bf16x6"
    kernel = getattr(triton_kernels, name)
    options = settings(width, precision)
    constants = {key: value for key, value in options.items() if key.isupper()}
    constants["GRAM"] = {"bf16": triton.language.bfloat16, "fp32": triton.language.float32}[dtype]
    constants |= {"x_d": 1, "q_d": 1, "out_d": 1, "mask": None}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        kind = "i32"
        if argument in constants:
            kind = "constexpr"
        elif argument in ("out", "x", "q"):
            kind = f"*{dtype}"
        elif argument in ("ridge", "shift"):
            kind = "fp32"
        elif argument in ("grams", "scales", "ms", "us", "ts", "kept", "factor", "rest"):
            kind = "*fp32"
        signature[argument] = kind
        if kind.startswith("*") or argument.endswith(("_b", "_n")):
            aligned[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={key: value for key, value in options.items() if key.islower()},
    )
    assert compiled.metadata.shared <= SHARED[precision][width]
