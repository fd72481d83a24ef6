"""Focus in compiled code: in one graph, equal to eager."""

import pytest
import torch
from compare import assert_close, assert_differ
from models import gradients, loss_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from focus.test_layers import FORMS, SCALE, Hidden, decoder, run
from spanopt import attach
from spanopt.focus import KINDS, Focus, UnfocusedLayerError, focus

pytestmark = pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=[] if form in ("score", "softmax") else [pytest.mark.long])
        for form in FORMS
    ],
)
def test_gradients_equal_eager_ones_with_span_scaling_too(form):
    model, batch = decoder(form, layers=1)
    plain = run(model, batch)
    with focus(model, Focus(3)):
        eager = run(model, batch)
        other = compiled(model, "inductor" if form == "score" else "aot_eager")
        assert_close(gradients(model, loss_of(other(batch), batch)), eager)
        assert_differ(eager, plain)
        with attach(model, SCALE) as hooks:
            scaled = run(model, batch)
            assert_close(gradients(model, loss_of(other(batch), batch)), scaled)
            hooks.check()
            assert_differ(scaled, eager)
    assert_close(gradients(model, loss_of(other(batch), batch)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_a_change_of_k(kind, soak):
    if kind not in ("top", "gradient") and not soak:
        pytest.skip("compiled in the long run; tests of eager code have every kind")
    model, batch = decoder("score", layers=1)
    other = compiled(model)
    schedule = [2, 3, 9, None]
    with focus(model, Focus(lambda step: schedule[step], kind, always=(0,))) as hooks:
        for step in range(4):
            eager = run(model, batch)
            assert_close(gradients(model, loss_of(other(batch), batch)), eager)
            if step < 3:
                hooks.step()


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_without_gradients(form):
    model, batch = decoder(form, layers=1)
    model.eval()
    other = compiled(model)
    with torch.no_grad():
        plain = model(batch)
        for given in (Focus(2), Focus(2, training_only=True)):
            with focus(model, given):
                torch.testing.assert_close(other(batch), model(batch))
                assert torch.allclose(model(batch), plain) == given.training_only
        torch.testing.assert_close(other(batch), plain)


def test_dropout_acts_in_compiled_code():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.5, batch_first=True)
    other, x = compiled(layer), torch.randn(2, 9, 16)
    with focus(layer, Focus(3)):
        first, second = other(x), other(x)
        first.sum().backward()
    assert not torch.equal(first, second)


def test_sequences_of_several_lengths():
    model, _ = decoder("score", layers=1)
    other = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with focus(model, Focus(3)):
        for length in (7, 12, 70, 3):
            batch = torch.randint(11, (2, length))
            eager = run(model, batch)
            assert_close(gradients(model, loss_of(other(batch), batch)), eager)


def test_activation_checkpointing_in_compiled_code():
    model, batch = decoder("score", layers=1)
    block = model.blocks[0]
    x = model.embed(batch).detach()

    def through(x):
        return checkpoint(block["attn"], x, use_reentrant=False)

    with focus(model, {"blocks.0.attn": Focus(3)}):
        expected = gradients(model, through(x).pow(3).sum())
        other = torch.compile(through, backend="aot_eager")  # PyTorch breaks the graph there
        actual = gradients(model, other(x).pow(3).sum())
    assert_close(actual, expected)


def test_a_layer_whose_scores_are_not_seen_is_an_error():
    model = nn.Sequential(Hidden())
    with focus(model, Focus(2)), pytest.raises(Exception, match=r"no focus on layer '0'") as raised:
        torch.compile(model, backend="eager")(torch.randn(2, 9, 16))
    assert issubclass(raised.type, (UnfocusedLayerError, torch._dynamo.exc.TorchDynamoException))


def test_the_operators_are_registered_as_pytorch_wants_them():
    # Laid out as a projection leaves them: what comes back is contiguous all the same.
    q, k, v = (torch.randn(9, 2, 4, dtype=torch.float64).transpose(0, 1) for _ in range(3))
    mask = F.pad(torch.zeros(1, 9, 8, dtype=torch.float64), (0, 1), value=-torch.inf)
    settings = [2], "top", 3, [0], True, 0.5, 4
    checks = ("test_schema", "test_faketensor")
    forward = torch.ops.spanopt.focused_attention.default
    torch.library.opcheck(forward, (q, k, v, mask, None, *settings), test_utils=checks)
    _, positions, weights = forward(q, k, v, mask, None, *settings)
    backward = torch.ops.spanopt.focused_attention_backward.default
    given = (v, q, k, v, mask, None, positions, weights, *settings, True)
    torch.library.opcheck(backward, given, test_utils=checks)
