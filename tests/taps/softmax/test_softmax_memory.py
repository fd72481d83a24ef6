"""What attention by hand saves and keeps alive."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from spanopt import (
    attach,
)
from taps.softmax.softmax_forms import SCALE, WEIGHTS, ByHand, D, H, N, both_inputs, stored, tokens


def saved_for_backward(model, *inputs):
    """The sizes of all storages saved for backward but the parameters'."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = model(*inputs)
    del result
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sorted(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    "weigh",
    ["q @ k.mT", "q @ k.transpose", "torch.matmul", "torch.bmm", "k @ q.mT over -2"],
)
def test_no_tensor_is_saved_that_plain_code_does_not_save(weigh):
    model, inputs = ByHand(WEIGHTS[weigh]).double(), both_inputs()
    plain = saved_for_backward(model, *inputs)
    with attach(model, SCALE):
        assert saved_for_backward(model, *inputs) == plain


# What is left behind.


class Keeping(nn.Module):
    """A layer that keeps what it computes, and writes some of it to buffers."""

    def __init__(self, width=H * D):
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(width, width) for _ in range(2))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("last", None)
        self.kept = ()

    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        product = torch.bmm(q, k.transpose(1, 2))
        masked = product.masked_fill(torch.eye(N).bool(), -1e9)
        weights = masked.softmax(-1)
        self.mean.lerp_(product.detach().mean(), 0.1)
        self.last = weights.detach()
        self.kept = (q, k, product, masked, weights)
        return weights @ x


@pytest.mark.parametrize("backward", [False, True], ids=["", "after the backward pass"])
def test_what_a_layer_computed_can_be_saved_and_copied_and_carries_no_notes(backward):
    model, x = Keeping().double(), tokens()
    with attach(model, SCALE):
        result = model(x)
        if backward:
            result.pow(3).sum().backward()
        everything = (x, result, *model.kept, *model.buffers(), *model.parameters())
        assert all(vars(one) == {} for one in everything)
        for one in everything:
            assert torch.equal(stored(one), one)
        assert torch.equal(copy.deepcopy(result.detach()), result)
        assert torch.equal(stored(model.state_dict())["last"], model.last)
        assert torch.equal(stored(model)(x), result)
        model.kept = ()  # which are no leaves, so that no copy of them can be made
        assert torch.equal(copy.deepcopy(model)(x), result)


def tensors_alive(model, x):
    """Which of the kept tensors are alive after each pass, while the scores are still in use."""
    gc.collect()
    gc.disable()
    try:
        loss = model(x).pow(3).sum()
        kept, model.kept = [weakref.ref(one) for one in model.kept], model.kept[2:3]
        forward = [one() is not None for one in kept]
        loss.backward()
        return forward, [one() is not None for one in kept]
    finally:
        gc.enable()


def test_no_tensor_is_kept_alive_that_plain_code_does_not_keep():
    model, x = Keeping().double(), tokens()
    plain = tensors_alive(model, x)
    assert sum(plain[1]) == 1
    with attach(model, SCALE):
        assert tensors_alive(model, x) == plain
