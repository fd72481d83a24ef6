"""What a GPU would be asked to do, traced on one that does not exist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spanopt.mathematics.together import rescale_together, worthwhile
from spanopt.projection import rescale

REST = {"aten::addcmul", "aten::addcmul_"}
LIBRARY = {"aten::linalg_cholesky_ex", "aten::linalg_solve_triangular"}


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    with FakeTensorMode():
        yield


class Launches(TorchDispatchMode):
    """Counts operations that launch something, and notes the results that have every token."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.counts = entries, Counter[str]()
        self.large: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returned)
        name = func._schema.name
        if is_view or not name.startswith("aten::") or "empty" in name:
            return result
        self.counts[name] += 1
        if isinstance(result, Tensor):
            assert result.is_cuda, f"{func} makes a tensor on the host, which is copied"
            if result.numel() >= self.entries:
                self.large.append((name, result.dtype))
        return result

    def of_the_libraries(self) -> int:
        return sum(count for name, count in self.counts.items() if name in LIBRARY)


def sides(dtype: torch.dtype, n: int = 1024) -> tuple[list[Tensor], list[Tensor], Any]:
    bases, grads = (
        [torch.empty(2, 3, n, 64, device="cuda", dtype=dtype) for _ in range(2)] for _ in range(2)
    )
    factor = torch.empty((), device="cuda", dtype=torch.float64)
    return bases, grads, ((factor, factor), (factor, 0.0))


def joint(dtype: torch.dtype, n: int = 1024, mask: Tensor | None = None) -> Launches:
    bases, grads, factors = sides(dtype, n)
    assert worthwhile(*bases)
    with Launches(grads[0].numel()) as launches:
        results = rescale_together(grads, bases, factors, ridge=None, masks=(mask, None))
    assert [x.dtype for x in results] == [dtype, dtype]
    return launches


def apart(dtype: torch.dtype) -> Launches:
    bases, grads, factors = sides(dtype)
    with Launches(grads[0].numel()) as launches:
        for grad, basis, (a, b) in zip(grads, bases, factors, strict=True):
            rescale(grad, basis, parallel=a, violation=b)
    return launches


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 50), (torch.bfloat16, 65), (torch.float16, 75)], ids=str
)
def test_a_layer_takes_four_library_calls_and_few_others(dtype: torch.dtype, most: int) -> None:
    together, alone = joint(dtype), apart(dtype)
    assert (together.of_the_libraries(), alone.of_the_libraries()) == (4, 8)
    one, two = together.counts.total(), alone.counts.total()
    assert one <= most
    assert one <= 0.65 * two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_not_copied_to_float32(dtype: torch.dtype) -> None:
    """In float32 are only products, sums of these, and what becomes the result."""
    mask = torch.empty(2, 1, 1024, dtype=torch.bool, device="cuda")
    for launches in (joint(dtype), joint(dtype, mask=mask), apart(dtype)):
        in_float32 = {name for name, kind in launches.large if kind == torch.float32}
        assert "aten::bmm" in in_float32
        assert in_float32 <= {"aten::bmm", "aten::add_", "aten::div_"} | REST


@pytest.mark.parametrize(
    ("dtype", "n", "sums"),
    [
        (torch.float32, 256, 0),
        (torch.float32, 257, 2),
        (torch.bfloat16, 2048, 0),
        (torch.bfloat16, 2049, 2),
    ],
    ids=str,
)
def test_long_sequences_are_added_up_in_blocks(dtype: torch.dtype, n: int, sums: int) -> None:
    assert joint(dtype, n).counts["aten::sum"] == sums + 1  # and the trace
