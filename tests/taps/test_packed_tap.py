import pytest
import torch
from compare import assert_close
from models import gradients, mha_reference
from torch import nn

from spanopt import SpanScale, attach

pytestmark = pytest.mark.oldest

SCALES = {"query": (2.0, 0.5), "key": (3.0, 1.0)}
MODULES = {
    "self": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 12, "vdim": 20},
    "bias_k": {"add_bias_kv": True},
    "zero row": {"add_zero_attn": True},
    "bias_k and zero row": {"add_bias_kv": True, "add_zero_attn": True},
    "everything": {"kdim": 12, "vdim": 20, "add_bias_kv": True, "add_zero_attn": True},
}


def build(batch_first=False, **options):
    module = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options).double()
    for parameter in module.parameters():  # zero-initialised biases would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(module, cross=False):
    length = 5 if cross else 9
    query = torch.randn(9, 3, 16, dtype=torch.float64)
    key = torch.randn(length, 3, module.kdim, dtype=torch.float64)
    value = torch.randn(length, 3, module.vdim, dtype=torch.float64)
    return query, key, value


def packed(module, q, k, v, **options):
    if module.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    y = module(q, k, v, **options)[0]
    return y.transpose(0, 1) if module.batch_first else y


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_gradients_are_the_oracles(options, batch_first, cross, need_weights):
    module = build(batch_first, **options)
    q, k, v = inputs(module, cross)
    before = packed(module, q, k, v, need_weights=need_weights)
    expected = gradients(module, mha_reference(module, q, k, v, scales=SCALES).pow(3).sum())
    with attach(module, SpanScale(**SCALES)) as hooks:
        after = packed(module, q, k, v, need_weights=need_weights)
        actual = gradients(module, after.pow(3).sum())
    assert torch.equal(after, before)
    assert hooks.sites[0].heads == 4
    assert_close(actual, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_act_as_they_do_unhooked(need_weights):
    module = build()
    q, k, v = inputs(module)
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    expected = gradients(
        module, mha_reference(module, q, k, v, bias=mask, scales=SCALES).pow(3).sum()
    )
    with attach(module, SpanScale(**SCALES)):
        y = packed(module, q, k, v, attn_mask=mask, need_weights=need_weights)
        assert_close(gradients(module, y.pow(3).sum()), expected)


@pytest.mark.parametrize("average", [True, False])
def test_the_returned_weights_are_unchanged(average):
    module = build()
    q, k, v = inputs(module)
    before = module(q, k, v, average_attn_weights=average)[1]
    with attach(module, SpanScale(2.0, 1.0)):
        after = module(q, k, v, average_attn_weights=average)[1]
    assert torch.equal(after, before)


@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched_input_is_a_batch_of_one(need_weights):
    module = build()
    q, k, v = (x[:, :1] for x in inputs(module))
    with attach(module, SpanScale(**SCALES)):
        batched = gradients(module, packed(module, q, k, v, need_weights=need_weights).pow(3).sum())
        single = (x.squeeze(1) for x in (q, k, v))
        alone = gradients(module, module(*single, need_weights=need_weights)[0].pow(3).sum())
    assert_close(alone, batched, 1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_same_numbers(need_weights):
    module = build(dropout=0.5)
    q, k, v = inputs(module)

    def run():
        torch.manual_seed(1)
        y = packed(module, q, k, v, need_weights=need_weights)
        return y, gradients(module, y.pow(3).sum())

    plain, plain_gradients = run()
    with attach(module, {"*": (1.0, 1.0 - 1e-13)}):  # the general path, all but the identity
        hooked, hooked_gradients = run()
    assert torch.equal(hooked, plain)
    assert_close(hooked_gradients, plain_gradients)


@pytest.mark.parametrize("need_weights", [True, False])
def test_per_head_values_reach_their_heads(need_weights):
    module = build()
    q, k, v = inputs(module)
    factors = [1.0, 2.0, 3.0, 4.0]
    with attach(module, SpanScale(query=(factors, 1.0), key=(1.0, 1.0))):
        y = packed(module, q, k, v, need_weights=need_weights)
        actual = gradients(module, y.pow(3).sum())["in_proj_weight"][:16]
    for head, factor in enumerate(factors):
        scales = {"query": (factor, 1.0), "key": (1.0, 1.0)}
        y = mha_reference(module, q, k, v, scales=scales)
        rows = slice(4 * head, 4 * head + 4)
        expected = gradients(module, y.pow(3).sum())["in_proj_weight"][rows]
        torch.testing.assert_close(actual[rows], expected)


def test_a_wrong_number_of_per_head_values_is_an_error_at_construction():
    module = build()
    with pytest.raises(ValueError, match="3 per-head values on the query side, which has 4 heads"):
        attach(module, SpanScale([1.0, 2.0, 3.0]))
    assert not module._forward_hooks


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_transformer_modules_train_as_their_layers_do(batch_first):
    model = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=batch_first).double()
    source, target = (torch.randn(6, 6, 16, dtype=torch.float64) for _ in range(2))
    plain = gradients(model, model(source, target).pow(3).sum())
    names = [f"encoder.layers.{i}.self_attn" for i in range(2)]
    names += [f"decoder.layers.{i}.{kind}_attn" for i in range(2) for kind in ("self", "multihead")]
    with attach(model, SpanScale(2.0, 1.0)) as hooks:
        assert [site.name for site in hooks.sites] == names
        output = model(source, target)
        scaled = gradients(model, output.pow(3).sum())
        assert hooks.unseen() == []
    for name in names:
        weight = f"{name}.in_proj_weight"
        assert not torch.equal(scaled[weight][:16], plain[weight][:16])


def test_frozen_layers_without_gradient_inputs_are_left_alone():
    module = build().requires_grad_(False)
    q, k, v = inputs(module)
    with attach(module, SpanScale(2.0, 1.0), on_missing="ignore") as hooks:
        assert not packed(module, q, k, v).requires_grad
        assert hooks.unseen() == []
