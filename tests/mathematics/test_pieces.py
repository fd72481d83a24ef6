"""A batch that is rescaled piece by piece, in the layouts that attention gives Q and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mathematics.samplers import (
    NAN,
    Operations,
    assert_near,
    assert_same_bits,
    expected_rescaled,
    normal,
)
from spanopt.mathematics import pieces
from spanopt.mathematics.pieces import cuts, stacks
from spanopt.projection import project, rescale

B, H, N, D = 5, 3, 24, 6

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "heads side by side": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a third of a wider tensor": lambda x: (
        torch.cat([x, 0 * x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., :D]
    ),
    "features before tokens": lambda x: x.mT.contiguous().mT,
    "heads before sequences": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}
SIZES = {"one head": N * D, "two heads": 2 * N * D, "a sequence": 4 * N * D, "two": 7 * N * D}


def entries(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.fixture(params=SIZES)
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", SIZES[request.param])
    monkeypatch.setattr(pieces, "_STACK", 1)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return LAYOUTS[request.param]


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """``rescale`` of contiguous copies, in one piece."""

    def run(grad: Tensor, basis: Tensor, **options: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(pieces, "_PIECE", 2**40)
            return rescale(grad.contiguous(), basis.contiguous(), **options)

    return run


@pytest.mark.parametrize(
    "shape",
    [(4, 12, 512, 64), (1, 12, 4096, 64), (3, 2, 5, 2048, 128), (137, 3, 128, 32), (9, 4096, 128)],
)
def test_pieces_cover_a_batch_once_and_are_small(shape: tuple[int, ...]) -> None:
    count = entries(shape[:-1])
    found = cuts(shape)
    assert len(found) > 1
    for cut in found:
        count[cut] += 1
        assert count[cut].numel() * shape[-1] <= max(2**20, shape[-2] * shape[-1])
    assert (count == 1).all()


@pytest.mark.parametrize("shape", [(5, 3), (4, 5, 3), (2, 4, 5, 3), (0, 4, 5, 3), (2, 2, 4, 5, 3)])
def test_what_has_no_more_than_one_piece_is_not_cut(shape: tuple[int, ...]) -> None:
    assert cuts(shape) == [()]


def test_views_of_matrices_are_the_tensor_itself(
    layout: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_STACK", 1)
    x = layout(normal(B, H, N, D))
    for part in (x, x[2], x[2, 1], x[:, :1], x[1:2]):
        views = stacks(part)
        assert torch.equal(torch.cat(views), part.reshape(-1, N, D))
        assert {v.untyped_storage().data_ptr() for v in views} == {x.untyped_storage().data_ptr()}


def test_small_matrices_that_no_view_unites_are_left_to_a_copy() -> None:
    assert stacks(normal(B, N, H, D).transpose(1, 2)) == []


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("violation", [0.5, 0.0])
@pytest.mark.parametrize("padded", [False, True], ids=["all real", "padded"])
def test_pieces_of_any_layout_give_what_the_whole_batch_gives(
    layout: Callable[[Tensor], Tensor],
    whole: Callable[..., Tensor],
    violation: float,
    padded: bool,
) -> None:
    basis, grad = layout(normal(B, H, N, D)), layout(normal(B, H, N, D, seed=1))
    mask = (torch.arange(N) < torch.tensor([24, 9, 1, 0, 20])[:, None])[:, None] if padded else None
    options: dict[str, Any] = {"violation": violation, "mask": mask}
    for parallel in (2.0, torch.tensor([2.0, 0.25, 3.0])):
        result = rescale(grad, basis, parallel=parallel, **options)
        expected = whole(grad, basis, parallel=parallel, **options)
        assert_near(result, expected, 1e-13, grad)
    oracle = expected_rescaled(
        grad, basis, [2.0, 0.25, 3.0], violation, None if mask is None else mask.expand(B, H, N)
    )
    assert_near(result, oracle, 1e-12, grad)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_keep_the_dtype(
    layout: Callable[[Tensor], Tensor], whole: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    basis, grad = (layout(normal(B, H, N, D, seed=i).to(dtype)) for i in range(2))
    result = rescale(grad, basis, parallel=2.0, violation=0.5)
    assert result.dtype == dtype
    expected = whole(grad, basis, parallel=2.0, violation=0.5)
    assert_near(result, expected, 4 * torch.finfo(dtype).eps, grad)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("garbage", [NAN, 1e30])
def test_nothing_that_stands_at_masked_tokens_reaches_a_piece_without_gradients(
    layout: Callable[[Tensor], Tensor], garbage: float
) -> None:
    basis, grad = layout(normal(B, H, N, D)), layout(normal(B, H, N, D, seed=1))
    mask = (torch.arange(N) < torch.tensor([24, 9, 1, 0, 20])[:, None])[:, None].expand(B, H, N)
    clean = rescale(grad, basis, parallel=2.0, violation=0.5, mask=mask)
    basis[~mask], grad[~mask] = garbage, garbage
    with torch.no_grad():
        result = rescale(grad, basis, parallel=2.0, violation=0.5, mask=mask)
    assert_same_bits(result[mask], clean[mask])
    assert_same_bits(result[~mask], grad[~mask] * 0.5)


@pytest.mark.usefixtures("small_pieces")
def test_matrices_of_one_piece_do_not_touch_each_other(layout: Callable[[Tensor], Tensor]) -> None:
    basis, grad = layout(normal(B, H, N, D)), layout(normal(B, H, N, D, seed=1))
    expected = project(basis, grad)
    powers = torch.tensor([2.0**-800, 0.0, 2.0**500, 1.0, NAN], dtype=torch.float64)
    result = project(layout(basis * powers[:, None, None, None]), grad)
    assert_same_bits(result[[0, 2, 3]], expected[[0, 2, 3]])
    assert not result[1].any()
    assert result[4].isnan().all()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("violation", [0.5, 0.0])
def test_rescaling_in_pieces_is_differentiable_in_the_gradient(
    layout: Callable[[Tensor], Tensor], violation: float
) -> None:
    basis, grad = layout(normal(B, H, N, D)), layout(normal(B, H, N, D, seed=1)).requires_grad_()
    weight = normal(B, H, N, D, seed=2)
    result = rescale(grad, basis, parallel=2.0, violation=violation)
    (by_grad,) = torch.autograd.grad((result * weight).sum(), grad)
    # The map is symmetric, so its transpose is itself.
    assert_near(by_grad, expected_rescaled(weight, basis, 2.0, violation), 1e-12, weight)
    assert_same_bits(result, rescale(grad.detach(), basis, parallel=2.0, violation=violation))


@pytest.mark.usefixtures("small_pieces", "like_a_device")
def test_no_piece_is_read_back(layout: Callable[[Tensor], Tensor]) -> None:
    basis, grad = layout(normal(B, H, N, D)), layout(normal(B, H, N, D, seed=1))
    with Operations() as operations, torch.no_grad():
        rescale(grad, basis, parallel=2.0, violation=0.5, mask=torch.arange(N) < 20)
    assert operations.counts["aten::linalg_cholesky_ex"] > 2
    reads = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select"}
    assert not reads & {operation.removeprefix("aten::") for operation in operations.counts}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_need_no_values(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        basis = torch.empty(4, 512, 12, 64, dtype=dtype).transpose(1, 2)
        result = rescale(basis, basis, parallel=torch.empty(12), violation=torch.empty(()))
        assert result.shape == basis.shape
        assert result.stride() == basis.stride()
