"""A gradient that went around the nodes is an error at step(), also where the layer was seen."""

import pytest
import torch
from models import ScoreAttention
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spanopt import SpanScaledOptimizer, UnscaledLayerError

SCALES = {"*": (2.0, 1.0)}


class Unseen(torch.autograd.Function):
    """A kernel that no tap sees into."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT).sigmoid() @ v

    @staticmethod
    def backward(ctx, grad):
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out = (q @ k.mT).sigmoid() @ v
        return torch.autograd.grad(out, (q, k, v), grad)


class Attention(nn.Module):
    """Attention that takes a kernel of its own when it is told to."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(16, 48)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.kernel = "sdpa"

    def forward(self, x):
        if self.kernel == "skipped":
            return x
        if self.fused:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in (q, k, v))
        if self.kernel == "unseen":
            return Unseen.apply(q, k, v).transpose(1, 2).flatten(-2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def wrapped(model):
    return SpanScaledOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, SCALES)


@pytest.fixture(params=[False, True], ids=["apart", "fused"])
def model(request):
    torch.manual_seed(0)
    return nn.Sequential(Attention(request.param))


@pytest.fixture
def x():
    return torch.randn(2, 5, 16)


def refused(optimizer):
    before = [p.clone() for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises(UnscaledLayerError, match=r"since the last step: layer '0' "):
        optimizer.step()
    after = [p for group in optimizer.param_groups for p in group["params"]]
    return all(map(torch.equal, before, after))


def test_a_call_that_is_dropped_does_not_stand_for_a_forward_called_directly(model, x):
    optimizer = wrapped(model)
    model(x)
    model[0].forward(x).sum().backward()
    assert refused(optimizer)


def test_a_kernel_that_is_not_seen_is_found_beside_one_that_is(model, x):
    optimizer = wrapped(model)
    model(x).sum().backward()
    model[0].kernel = "unseen"
    model(x).sum().backward()
    assert refused(optimizer)


def test_a_forward_called_directly_is_found_after_a_call_in_the_same_pass(model, x):
    optimizer = wrapped(model)
    model[0].forward(model(x)).sum().backward()
    assert refused(optimizer)


def test_after_the_error_a_step_of_seen_calls_passes(model, x):
    optimizer = wrapped(model)
    model[0].forward(model(x)).sum().backward()
    assert refused(optimizer)
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("extra", ["dropped", "without gradients", "skipped", "twice"])
def test_calls_that_no_gradient_comes_back_from_are_no_misses(model, x, extra):
    optimizer = wrapped(model)
    model(x).sum().backward()
    optimizer.step()
    if extra == "dropped":
        model[0].forward(x)
    elif extra == "without gradients":
        with torch.no_grad():
            model[0].forward(x)
    elif extra == "skipped":
        model[0].kernel = "skipped"
        model(x.clone().requires_grad_()).sum().backward()
        model[0].kernel = "sdpa"
    else:
        model(x).sum().backward()
    model(x).sum().backward()
    optimizer.step()


class Checkpointed(Attention):
    """The same, with its attention checkpointed."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("fused", [False, True])
def test_a_part_that_checkpointing_repeats_is_no_miss(fused, x):
    model = nn.Sequential(Checkpointed(fused))
    optimizer = wrapped(model)
    model(x).sum().backward()
    optimizer.step()


def test_the_hooks_leave_the_projections_as_they_were(model):
    hooks = [len(module._forward_hooks) for module in model.modules()]
    optimizer = wrapped(model)
    assert [len(module._forward_hooks) for module in model.modules()] != hooks
    optimizer.detach()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_layer_of_other_names_is_watched_by_the_same_rule(x):
    layer = ScoreAttention()
    optimizer = wrapped(nn.Sequential(layer))
    assert optimizer.hooks.sites[0].query_module() is not None
