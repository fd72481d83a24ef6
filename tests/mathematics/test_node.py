"""Nodes: views with the same bits that rescale in backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from oracle import projector
from torch import Tensor

from mathematics.samplers import (
    BASES,
    DTYPES,
    D,
    N,
    Operations,
    array,
    assert_near,
    assert_same_bits,
    gradient_of,
    normal,
)
from spanopt.node import span_node, switch_on, switched_node, uniform_node
from spanopt.projection import rescale
from spanopt.rescaling import Rescaling

# The nodes.


def test_a_span_node_is_a_view_with_the_same_bits(name: str, dtype: torch.dtype) -> None:
    q = BASES[name](0).to(dtype)
    q[0] = -0.0
    q.requires_grad_()
    for y in (
        span_node(q, torch.tensor(2.0), torch.tensor(1.0)),
        uniform_node(q, torch.tensor(2.0)),
    ):
        assert y._base is q
        assert y.data_ptr() == q.data_ptr()
        assert y.stride() == q.stride()
        assert_same_bits(y.detach(), q.detach())


def test_a_span_node_rescales_in_backward_what_rescale_does(basis: Tensor, grad: Tensor) -> None:
    q = basis.clone().requires_grad_()
    span_node(q, torch.tensor(2.0), torch.tensor(0.5)).backward(grad)
    assert q.grad is not None
    assert_same_bits(q.grad, rescale(grad, basis, parallel=2.0, violation=0.5))


def test_a_span_node_hands_mask_ridge_and_scales_of_one_per_head_on() -> None:
    basis, grad = normal(2, 3, N, D), normal(2, 3, N, D, seed=1)
    mask = (torch.arange(N) < torch.tensor([[20], [9]]))[:, None]
    scales = {
        "parallel": torch.tensor([2.0, 3.0, 0.0]).double(),
        "violation": torch.tensor([1.0, 0.5, 1.0]).double(),
    }
    q = basis.clone().requires_grad_()
    span_node(q, *scales.values(), ridge=1e-2, mask=mask).backward(grad)
    assert q.grad is not None
    assert_same_bits(q.grad, rescale(grad, basis, **scales, ridge=1e-2, mask=mask))


def saved_by(node: Callable[[], Tensor]) -> list[Tensor]:
    """Tensors that autograd keeps for backward."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        assert node().requires_grad
    return saved


def test_a_span_node_saves_its_input_and_no_copy() -> None:
    q = normal(2, N, D).requires_grad_()
    saved = saved_by(lambda: span_node(q, torch.tensor(2.0), torch.tensor(1.0)))
    assert {x.data_ptr() for x in saved} == {q.data_ptr()}


def test_a_uniform_node_saves_nothing() -> None:
    q = normal(2, N, D).requires_grad_()
    assert not saved_by(lambda: uniform_node(q, torch.tensor(3.0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [torch.tensor(0.3), torch.tensor([0.3, 2.0, -1.0])])
def test_a_uniform_node_multiplies_the_gradient_and_projects_nothing(
    dtype: torch.dtype, factor: Tensor
) -> None:
    q = normal(2, 3, N, D).to(dtype).requires_grad_()
    grad = gradient_of(q)
    y = uniform_node(q, factor)
    with Operations() as operations:
        y.backward(grad)
    per_head = factor[:, None, None] if factor.ndim else factor
    assert q.grad is not None
    assert_same_bits(q.grad, (grad * per_head).to(dtype))
    assert not operations.counts["aten::linalg_cholesky_ex"]


def test_a_scale_read_in_backward_may_change_after_forward() -> None:
    basis, grad = normal(N, D), normal(N, D, seed=1)
    q = basis.clone().requires_grad_()
    parallel = torch.tensor(2.0, dtype=torch.float64)
    y = span_node(q, parallel, torch.tensor(1.0))
    parallel.fill_(3.0)
    y.backward(grad)
    assert q.grad is not None
    assert_same_bits(q.grad, rescale(grad, basis, parallel=3.0, violation=1.0))


@pytest.mark.parametrize("kind", ["span", "uniform"])
def test_double_backward_applies_the_linear_map_again_and_holds_the_basis_constant(
    kind: str,
) -> None:
    """For L = y^T H y / 2 behind the node R, dL/dq = R H q, and d<v, dL/dq>/dq = R H R v."""
    n = 12
    q = normal(n, 3).requires_grad_()
    half = normal(n, n, seed=1)
    hessian = half + half.mT
    v = normal(n, 3, seed=2)
    a, b = torch.tensor(2.0).double(), torch.tensor(0.5).double()
    y = span_node(q, a, b) if kind == "span" else uniform_node(q, a)
    loss = (y * (hessian @ y)).sum() / 2
    (first,) = torch.autograd.grad(loss, q, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), q)
    P = torch.from_numpy(projector(array(q)))
    eye = torch.eye(n, dtype=torch.float64)
    linear = a * P + b * (eye - P) if kind == "span" else a * eye
    assert_near(first, linear @ hessian @ q.detach(), 1e-12, hessian)
    assert_near(second, linear @ hessian @ linear @ v, 1e-12, hessian)


def test_no_call_of_a_node_works_out_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes as long as the rest of the call."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a signature is worked out")

    q = normal(N, D).requires_grad_()
    monkeypatch.setattr(inspect, "_signature_from_function", refuse)
    span_node(q, torch.tensor(2.0), torch.tensor(1.0))
    y, switch, padding = switched_node(q, Rescaling(), Rescaling())
    switch_on(y, switch, padding, side="query")


def test_nodes_build_no_graph_when_gradients_are_off() -> None:
    q = normal(N, D).requires_grad_()
    with torch.no_grad():
        assert span_node(q, torch.tensor(2.0), torch.tensor(1.0)).grad_fn is None
        assert uniform_node(q, torch.tensor(2.0)).grad_fn is None
