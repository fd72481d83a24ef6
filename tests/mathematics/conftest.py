"""Fixtures of the tests beside this file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mathematics.samplers import BASES, PADDINGS, gradient_of
from spanopt.mathematics import spans


@pytest.fixture(params=BASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def basis(name: str, dtype: torch.dtype) -> Tensor:
    return BASES[name](0).to(dtype)


@pytest.fixture
def grad(basis: Tensor) -> Tensor:
    return gradient_of(basis)


@pytest.fixture(params=PADDINGS)
def mask(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(PADDINGS[request.param], dtype=torch.bool)


@pytest.fixture
def like_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the way of devices whose values can't be read without waiting for them."""
    monkeypatch.setattr(spans, "can_be_read", lambda x: False)
