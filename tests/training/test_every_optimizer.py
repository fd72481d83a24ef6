"""Every optimizer of torch.optim and torch-optimizer, wrapped and bare."""

import contextlib
import inspect
import warnings

import pytest
import torch
import torch_optimizer
from models import Decoder, loss_of, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Optimizer

from spanopt import SpanScaledOptimizer

EVERY = {
    f"{library.__name__}.{name}": cls
    for library in (torch.optim, torch_optimizer)
    for name, cls in vars(library).items()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
}
# These do not train a model with dense gradients without spanopt either.
UNUSABLE = {"torch.optim.SparseAdam": "does not support dense gradients"}
SPECIAL = {
    "torch.optim.LBFGS": lambda cls, ps: cls(ps, lr=0.1, max_iter=4),
    "torch.optim.Muon": lambda cls, ps: cls([p for p in ps if p.ndim == 2]),
    "torch.optim.SGD": lambda cls, ps: cls(ps, lr=0.1),
    "torch_optimizer.Lookahead": lambda cls, ps: cls(SGD(ps, lr=0.1), k=2),
}
STEPS = 6


def make(name, parameters):
    return SPECIAL.get(name, lambda cls, ps: cls(ps))(EVERY[name], list(parameters))


def run(name, scales=None):
    """Train a small decoder; return its losses and its parameters."""
    torch.manual_seed(0)
    model, batch = Decoder(), tokens()
    optimizer = make(name, model.parameters())
    if scales is not None:
        optimizer = SpanScaledOptimizer(optimizer, model, scales)
    second_order = name == "torch_optimizer.Adahessian"
    losses = []

    def closure():
        optimizer.zero_grad()
        # Of the attention kernels only the plain one can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH) if second_order else contextlib.nullcontext():
            loss = loss_of(model(batch), batch)
            loss.backward(create_graph=second_order)
        losses.append(loss.item())
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-optimizer calls deprecated overloads
        for _ in range(STEPS):
            if name == "torch.optim.LBFGS":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    return losses, [parameter.detach() for parameter in model.parameters()]


def test_both_libraries_were_read():
    assert len(EVERY) > 40
    assert set(UNUSABLE) | set(SPECIAL) <= set(EVERY)


@pytest.mark.parametrize("name", sorted(set(EVERY) - set(UNUSABLE)))
def test_it_trains_wrapped_as_it_does_bare(name):
    bare_losses, bare = run(name)
    losses, identity = run(name, {"*": (1.0, 1.0)})
    assert losses == bare_losses
    assert all(torch.equal(a, b) for a, b in zip(identity, bare, strict=True))
    losses, scaled = run(name, {"*": (2.0, 0.5)})
    assert torch.isfinite(torch.tensor(losses)).all()
    assert any(not torch.equal(a, b) for a, b in zip(scaled, bare, strict=True))
    if bare_losses[-1] < bare_losses[0] - 0.1:
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(("name", "message"), UNUSABLE.items())
def test_one_that_does_not_work_bare_fails_the_same_way_wrapped(name, message):
    with pytest.raises(RuntimeError, match=message):
        run(name)
    with pytest.raises(RuntimeError, match=message):
        run(name, {"*": (2.0, 0.5)})
