"""Bases of fewer tokens than features, of low rank but for rounding, as a narrow model has them."""

from __future__ import annotations

import pytest
import torch

from spanopt import project

SIZES = [22, 0.69, 0.58, 0.13, 4e-8, 3e-8, 1e-8, 9e-9, 2e-9, 1e-11, 1e-11, 3e-12, 3e-12, 8e-13]


@pytest.mark.parametrize("d", [40, 60, 64, 128])
def test_their_spans_are_finite(d: int) -> None:
    tokens, features = torch.randn(512, 14, 14).double(), torch.randn(512, d, 14).double()
    left, right = (torch.linalg.qr(x)[0] for x in (tokens, features))
    basis = (left * torch.tensor(SIZES).double()) @ right.mT
    assert project(basis, torch.randn_like(basis)).isfinite().all()
