"""Focus on whole models, in every form of attention, with span scaling or without."""

import copy
import io
import pickle

import pytest
import torch
from compare import assert_close, assert_differ, snapshot
from forms import ATTENTION, by_hand
from models import Decoder, ScoreAttention, gradients, loss_of, tokens
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from focus.brute import brute, keep_mask
from spanopt import (
    SpanScale,
    SpanScaledOptimizer,
    UnscaledLayerError,
    attach,
    linear,
    span_node,
    token_mask,
)
from spanopt.focus import KINDS, Focus, UnfocusedLayerError, focus

N = 9
SCALE = SpanScale(query=(2.0, 0.5), key=(3.0, 1.0))


class Weighing(nn.MultiheadAttention):
    """Returns its weights too, so that it multiplies by hand."""

    def __init__(self, width=16, heads=4):
        super().__init__(width, heads, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=True)[0]


FORMS = {**ATTENTION, "packed with weights": {"attention": Weighing}}


def decoder(form, layers=2):
    torch.manual_seed(1)
    return Decoder(layers=layers, **FORMS[form]).double(), tokens(length=N)


def run(model, batch):
    return gradients(model, loss_of(model(batch), batch))


class Brute(nn.Module):
    """A layer's forward with attention by brute force in place of its own."""

    def __init__(self, layer, kind, k, always=(), span=None):
        super().__init__()
        self.layer, self.of, self.span = layer, (kind, k, always), span

    def forward(self, x):
        layer = self.layer
        if isinstance(layer, nn.MultiheadAttention):
            q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
            q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (q, k, v))
        elif isinstance(layer, ScoreAttention):
            q, k, v = layer.project(x)
        else:
            q, k, v = (
                project(x).unflatten(-1, (4, -1)).transpose(1, 2)
                for project in (layer.q_proj, layer.k_proj, layer.v_proj)
            )
        if self.span is not None:
            q, k = span_node(q, *self.span.query), span_node(k, *self.span.key)
        causal = getattr(layer, "causal", False)
        scale = None if hasattr(layer, "out_proj") else 1.0
        y = brute(q, k, v, *self.of, is_causal=causal, scale=scale)
        y = y.transpose(1, 2).flatten(-2)
        return layer.out_proj(y) if hasattr(layer, "out_proj") else y


def brute_gradients(model, batch, kind, k, always=(), scale=None):
    """The gradients with brute force in every layer, by the model's names."""
    other = copy.deepcopy(model)
    for block in other.blocks:
        block["attn"] = Brute(block["attn"], kind, k, always, span=scale)
    return {name.replace("attn.layer", "attn"): x for name, x in run(other, batch).items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_brute_force(kind, form):
    model, batch = decoder(form)
    plain, values = run(model, batch), model(batch)
    with focus(model, Focus(3, kind, always=(0,))):
        actual, focused = run(model, batch), model(batch)
    assert_close(actual, brute_gradients(model, batch, kind, 3, (0,)), 1e-12)
    assert_differ(actual, plain)
    assert torch.equal(focused, values) == (kind == "gradient")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_keys_it_is_bit_for_bit_the_plain_model(kind, form):
    model, batch = decoder(form)
    before, expected, state = snapshot(model), run(model, batch), torch.get_rng_state()
    for k in (N, 1000, None):
        with focus(model, {"*": Focus(k, kind)}):
            actual = run(model, batch)
        assert all(torch.equal(actual[name], x) for name, x in expected.items())
        assert torch.equal(torch.get_rng_state(), state)
    model.zero_grad()
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name in before:
        assert before[name]["_forward_hooks"] == after[name]["_forward_hooks"] == {}
        assert before[name]["_forward_pre_hooks"] == after[name]["_forward_pre_hooks"] == {}


@pytest.mark.parametrize("k", [N, None])
def test_with_dropout_too_and_after_removal_the_random_state_is_that_of_the_plain_model(k):
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.3, batch_first=True)
    x = torch.randn(2, N, 16)

    def trained():
        torch.manual_seed(3)
        return gradients(model, model(x).pow(3).sum()), torch.get_rng_state()

    expected = trained()
    with focus(model, Focus(k)):
        actual = trained()
    with focus(model, Focus(2)) as hooks:
        assert_differ(trained()[0], expected[0])
        hooks.remove()
        removed = trained()
    for grads, state in (actual, removed):
        assert torch.equal(state, expected[1])
        assert all(torch.equal(grads[name], x) for name, x in expected[0].items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", ["focus", "scaling"])
def test_span_scaling_of_the_same_layers_acts_on_the_gradients_of_focus(form, first):
    model, batch = decoder(form)
    plain = run(model, batch)
    alone = {"focus": brute_gradients(model, batch, "top", 3)}
    with attach(model, SCALE):
        alone["scaling"] = run(model, batch)
    put_on = {"focus": lambda: focus(model, Focus(3)), "scaling": lambda: attach(model, SCALE)}
    second = "scaling" if first == "focus" else "focus"
    for removed, left in ((first, second), (second, first)):
        hooks = {what: put_on[what]() for what in (first, second)}
        both = run(model, batch)
        hooks["scaling"].check()
        assert_close(both, brute_gradients(model, batch, "top", 3, scale=SCALE), 1e-9)
        assert_differ(both, alone["focus"])
        hooks[removed].remove()
        hooks[removed].remove()
        assert_close(run(model, batch), alone[left], 1e-12)
        hooks[left].remove()
        assert_close(run(model, batch), plain, 0.0)


def test_padding_is_read_before_focus_acts():
    model = ScoreAttention(causal=False).double()
    x = torch.randn(2, N, 16, dtype=torch.float64)
    with attach(model, SCALE), focus(model, Focus(2)):
        model(x).sum().backward()  # keys that nobody chose would pass for padding, or be refused
    with (
        token_mask(torch.ones(2, N, dtype=torch.bool)),
        attach(model, SCALE),
        focus(model, Focus(2)),
    ):
        first = {n: p.grad.clone() for n, p in model.named_parameters()}
        assert_close(gradients(model, model(x).sum()), first)


def test_a_padding_mask_closes_keys_beside_focus():
    model = nn.MultiheadAttention(16, 4, batch_first=True).double()
    x = torch.randn(2, N, 16, dtype=torch.float64)
    padded = torch.zeros(2, N, dtype=torch.bool)
    padded[1, 5:] = True
    with attach(model, SCALE) as hooks, focus(model, Focus(3)):
        outputs = [
            model(x, x, x, key_padding_mask=padded, need_weights=weights)[0]
            for weights in (True, False)
        ]
        outputs[0].sum().backward()
        hooks.check()
    torch.testing.assert_close(*outputs)
    short = x[1:, :5]
    with focus(model, Focus(3)):
        torch.testing.assert_close(model(short, short, short)[0], outputs[0][1:, :5])


def test_layers_go_by_name_and_pattern_and_none_leaves_one_alone():
    model, batch = decoder("score")
    kept = run(model, batch)
    with focus(model, {"blocks.*": Focus(2), "blocks.1.attn": None}):
        one = model(batch)
    with focus(model, {"blocks.0.attn": Focus(2)}):
        assert torch.equal(model(batch), one)
    with focus(model, {"blocks.*": None}):
        assert_close(run(model, batch), kept)


def test_what_can_not_be_is_an_error_that_says_so():
    model, _ = decoder("score")
    with pytest.raises(ValueError, match=r"focus\['block.0.attn'\] matches no attention layer"):
        focus(model, {"block.0.attn": Focus(2)})
    with pytest.raises(TypeError, match=r"write Focus\(k=8\)"):
        focus(model, {"*": 8})
    with pytest.raises(ValueError, match="no attention layer found in Linear"):
        focus(nn.Linear(2, 2), Focus(2))
    hooks = focus(model, Focus(2))
    with pytest.raises(ValueError, match="has focus already"):
        focus(model, Focus(3))
    hooks.remove()
    focus(model, Focus(3)).remove()


class Linear(nn.Module):
    """Linear attention: no scores."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return self.q_proj(x) @ (self.k_proj(x).mT @ self.v_proj(x))


class Hidden(ScoreAttention):
    """Loses its scores on the way to the softmax."""

    def forward(self, x):
        q, k, v = self.project(x)
        return (q @ k.mT).cumsum(-1).softmax(-1) @ v


class Inner(ScoreAttention):
    """Checkpoints its attention within itself."""

    reentrant = False

    def forward(self, x):
        return checkpoint(
            F.scaled_dot_product_attention, *self.project(x), use_reentrant=self.reentrant
        )


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Linear, "took no softmax"),
        (Hidden, "(at cumsum|took a softmax of what)"),
        (Inner, "checkpoint the layer as a whole"),
        (type("Reentrant", (Inner,), {"reentrant": True}), "checkpoint the layer as a whole"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_whose_scores_are_not_seen_is_an_error_that_names_it(layer, reason, grad):
    model = nn.Sequential(layer())
    x = torch.randn(2, N, 16, requires_grad=True)
    with focus(model, Focus(2)), torch.set_grad_enabled(grad):
        with pytest.raises(UnfocusedLayerError, match=rf"no focus on layer '0' \(.*{reason}"):
            model(x)
    with focus(model, {"*": Focus(2), "0": None}):
        model(x)


def test_nested_tensors_are_refused():
    model = nn.Sequential(ScoreAttention(causal=False))
    x = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged)
    with focus(model, Focus(2)), pytest.raises(TypeError, match=r"layer '0'.*nested"):
        model(x)


class Sink(ScoreAttention):
    """Puts a key of its own beside the others."""

    def forward(self, x):
        q, k, v = self.project(x)
        scores = q @ k.mT
        sink = torch.zeros_like(scores[..., :1])
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("kind", ["window", "block", "strided"])
def test_patterns_of_positions_are_refused_beside_other_keys(kind):
    x = torch.randn(2, N, 16)
    options = {"add_bias_kv": True}, {"add_zero_attn": True}
    for layer in (Sink(), *(Packed(16, 4, batch_first=True, **option) for option in options)):
        model = nn.Sequential(layer)
        with focus(model, Focus(3, kind)):
            with pytest.raises(UnfocusedLayerError, match=r"layer '0' has other keys.*kind='top'"):
                model(x)
        with focus(model, Focus(3)):
            model(x)


class Packed(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def test_distributed_tensors_and_parts_of_sequences_are_refused(monkeypatch):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    class Spread(ScoreAttention):
        def forward(self, x):
            mesh = init_device_mesh("cpu", (1,))
            spread = [DTensor.from_local(y, mesh, [Replicate()]) for y in self.project(x)]
            return F.scaled_dot_product_attention(*spread)

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        model = nn.Sequential(Spread())
        with focus(model, Focus(3)), pytest.raises(TypeError, match=r"layer '0'.*DTensor"):
            model(torch.randn(2, N, 16))
    finally:
        torch.distributed.destroy_process_group()
    monkeypatch.setattr("spanopt.focus.focusing.is_context_parallel", lambda: True)
    model = nn.Sequential(ScoreAttention())
    with focus(model, Focus(3)), pytest.raises(TypeError, match=r"layer '0'.*context_parallel"):
        model(torch.randn(2, N, 16))


def test_evaluation_is_focused_too_unless_training_only():
    model, batch = decoder("packed")
    model.eval()
    with torch.no_grad():
        plain = model(batch)
        with focus(model, Focus(N)):
            assert torch.equal(model(batch), plain)
        with focus(model, Focus(2, training_only=True)):
            assert torch.equal(model(batch), plain)
            model.train()
            trained = model(batch)
            model.eval()
        with focus(model, Focus(2)):
            assert torch.equal(model(batch), trained)
            with torch.inference_mode():
                assert torch.equal(model(batch), trained)
    assert not torch.allclose(trained, plain)


def test_an_encoder_has_no_fast_path_past_focus():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, N, 16)
    padded = torch.zeros(2, N, dtype=torch.bool)
    padded[0, 6:] = True
    with focus(model, Focus(2)), torch.no_grad():
        with pytest.raises(TypeError, match=r"layers.0.self_attn.*enable_nested_tensor=False"):
            model(x, src_key_padding_mask=padded)
    model.use_nested_tensor = False
    for mask in (None, padded):
        with focus(model, Focus(2)), torch.no_grad():
            evaluated = model(x, src_key_padding_mask=mask)
            model.train()
            expected = model(x, src_key_padding_mask=mask)
            model.eval()
        real = slice(None) if mask is None else ~padded
        torch.testing.assert_close(evaluated[real], expected[real])


def test_a_schedule_follows_the_steps_of_the_optimizer():
    model, batch = decoder("score")
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = SpanScaledOptimizer(sgd, model, SCALE)
    with focus(model, Focus(linear(4, 9, 1)), optimizer=optimizer) as hooks:
        seen = []
        for _ in range(6):
            seen.append(hooks.keys("blocks.0.attn"))
            value = model(batch)
            with_k = focused_by(model, batch, seen[-1])
            assert torch.allclose(value, with_k)
            loss_of(value, batch).backward()
            optimizer.step()
    assert seen == [9, 7, 5, 3, 1, 1]


def focused_by(model, batch, k):
    other = copy.deepcopy(model)
    for block in other.blocks:
        block["attn"] = Brute(block["attn"], "top", k)
    return other(batch)


def test_a_schedule_that_nobody_counts_is_a_warning():
    model = ScoreAttention()
    with pytest.warns(UserWarning, match=r"no step was counted: pass optimizer="):
        focus(model, Focus(linear(4, 9, 1))).remove()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_layers_under_activation_checkpointing_choose_the_same_keys_again(form, scaled, reentrant):
    model, batch = decoder(form)
    x = model.embed(batch).detach().requires_grad_()

    def through(call):
        y = x
        for block in model.blocks:
            y = y + call(block["attn"], block["norm"](y))
        return y.pow(3).sum()

    hooks = [attach(model, SCALE)] if scaled else []
    with focus(model, Focus(3)):
        expected = gradients(model, through(lambda layer, y: layer(y)))
        again = through(lambda layer, y: checkpoint(layer, y, use_reentrant=reentrant))
        assert_close(gradients(model, again), expected, 1e-12)
    for one in hooks:
        one.remove()


def test_a_deep_copy_and_a_pickle_of_the_model_have_no_focus():
    model, batch = decoder("score")
    plain = model(batch)
    with focus(model, Focus(2)):
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        pickle.dump(model.blocks[0]["attn"], file)
        assert torch.equal(copied(batch), plain)
        with focus(copied, Focus(2)):
            assert torch.equal(copied(batch), model(batch))


def test_an_exception_in_the_layer_is_the_users_own_and_leaves_nothing_behind():
    model, batch = decoder("score")
    plain = model(batch)
    with focus(model, Focus(2)):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model.blocks[0]["attn"](torch.randn(1, 3, 5, dtype=torch.float64))
        focused = model(batch)
    assert torch.equal(model(batch), plain)
    assert not torch.allclose(focused, plain)


def test_an_optimizer_complains_of_unscaled_layers_as_without_focus():
    model = nn.Sequential(Linear())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SpanScaledOptimizer(sgd, model, SCALE)
    with focus(model, {"*": None}), pytest.raises(UnscaledLayerError):
        model(torch.randn(2, N, 16)).sum().backward()
    optimizer.detach()


def test_a_hand_written_mask_counts():
    class Masked(type(by_hand(16, 4))):
        def __init__(self):
            nn.Module.__init__(self)
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            q, k, v = (
                project(x).unflatten(-1, (4, -1)).transpose(1, 2)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            scores = (q @ k.mT) * 0.5
            future = torch.ones(N, N, dtype=torch.bool).triu(1)
            self.weights = scores.masked_fill(future, -1e9).softmax(-1)
            self.scores = scores.masked_fill(future, -1e9)
            return self.weights @ v

    model = Masked().double()
    for kind in ("top", "window", "block", "strided"):
        with focus(model, Focus(3, kind)):
            model(torch.randn(2, N, 16, dtype=torch.float64))
        keep = keep_mask(model.scores, kind, 3)
        assert torch.equal(model.weights > 0, keep)
