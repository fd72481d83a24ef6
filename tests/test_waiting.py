"""Nothing waits for the device: no operation of a training step reads a value back to the host.

On a GPU each such operation would make the host wait. Here a mode refuses them, on the CPU; the
tests in ``tests/gpu`` ask CUDA itself.
"""

from contextlib import contextmanager
from unittest import mock

import forms
import pytest
import torch
from models import Decoder, ScoreAttention, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from spanopt import SpanScaledOptimizer, token_mask
from spanopt.mathematics import spans
from spanopt.setups import SETUPS

# The eigenvalue solver of `feature` is the one exception, which docs/gpu.md names.
EIGENVALUES = "aten::_linalg_eigh"
WAITING = {
    "aten::_local_scalar_dense",
    "aten::_assert_async",
    "aten::_linalg_check_errors",
    "aten::_linalg_svd",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
    EIGENVALUES,
}


@pytest.fixture(autouse=True)
def _values_as_on_a_device(monkeypatch):
    """Values on a CPU are read where that saves time."""
    monkeypatch.setattr(spans, "can_be_read", lambda x: False)


class NoWaiting(TorchDispatchMode):
    """Refuses operations that would wait for a GPU; the index by a mask is one of them."""

    def __init__(self, *allowed):
        super().__init__()
        self.refused, self.seen = WAITING - set(allowed), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.seen.add(name)
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        assert name not in self.refused, f"{func} waits for the device"
        assert not by_mask, f"{func} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_numbers():
    """Refuse to make tensors of numbers: copying these to a GPU waits for it."""

    def as_tensor(data, **options):
        assert isinstance(data, torch.Tensor), f"a tensor made of {data} waits for the device"
        return data.to(**options)

    # Autograd calls a node's backward without the function modes around it.
    with mock.patch.multiple(torch, tensor=as_tensor, as_tensor=as_tensor):
        yield


def step(model, optimizer, batch, mode):
    optimizer.zero_grad()
    real = torch.ones(batch.shape, dtype=torch.bool)
    real[0, 5:] = False
    with mode, no_numbers(), token_mask(real):
        model(batch).square().mean().backward()


class Projected(ScoreAttention):
    """Attention that only its projections tell of."""

    def forward(self, x):
        q, k, v = self.project(x)
        return self.out_proj((torch.sigmoid(q @ k.mT) @ v).transpose(1, 2).flatten(-2))


ATTENTION = {**forms.ATTENTION, "projection": {"attention": Projected}}
QK_MODULES = {"blocks.*.attn": {"query": "q_proj", "key": "k_proj", "num_heads": 4}}


# Through projections Q and K are reached one by one, and some setups need both.
CASES = [
    (tap, name)
    for tap in ATTENTION
    for name, setup in SETUPS.items()
    if not (tap == "projection" and setup.needs_other)
]


SCALES = {
    "both": {"query": (2.0, 0.5), "key": (0.5, 2.0)},
    "no violation": {"query": (2.0, 0.0), "key": (0.5, 0.0)},
    "equal": {"query": (2.0, 2.0), "key": (0.5, 2.0)},
}


@pytest.mark.parametrize(
    ("tap", "setup", "scales"),
    [(*case, "both") for case in CASES]
    + [(tap, "span", name) for tap in ATTENTION for name in list(SCALES)[1:]],
)
def test_a_step_reads_no_value_back(tap, setup, scales):
    model = Decoder(**ATTENTION[tap])
    options = {"qk_modules": QK_MODULES} if tap == "projection" else {}
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters()),
        model,
        {"*": SCALES[scales]},
        projection=setup,
        **options,
    )
    mode = NoWaiting(*[EIGENVALUES] if setup == "feature" else [])
    batch = tokens()
    for _ in range(2):
        step(model, optimizer, batch, mode)
        optimizer.step()
    assert "aten::mm" in mode.seen
    assert (EIGENVALUES in mode.seen) == (setup == "feature")


def test_the_mode_refuses_what_waits():
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: bool(x[0])):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait()
    for number in (lambda: torch.tensor(1.0), lambda: torch.as_tensor(1.0)):
        with pytest.raises(AssertionError, match="waits for the device"), no_numbers():
            number()


@pytest.mark.parametrize("setup", sorted(SETUPS))
def test_every_setup_runs_on_the_meta_device(setup):
    """Where there are no values at all."""
    x = torch.empty(2, 3, 9, 4, device="meta")
    mask = torch.empty(2, 1, 9, dtype=torch.bool, device="meta")
    result = SETUPS[setup](x, x, x, mask=mask)
    assert result.shape == x.shape
    assert result.device.type == "meta"
