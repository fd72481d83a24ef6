import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from compare import snapshot
from models import Decoder, ScoreAttention, gradients, loss_of, tokens
from models import OneOfEach as Model
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from spanopt import SpanScale, SpanScaledOptimizer, UnscaledLayerError, attach


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def x():
    return torch.randn(2, 7, 16)


def test_removal_leaves_the_model_as_it_was(model, x):
    functions = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
    before, keys = snapshot(model), list(model.state_dict())
    hooks = attach(model, SpanScale(2.0, 1.0))
    assert list(model.state_dict()) == keys
    model(x).sum().backward()
    model.zero_grad()
    assert snapshot(model) != before
    hooks.remove()
    hooks.remove()
    assert snapshot(model) == before
    assert functions == (F.scaled_dot_product_attention, F.multi_head_attention_forward)


def test_the_context_manager_removes_the_hooks_after_an_exception(model, x):
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), attach(model, SpanScale(2.0, 1.0)):
        _fail(model, x, model(x))
    assert snapshot(model) == before


@pytest.mark.parametrize("layer", ["score", "packed"])
def test_an_exception_in_forward_leaves_no_mode_entered_and_the_next_pass_right(model, x, layer):
    with attach(model, SpanScale(2.0, 1.0)):
        expected = gradients(model, model(x).sum())
        module = getattr(model, layer)
        handle = module.register_forward_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
        with pytest.raises(RuntimeError):  # inside the attention call: shapes do not fit
            model(torch.randn(2, 7, 15))
        actual = gradients(model, model(x).sum())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def _fail(module, args, result):
    raise ZeroDivisionError


def test_an_earlier_pre_hook_that_raises_does_not_pop_the_users_own_mode(model, x):
    class Mine(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def fail(module, args):
        raise ZeroDivisionError

    with attach(model, SpanScale(2.0, 1.0)), Mine() as mine:
        model.score.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(ZeroDivisionError):
            model(x)
        assert torch.overrides._get_current_function_mode() is mine


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_happens_without_gradients(model, x, context, monkeypatch):
    with attach(model, SpanScale(2.0, 1.0)) as hooks:
        for tap in hooks._taps:
            monkeypatch.setattr(tap, "_handlers", None)  # any use of it would raise
        with context():
            model(x)
        assert hooks.unseen() == ["score", "packed"]


def test_inference_inside_a_forward_pass_is_left_alone(x):
    class Peeking(ScoreAttention):
        def forward(self, x):
            with torch.no_grad():
                super().forward(x)
            return x * 1.0

    model = Peeking()
    with attach(model, SpanScale(2.0, 1.0)) as hooks:
        model(x)
        assert hooks.unseen() == [""]


def test_two_attachments_may_share_a_model_but_not_a_layer(model, x):
    with attach(model, {"score": (2.0, 1.0), "packed": None}):
        with attach(model, {"packed": (2.0, 1.0), "score": None}):
            both = gradients(model, model(x).pow(2).sum())
        with pytest.raises(ValueError, match="layer 'score' is scaled already"):
            attach(model, SpanScale(2.0, 1.0))
        assert len(model.packed._forward_hooks) == 0
    with attach(model, SpanScale(2.0, 1.0)):
        together = gradients(model, model(x).pow(2).sum())
    assert all(torch.equal(both[name], together[name]) for name in both)


def test_a_layer_inside_another_attachments_layer_is_an_overlap():
    class Outer(ScoreAttention):
        def __init__(self):
            super().__init__()
            self.inner = ScoreAttention()

    model = Outer()
    with attach(model, {"inner": (2.0, 1.0), "": None}):
        with pytest.raises(ValueError, match="layer '' is scaled already"):
            attach(model, {"": (2.0, 1.0), "inner": None})


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_of_a_hooked_model_is_a_plain_model(model, x, how):
    plain = gradients(model, model(x).pow(2).sum())
    keys = list(model.state_dict())
    with attach(model, SpanScale(2.0, 1.0)) as hooks:
        clone = _copy(model, how)
        hooks.forget()
        copied = gradients(clone, clone(x).pow(2).sum())
        assert hooks.unseen() == ["score", "packed"], "the copy must not report to the original"
        assert list(clone.state_dict()) == keys
        scaled = gradients(model, model(x).pow(2).sum())
        with attach(clone, SpanScale(2.0, 1.0)):
            again = gradients(clone, clone(x).pow(2).sum())
            assert len(clone.score._forward_hooks) == 1, "inert hooks must not pile up"
    assert all(torch.equal(copied[name], plain[name]) for name in plain)
    assert all(torch.equal(again[name], scaled[name]) for name in plain)
    assert any(not torch.equal(scaled[name], plain[name]) for name in plain)


def _copy(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_dropped_hooked_model_is_freed():
    model = Model()
    attach(model, SpanScale(2.0, 1.0))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_the_random_state_and_buffers_survive_example_inputs(x):
    model = nn.Sequential(nn.BatchNorm1d(7), Model(), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with attach(model, SpanScale(2.0, 1.0), example_inputs=(x,)) as hooks:
        assert hooks.unseen() == ["1.score", "1.packed"]
        assert hooks.sites[0].heads == 4
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Sigmoid(ScoreAttention):
    def forward(self, x):
        q, k, v = self.project(x)
        return self.out_proj(((q @ k.mT).sigmoid() @ v).transpose(1, 2).flatten(-2))


def test_a_layer_that_calls_no_attention_is_an_error_at_the_first_forward(x):
    model = nn.Sequential(Sigmoid())
    with (
        attach(model, SpanScale(2.0, 1.0)),
        pytest.raises(
            UnscaledLayerError, match=r"layer '0' \(Sigmoid\); scaled: none\. .* no attention"
        ),
    ):
        model(x)


def test_supported_and_unsupported_layers_are_reported_together(x):
    model = nn.Sequential(Sigmoid(), ScoreAttention(), Sigmoid())
    unsupported = r"layers '0' \(Sigmoid\), '2' \(Sigmoid\); scaled: '1' \(ScoreAttention\)"
    with attach(model, SpanScale(2.0, 1.0)), pytest.raises(UnscaledLayerError, match=unsupported):
        model(x)
    with pytest.raises(UnscaledLayerError, match=unsupported):
        attach(model, SpanScale(2.0, 1.0), example_inputs=x)
    with attach(model, {"1": SpanScale(2.0)}):
        model(x).sum().backward()


def test_a_layer_that_calls_no_attention_is_an_error_at_once_with_example_inputs(x):
    model = nn.Sequential(Sigmoid())
    before = snapshot(model)
    with pytest.raises(UnscaledLayerError, match="'0'"):
        attach(model, SpanScale(2.0, 1.0), example_inputs={"input": x})
    assert snapshot(model) == before


def test_a_layer_that_calls_no_attention_can_be_allowed(x):
    model = nn.Sequential(Sigmoid())
    with attach(model, SpanScale(2.0, 1.0), on_missing="ignore") as hooks:
        model(x).sum().backward()
        hooks.check()
    with attach(model, SpanScale(2.0, 1.0), on_missing="warn") as hooks:
        model(x).sum().backward()
        with pytest.warns(UserWarning, match="not scaled since the last step: layer '0'"):
            hooks.check()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ridge": -1.0}, ValueError, "at least 0, got -1.0"),
        ({"ridge": float("nan")}, ValueError, "got nan"),
        ({"on_missing": "explode"}, ValueError, "got 'explode'"),
        ({"scales": {"score": {"paralel": 1.0}}}, TypeError, "unknown field paralel"),
        ({"scales": {"scor": (1.0, 2.0)}}, ValueError, "nearest names are 'score'"),
        ({"scales": {"*": (float("inf"), 1.0)}}, ValueError, r"scales\['\*'\]: parallel must be"),
        ({"scales": 2.0}, TypeError, "scales must be a dict"),
    ],
)
def test_a_bad_argument_is_an_error_and_installs_nothing(model, arguments, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        attach(model, **{"scales": SpanScale(2.0), **arguments})
    assert snapshot(model) == before


def test_a_model_without_attention_is_an_error_that_says_what_was_looked_for():
    with pytest.raises(ValueError, match=r"no attention layer found in Linear.*span_node"):
        attach(nn.Linear(2, 2), SpanScale(2.0, 1.0))


def test_a_model_that_is_no_module_is_an_error():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got function"):
        attach(lambda x: x, SpanScale(2.0, 1.0))


def test_identity_scales_put_no_node_on_the_graph(model, x):
    plain = gradients(model, model(x).pow(2).sum())
    with attach(model, {"*": (1.0, 1.0)}) as hooks:
        same = gradients(model, model(x).pow(2).sum())
        assert hooks.unseen() == []
    assert all(torch.equal(plain[name], same[name]) for name in plain)


def test_equal_scales_multiply_and_save_nothing():
    model, batch = Decoder().double(), tokens()

    def saved(scale):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            attach(model, {"*": scale}),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            loss = loss_of(model(batch), batch)
        return len(storages), gradients(model, loss)

    plain_saved, plain = saved((1.0, 1.0))
    uniform_saved, _ = saved((3.0, 3.0))
    general_saved, _ = saved((2.0, 1.0))
    assert uniform_saved == plain_saved
    assert general_saved == plain_saved, "attention's own backward keeps Q and K already"
    with attach(model, {"blocks.1.attn": SpanScale(3.0, 3.0)}):
        scaled = gradients(model, loss_of(model(batch), batch))
    for name in ("q_proj", "k_proj"):
        weight = f"blocks.1.attn.{name}.weight"
        torch.testing.assert_close(scaled[weight], 3 * plain[weight])


# What a review once found.


def test_after_a_keyboard_interrupt_no_other_model_is_scaled(model, x):
    foreign = Model()
    plain = gradients(foreign, foreign(x).pow(2).sum())

    def interrupt(module, args):
        raise KeyboardInterrupt

    with attach(model, SpanScale(2.0, 1.0)) as hooks:
        expected = gradients(model, model(x).pow(2).sum())
        handle = model.score.out_proj.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
        assert len(torch.overrides._get_current_function_mode_stack()) == 1, "torch calls no hook"
        actual = gradients(foreign, foreign(x).pow(2).sum())
        assert all(torch.equal(actual[name], plain[name]) for name in plain)
        again = gradients(model, model(x).pow(2).sum())
        assert all(torch.equal(again[name], expected[name]) for name in expected)
        assert hooks.unseen() == []
        assert not torch.overrides._get_current_function_mode_stack(), "the next pass cleans up"


@pytest.mark.parametrize("how", ["set_grad_enabled", "another mode", "removal"])
def test_a_forward_that_disturbs_the_hooks_leaves_no_mode_entered(how):
    class Mine(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Disturbing(ScoreAttention):
        def forward(self, x):
            y = super().forward(x)
            if how == "set_grad_enabled":
                torch.set_grad_enabled(False)
            elif how == "another mode":
                mine.__enter__()
            else:
                hooks.remove()
            return y

    mine = Mine()
    model = Disturbing()
    hooks = attach(model, SpanScale(2.0, 1.0))
    try:
        model(torch.randn(2, 5, 16))
    finally:
        torch.set_grad_enabled(True)
    if how == "another mode":
        assert torch.overrides._get_current_function_mode_stack() == [mine]
        mine.__exit__(None, None, None)
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("shared", [True, False])
def test_models_in_two_threads_are_each_scaled_right(shared):
    model = ScoreAttention().double()
    models = [model, model if shared else copy.deepcopy(model)]
    batches = [torch.randn(2, 64, 16, dtype=torch.float64) for _ in models]
    attached = [attach(one, {"*": (2.0, 0.5)}) for one in dict.fromkeys(models)]

    def gradient(one, x):
        return torch.autograd.grad(one(x).pow(3).sum(), one.q_proj.weight)[0]

    expected = [gradient(*pair) for pair in zip(models, batches, strict=True)]
    start = threading.Barrier(2)
    wrong = []

    def run(index):
        start.wait()
        for _ in range(30):
            actual = gradient(models[index], batches[index])
            if not torch.allclose(actual, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for hooks in attached:
        hooks.remove()


def test_a_scale_that_fits_one_layer_but_not_the_next_installs_nothing():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 4)])
    before = snapshot(model)
    with pytest.raises(ValueError, match="2 per-head values on the query side, which has 4 heads"):
        attach(model, {"*": SpanScale([2.0, 3.0], 1.0)})
    assert snapshot(model) == before
    attach(model, SpanScale(2.0, 1.0)).remove()


def test_a_bad_edit_of_per_head_values_keeps_the_old_ones(model, x):
    with attach(model, SpanScale(2.0, 1.0)) as hooks:
        expected = gradients(model, model(x).pow(2).sum())
        for group in hooks.groups:
            with pytest.raises(ValueError, match="3 per-head values"):
                group["parallel"] = [1.0, 2.0, 3.0]
        actual = gradients(model, model(x).pow(2).sum())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_vmap_is_refused_not_silently_unscaled(model, x):
    with (
        attach(model, SpanScale(2.0, 1.0)),
        pytest.raises(TypeError, match=r"layer 'score'.*torch.vmap"),
    ):
        torch.vmap(lambda row: model(row.unsqueeze(0)))(x)


def test_export_is_refused_not_silently_unscaled(model, x):
    with attach(model, SpanScale(2.0, 1.0)), pytest.raises(RuntimeError, match="hooked by spanopt"):
        torch.export.export(model, (x,))


def test_a_hooked_layer_hidden_inside_another_attachments_is_scaled_once(x):
    inner = ScoreAttention().double()

    class Outer(ScoreAttention):
        def __init__(self):
            super().__init__()
            self.hidden = [inner]

        def forward(self, x):
            return super().forward(self.hidden[0](x))

    outer, x = Outer().double(), x.double()
    expected = gradients(inner, outer.reference(inner.reference(x)).pow(3).sum())
    with attach(outer, SpanScale(2.0, 1.0)), attach(inner, SpanScale(2.0, 1.0)):
        actual = gradients(inner, outer(x).pow(3).sum())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_a_left_alone_layer_that_calls_no_attention_is_left_alone(x):
    class Projections(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.q_proj(x), self.k_proj(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = Projections()

        def forward(self, x):
            q, k = self.project(x)
            return F.scaled_dot_product_attention(q, k, x)

    model = Outer()
    with attach(model, {"": (2.0, 1.0), "project": None}) as hooks:
        model(x).sum().backward()
        assert hooks.unseen() == []


def test_a_model_built_on_meta_and_filled_later_is_scaled(x):
    with torch.device("meta"):
        model = ScoreAttention()
    hooks = attach(model, {"*": SpanScale([2.0, 3.0, 4.0, 5.0], 1.0)})
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model(x).sum().backward()
    assert hooks.unseen() == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_example_inputs_see_through_reentrant_checkpointing(x):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = ScoreAttention()

        def forward(self, x):
            return checkpoint(self.attn, x, use_reentrant=True)

    with attach(Checkpointed(), SpanScale(2.0, 1.0), example_inputs=x) as hooks:
        assert hooks.sites[0].heads == 4


def test_scales_set_in_inference_mode_serve_second_order_gradients():
    model, x = ScoreAttention().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    with attach(model, SpanScale(2.0, 1.0)) as hooks, sdpa_kernel(SDPBackend.MATH):
        with torch.inference_mode():
            hooks.groups[0]["parallel"] = 3.0
        loss = model(x).pow(3).sum()
        (gradient,) = torch.autograd.grad(loss, model.q_proj.weight, create_graph=True)
        gradient.pow(2).sum().backward()


def test_per_head_values_for_a_query_without_a_head_dimension_are_refused():
    class Flat(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(8, 7, 4, requires_grad=True)
    with attach(Flat(), SpanScale([2.0])) as hooks, pytest.raises(ValueError, match="no dimension"):
        hooks.sites[0].module(x)
    with attach(Flat(), SpanScale(2.0, 1.0)) as hooks:
        hooks.sites[0].module(x).sum().backward()


def test_export_without_gradients_is_refused_too(model, x):
    with (
        attach(model, SpanScale(2.0, 1.0)),
        torch.no_grad(),
        pytest.raises(Exception, match="an exported program"),
    ):
        torch.export.export(model, (x,))


@pytest.mark.parametrize("wrapped", [False, True], ids=["attach", "optimizer"])
def test_the_old_name_of_an_argument_is_refused_with_the_new_one(model, wrapped):
    def install(**arguments):
        if not wrapped:
            return attach(model, SpanScale(2.0), **arguments)
        bare = torch.optim.SGD(model.parameters(), lr=0.1)
        return SpanScaledOptimizer(bare, model, SpanScale(2.0), **arguments)

    with pytest.raises(TypeError, match="no argument 'projections'; its name is now qk_modules"):
        install(projections={})
    with pytest.raises(TypeError, match="unexpected keyword argument 'rigde'"):
        install(rigde=0.1)
    install(qk_modules={})
