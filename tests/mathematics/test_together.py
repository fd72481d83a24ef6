"""Q and K rescaled in one batch get what each of them gets by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mathematics.samplers import DTYPES, Operations, assert_near, assert_same_bits, normal
from spanopt.mathematics import fused, together
from spanopt.mathematics.together import rescale_together, worthwhile
from spanopt.node import rescaling_node
from spanopt.pair import can_be_paired, pair_node
from spanopt.projection import rescale, set_formulation
from spanopt.rescaling import Rescaling
from spanopt.setups import Setup

N, D = 40, 6
PADDED = (torch.arange(N) < torch.tensor([N, 9, 30])[:, None])[:, None]


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    yield
    set_formulation("auto")


def sides(dtype: torch.dtype, heads: tuple[int, int] = (4, 4)) -> tuple[list[Tensor], list[Tensor]]:
    """Return Q and K, seen through a transposition, and their gradients."""
    bases = [normal(3, N, h, D, seed=i).transpose(1, 2).to(dtype) for i, h in enumerate(heads)]
    return bases, [normal(3, h, N, D, seed=8 + i).to(dtype) for i, h in enumerate(heads)]


def tensors(*numbers: float | list[float]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(x, dtype=torch.float64) for x in numbers)


FACTORS: dict[str, Any] = {
    "numbers": (tensors(2.0, 0.5), tensors(0.25, 3.0)),
    "by head": (tensors([2.0, 1.0, 0.5, 0.0], 0.5), tensors(0.25, [1.0, 2.0, 3.0, 4.0])),
    "no violation": ((torch.tensor(2.0), 0.0), (torch.tensor(0.5), 0.0)),
    "no violation of one side": ((torch.tensor(2.0), 0.0), tensors(0.5, 2.0)),
}


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize(
    "masks", [(None, None), (PADDED, PADDED), (None, PADDED)], ids=["none", "both", "keys"]
)
@pytest.mark.parametrize(
    ("formulation", "dtype"),
    [*(("plain", dtype) for dtype in DTYPES), *(("mixed", dtype) for dtype in DTYPES[2:])],
    ids=str,
)
def test_each_side_gets_what_it_gets_alone(
    formulation: str, dtype: torch.dtype, masks: tuple[Tensor | None, ...], factors: str
) -> None:
    set_formulation(formulation)
    bases, grads = sides(dtype)
    if masks[1] is not None:
        bases[1][~masks[1].expand(3, 4, N)] = torch.nan  # what is masked is not looked at
    results = rescale_together(grads, bases, FACTORS[factors], ridge=None, masks=masks)
    for result, grad, basis, (a, b), mask in zip(
        results, grads, bases, FACTORS[factors], masks, strict=True
    ):
        alone = rescale(grad, basis, parallel=a, violation=b, mask=mask)
        assert result.dtype == dtype
        assert_near(result, alone, 4 * torch.finfo(dtype).eps, grad)


def test_grouped_queries_have_other_numbers_of_heads() -> None:
    bases, grads = sides(torch.float64, (4, 2))
    factors = tensors([2.0, 1.0, 0.5, 0.0], 0.5), tensors([0.25, 4.0], 1.0)
    results = rescale_together(grads, bases, factors, ridge=1e-3, masks=(PADDED, PADDED))
    for result, grad, basis, (a, b) in zip(results, grads, bases, factors, strict=True):
        alone = rescale(grad, basis, parallel=a, violation=b, ridge=1e-3, mask=PADDED)
        assert_near(result, alone, 1e-14, grad)


def test_the_fused_kernel_takes_each_side_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    bases, grads = sides(torch.float32)
    calls = []
    monkeypatch.setattr(fused, "why_not", lambda *_: "")
    monkeypatch.setattr(fused, "combined", lambda q, x, **_: calls.append((q, x)))
    set_formulation("fused")
    rescale_together(grads, bases, FACTORS["numbers"], ridge=None, masks=(None, None))
    assert [x is grad for (_, x), grad in zip(calls, grads, strict=True)] == [True, True]


def test_a_factor_of_another_number_of_heads_is_refused() -> None:
    bases, grads = sides(torch.float32)
    factors = tensors([1.0, 2.0], 1.0), tensors(1.0, 1.0)
    with pytest.raises(ValueError, match=r"shape \(\) or \(H,\)"):
        rescale_together(grads, bases, factors, ridge=None, masks=(None, None))


@pytest.mark.parametrize("formulation", ["plain", "mixed"])
def test_there_are_half_as_many_factorisations(formulation: str) -> None:
    bases, grads = sides(torch.bfloat16)
    set_formulation(formulation)
    with Operations() as joint:
        rescale_together(grads, bases, FACTORS["numbers"], ridge=None, masks=(None, None))
    with Operations() as alone:
        rescale(grads[0], bases[0], parallel=2.0, violation=0.5)
    linear = [name for name in alone.counts if "linalg" in name]
    assert linear
    assert all(joint.counts[name] == alone.counts[name] for name in linear)
    assert sum(joint.counts.values()) < 1.5 * sum(alone.counts.values())


# The node.


def paired(q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    of_query, of_key = rescalings()
    assert can_be_paired(q, k, of_query, of_key)
    return pair_node(q, k, of_query, of_key, **options)


def apart(q: Tensor, k: Tensor, masks: Any = (None, None)) -> tuple[Tensor, ...]:
    pairs = zip((q, k), rescalings(), masks, strict=True)
    return tuple(rescaling_node(x, rescaling, mask=mask) for x, rescaling, mask in pairs)


def rescalings(**options: Any) -> tuple[Rescaling, Rescaling]:
    numbers = ((2.0, 0.5), (0.25, 3.0))
    one, two = (Rescaling(**options).with_numbers(x, torch.device("cpu")) for x in numbers)
    return one, two


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in sides(dtype)[0]]


def energy(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).square().sum() + q.pow(3).mean()


@pytest.mark.parametrize("masks", [(None, None), (PADDED, None)], ids=["all", "padded"])
def test_the_node_does_what_two_nodes_do(masks: Any) -> None:
    gradients = []
    for node in (paired, apart):
        q, k = leaves()
        on_q, on_k = node(q, k, masks=masks)
        assert_same_bits(on_q.detach(), q.detach())
        assert_same_bits(on_k.detach(), k.detach())
        gradients.append(torch.autograd.grad(energy(on_q, on_k), (q, k)))
    for joint, alone in zip(*gradients, strict=True):
        assert_near(joint, alone, 1e-13, alone)


def test_second_derivatives_are_those_of_two_nodes() -> None:
    gradients = []
    for node in (paired, apart):
        q, k = leaves()
        first = torch.autograd.grad(energy(*node(q, k)), (q, k), create_graph=True)
        loss = sum(x.square().sum() for x in first)
        gradients.append(torch.autograd.grad(loss, (q, k)))
    for joint, alone in zip(*gradients, strict=True):
        assert_near(joint, alone, 1e-12, alone)


def test_a_side_that_gets_no_gradient_has_zeros() -> None:
    q, k = leaves()
    on_q, _ = paired(q, k)
    by_q, by_k = torch.autograd.grad(on_q.pow(2).sum(), (q, k), allow_unused=True)
    expected = rescale(2 * q.detach(), q.detach(), parallel=2.0, violation=0.5)
    assert_near(by_q, expected, 1e-13, expected)
    assert by_k is None or not by_k.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_and_eager_are_alike(dtype: torch.dtype) -> None:
    of_query, of_key = rescalings()

    def f(q: Tensor, k: Tensor) -> Tensor:
        q, k = pair_node(q, k, of_query, of_key)
        return energy(q.float(), k.float())

    gradients = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        q, k = leaves(dtype)
        gradients.append(torch.autograd.grad(g(q, k), (q, k)))
    for eager, compiled in zip(*gradients, strict=True):
        assert_near(compiled, eager, 8 * torch.finfo(dtype).eps, eager)


def test_what_two_nodes_are_for() -> None:
    q, k = leaves()
    one, two = rescalings()
    frozen, short, narrow = q.detach(), k[..., :-1, :], k[..., :-1]
    ridged, _ = rescalings(ridge=1e-3)
    radial, _ = rescalings(setup=Setup.of("radial"))
    normed, _ = rescalings(preserve_norm=True)
    equal = one.with_numbers((2.0, 2.0), torch.device("cpu"))
    assert can_be_paired(q, k, one, two)
    assert can_be_paired(q, k[:, :2], one, two)
    for other in (ridged, radial, normed, equal):
        assert not can_be_paired(q, k, other, two)
    for x, y in ((frozen, k), (q, short), (q, narrow), (q, k.float()), (q[:0], k[:0])):
        assert not can_be_paired(x, y, one, two)


def test_large_batches_are_left_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = leaves()
    assert worthwhile(q, k)
    monkeypatch.setattr(together, "_MOST", {"cpu": q.numel()})
    assert not worthwhile(q, k)
