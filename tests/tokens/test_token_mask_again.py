"""``token_mask`` where layers run again in the backward pass, and in other threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import assert_close
from models import gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

from spanopt import attach, token_mask
from tokens.token_forms import (
    KINDS,
    LENGTH,
    SCALE,
    WIDTH,
    Attention,
    Model,
    alone,
    assert_differ,
    causal,
    everything,
    normal,
    padding,
    run,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch._prims_common.check.*",
    "ignore:.*enable_nested_tensor.*",
    "ignore:.*mismatched key_padding_mask and attn_mask.*",
)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["inside", "inside, in a thread of autograd", "outside"])
def test_a_layer_that_runs_again_in_the_backward_pass(reentrant, where):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()

        def forward(self, x, mask):
            return checkpoint(self.attn, x, mask, use_reentrant=reentrant)

    model, real = Checkpointed().double(), padding()
    x, mask = normal(3, LENGTH, WIDTH).requires_grad_(), causal(everything(real))
    with attach(model, SCALE), ThreadPoolExecutor(1) as other:
        expected = alone(model, x, real, causal)
        with token_mask(real):
            loss = model(x, mask)[real].pow(3).sum()
            if where == "inside":
                assert_close(gradients(model, loss), expected)
            elif where != "outside":  # on a GPU autograd works in threads of its own
                assert_close(other.submit(gradients, model, loss).result(), expected)
        if where == "outside":  # right or refused
            try:
                actual = gradients(model, loss)
            except RuntimeError as error:
                assert "layer 'attn' runs again in the backward pass" in str(error)  # noqa: PT017
            else:
                assert_close(actual, expected)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.attn = Attention()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.attn, x, use_reentrant=self.reentrant)


def without_checkpointing(model, real, x):
    """The gradients that the layer has when it runs once."""
    return {f"attn.{name}": grad for name, grad in run(model.attn, real, x).items()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forward_passes_with_different_masks_before_their_backward_passes_are_refused(
    reentrant,
):
    model, x = Checkpointed(reentrant).double(), normal(3, LENGTH, WIDTH).requires_grad_()
    losses = []
    with attach(model, SCALE):
        for real in (padding(), padding("left")):
            with token_mask(real):
                losses.append(model(x)[real].pow(3).sum())
        for loss in losses:
            with pytest.raises(RuntimeError, match=r"layer 'attn' runs again .* token_mask"):
                loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["", "inside"])
@pytest.mark.parametrize("threaded", [False, True], ids=["", "in a thread of autograd"])
def test_each_backward_pass_goes_by_the_mask_of_the_forward_pass_before_it(
    threaded, inside, reentrant
):
    model, x = Checkpointed(reentrant).double(), normal(3, LENGTH, WIDTH).requires_grad_()
    seen = []
    with attach(model, SCALE), ThreadPoolExecutor(1) as other:

        def backward(loss):
            if threaded:
                return other.submit(gradients, model, loss).result()
            return gradients(model, loss)

        for real in (padding(), padding("left"), everything(padding())):
            with token_mask(real):
                expected = without_checkpointing(model, real, x)
                loss = model(x)[real].pow(3).sum()
                if inside:
                    seen.append(backward(loss))
            if not inside:
                seen.append(backward(loss))
            assert_close(seen[-1], expected, 1e-12)
    assert_differ(seen[0], seen[1])
    assert_differ(seen[0], seen[2])


@pytest.mark.parametrize(
    ("reentrant", "evaluated"), [(False, "model"), (False, "layer"), (True, "layer")]
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_with_another_mask_disturbs_no_layer_that_runs_again(
    context, reentrant, evaluated
):
    model, x = Checkpointed(reentrant).double(), normal(3, LENGTH, WIDTH).requires_grad_()
    real, other = padding(), padding("left")

    def evaluate():
        with context(), token_mask(other):
            (model if evaluated == "model" else model.attn)(x)

    with attach(model, SCALE):
        evaluate()
        with token_mask(real):
            expected = without_checkpointing(model, real, x)
            loss = model(x)[real].pow(3).sum()
        evaluate()
        assert_close(gradients(model, loss), expected, 1e-12)
        with token_mask(other):
            assert_differ(without_checkpointing(model, real, x), expected)


def test_other_threads_have_masks_of_their_own():
    model, x, real = Model(KINDS["sdpa"]).double(), normal(3, LENGTH, WIDTH), padding()
    with attach(model, SCALE), ThreadPoolExecutor(1) as other:
        plain = run(model, real, x)
        with token_mask(real):
            masked = run(model, real, x)
            assert_close(other.submit(run, model, real, x).result(), plain, 1e-12)
    assert_differ(masked, plain)


def test_without_an_attached_model_it_does_nothing():
    model, x, real = Model(KINDS["sdpa"]).double(), normal(3, LENGTH, WIDTH), padding()
    plain = run(model, real, x)
    attach(model, SCALE).remove()
    for masks in (real, padding().long() * 3, {"*": real}, real[:1, :3]):
        with token_mask(masks):
            actual = run(model, real, x)
        assert all(torch.equal(actual[name], plain[name]) for name in plain)
