"""torch.compile, fullgraph, with the hooks on: equal to eager, or an error."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_close
from forms import by_hand
from models import Decoder, ScoreAttention, gradients, loss_of, tokens
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from spanopt import SpanScale, SpanScaledOptimizer, attach, token_mask

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def packed(need_weights):
    class Packed(nn.MultiheadAttention):
        def __init__(self, width, heads):
            super().__init__(width, heads, batch_first=True)

        def forward(self, x):
            return super().forward(x, x, x, need_weights=need_weights)[0]

    return Packed


LAYERS = {
    "score": ScoreAttention,
    "packed": packed(False),
    "packed with weights": packed(True),
}
SCALE = SpanScale(query=(2.0, 0.5), key=(3.0, 1.0))


def compiled(model, backend="inductor", **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize(
    ("layer", "backend"),
    [
        pytest.param(
            layer,
            backend,
            id=f"{name}-{backend}",
            marks=[pytest.mark.long] if backend == "inductor" and name != "score" else [],
        )
        for name, layer in LAYERS.items()
        for backend in ("aot_eager", "inductor")
    ],
)
def test_compiled_in_one_graph_the_gradients_equal_eager_ones(layer, backend):
    model, batch = Decoder(attention=layer, layers=1).double(), tokens()
    plain = gradients(model, loss_of(model(batch), batch))
    with attach(model, SCALE) as hooks:
        eager = gradients(model, loss_of(model(batch), batch))
        hooks.forget()
        run = compiled(model, backend)
        assert_close(gradients(model, loss_of(run(batch), batch)), eager)
        assert hooks.unseen() == []
        hooks.forget()
        run(batch)
        assert hooks.unseen() == [], "every compiled call must report"
    assert (eager["embed.weight"] - plain["embed.weight"]).abs().max() > 1e-6


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_change_of_scale_acts_without_a_new_compilation(layer):
    model, batch = Decoder(attention=layer, layers=1).double(), tokens()
    with attach(model, SCALE) as hooks:
        run = compiled(model, "aot_eager")
        loss_of(run(batch), batch).backward()
        for factor in (3.0, 0.25, -1.0):
            hooks.groups[0].update(query=(factor, 0.5))
            eager = gradients(model, loss_of(model(batch), batch))
            with torch.compiler.set_stance("fail_on_recompile"):
                loss = loss_of(run(batch), batch)
            assert_close(gradients(model, loss), eager)


def test_encoder_and_decoder_layers_compile_in_one_graph():
    model = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True).double()
    source, target = (torch.randn(2, 6, 16, dtype=torch.float64) for _ in range(2))
    with attach(model, SCALE):
        eager = gradients(model, model(source, target).pow(3).sum())
        run = compiled(model, "aot_eager")
        assert_close(gradients(model, run(source, target).pow(3).sum()), eager)


@pytest.mark.parametrize("how", ["compile(model)", "model.compile()"])
def test_a_model_compiled_and_run_before_it_was_wrapped_is_scaled(how):
    model, batch = Decoder(layers=1).double(), tokens()
    twin = copy.deepcopy(model)
    run = model
    if how == "compile(model)":
        run = compiled(model, "aot_eager")
    else:
        model.compile(fullgraph=True, backend="aot_eager")
    loss_of(run(batch), batch).backward()
    with attach(run, SCALE) as hooks:
        actual = gradients(model, loss_of(run(batch), batch))
        assert hooks.unseen() == []
    reference = {"blocks.0.attn": {"query": SCALE.query, "key": SCALE.key}}
    assert_close(actual, gradients(twin, loss_of(twin(batch, reference), batch)))


@pytest.mark.parametrize("order", ["plain first", "scaled first"])
def test_models_of_one_class_do_not_run_each_others_compiled_code(order):
    plain = Decoder(layers=1).double()
    double, triple = copy.deepcopy(plain), copy.deepcopy(plain)
    batch = tokens()
    attached = [attach(double, {"*": (2.0, 0.5)}), attach(triple, {"*": (3.0, 0.5)})]
    models = [plain, double, triple] if order == "plain first" else [triple, double, plain]
    expected = [gradients(model, loss_of(model(batch), batch)) for model in models]
    for hooks in attached:
        hooks.forget()
    for model, reference in zip(models, expected, strict=True):
        run = compiled(model, "aot_eager")
        assert_close(gradients(model, loss_of(run(batch), batch)), reference)
    assert all(not hooks.unseen() for hooks in attached)
    for hooks in attached:
        hooks.remove()


def test_code_compiled_before_the_first_attachment_is_compiled_anew():
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as in a fresh process
    model, batch = Decoder(layers=1).double(), tokens()
    run = compiled(model, "aot_eager")
    loss_of(run(batch), batch).backward()
    with attach(model, SCALE) as hooks:
        eager = gradients(model, loss_of(model(batch), batch))
        hooks.forget()
        assert_close(gradients(model, loss_of(run(batch), batch)), eager)
        assert hooks.unseen() == []


FIRST_COMPILED = """
import torch
from models import Decoder, loss_of, tokens
from spanopt import attach
model, batch = Decoder(layers=1), tokens()
model.compile(backend="aot_eager")
with attach(model) as hooks:
    for _ in range(3):
        loss_of(model(batch), batch).backward()
    assert hooks.unseen() == []
"""


def test_the_first_passes_of_a_process_may_be_compiled_ones():
    here = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", FIRST_COMPILED], cwd=here, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_removal_is_noticed_by_compiled_code():
    model, batch = Decoder(layers=1).double(), tokens()
    plain = gradients(model, loss_of(model(batch), batch))
    hooks = attach(model, SCALE)
    run = compiled(model, "aot_eager")
    loss_of(run(batch), batch).backward()
    hooks.remove()
    assert_close(gradients(model, loss_of(run(batch), batch)), plain)


def test_the_usual_code_of_attention_layers_compiles_in_one_graph_under_the_tap():
    class Usual(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.qkv = nn.Linear(width, 3 * width)
            self.norm = nn.RMSNorm(width // heads)
            self.register_buffer("positions", torch.arange(64.0))

        def rotate(self, x):
            angle = self.positions[: x.size(2), None] * torch.arange(2, device=x.device)
            cos, sin = angle.cos().repeat(1, 2), torch.sin(angle).repeat(1, 2)
            a, b = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-b, a), dim=-1) * sin

        def forward(self, x):
            batch, length, width = x.size()
            q, k, v = self.qkv(x).split(width, dim=-1)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
            q, k = (self.rotate(self.norm(y)).type_as(v).contiguous() for y in (q, k))
            q = (1 - q) / 2.0 + q**2 - q / q.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            return torch.einsum("bhnd->bnhd", y).reshape(batch, length, -1)

    model, batch = Decoder(attention=Usual, layers=1).double(), tokens()
    with attach(model, SCALE) as hooks:
        eager = gradients(model, loss_of(model(batch), batch))
        hooks.forget()
        assert_close(gradients(model, loss_of(compiled(model, "aot_eager")(batch), batch)), eager)
        assert hooks.unseen() == []


def test_without_fullgraph_a_graph_break_inside_the_layer_changes_nothing():
    class Breaking(ScoreAttention):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    model, batch = Decoder(attention=Breaking, layers=2).double(), tokens()
    with attach(model, SCALE) as hooks:
        eager = gradients(model, loss_of(model(batch), batch))
        hooks.forget()
        run = torch.compile(model, backend="aot_eager")
        assert_close(gradients(model, loss_of(run(batch), batch)), eager)
        assert hooks.unseen() == []


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_compiled_packed_or_score_layer_trains_alone(layer):
    model = layer(16, 4).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with attach(model, SCALE):
        eager = gradients(model, model(x).pow(3).sum())
        run = compiled(model, "aot_eager", dynamic=True)
        for length in (7, 9, 5):
            x = torch.randn(2, length, 16, dtype=torch.float64)
            eager = gradients(model, model(x).pow(3).sum())
            assert_close(gradients(model, run(x).pow(3).sum()), eager)


def test_compiled_training_with_the_optimizer_equals_eager_training():
    results = []
    for mode in ("eager", "compiled"):
        torch.manual_seed(0)
        model = Decoder(layers=1).double()
        optimizer = SpanScaledOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, SpanScale(2.0, 1.0)
        )
        run = compiled(model, "aot_eager") if mode == "compiled" else model
        for _ in range(5):
            batch = tokens()
            optimizer.zero_grad()
            loss_of(run(batch), batch).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("layer", ["score", "packed", "packed with weights", "softmax"])
def test_neither_pass_waits_for_the_device_or_has_shapes_that_depend_on_values(layer):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng():
        options = {"attention": by_hand} if layer == "softmax" else {"attention": LAYERS[layer]}
        model = Decoder(**options)
        optimizer = SpanScaledOptimizer(torch.optim.AdamW(model.parameters()), model, SCALE)
        mask = torch.ones(3, 9, dtype=torch.bool)
        batch = torch.zeros(3, 9, dtype=torch.long)
        with token_mask(mask):
            loss_of(model(batch), batch).backward()  # any such operation on a fake tensor raises
        assert optimizer.hooks.unseen() == []
        assert all(p.grad is not None for p in model.parameters())
        with pytest.raises(DataDependentOutputException):
            batch.sum().item()


def test_a_tap_that_uncompiled_code_calls_is_not_compiled_by_itself():
    """Dynamo leaves nn.TransformerEncoder's own forward alone, so its layers call taps eagerly."""

    def encoder(scaled):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            64, 2, 256, dropout=0.0, batch_first=True, norm_first=True
        )
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        if scaled:
            attach(model, {"*": SpanScale(2.0, 0.5)})
        return model

    x = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(1))
    padding = torch.arange(16) >= torch.tensor([8, 11, 13, 16])[:, None]
    models = {"wrapped": encoder(True), "plain": encoder(False), "eager": encoder(True)}
    for name in ("plain", "wrapped"):
        models[name].compile(backend="eager")
    found = {}
    for name in ("plain", "wrapped", "eager"):
        for _ in range(2):
            models[name].zero_grad()
            models[name](x, src_key_padding_mask=padding).square().sum().backward()
        found[name] = [p.grad for p in models[name].parameters()]
    for mine, reference in zip(found["wrapped"], found["eager"], strict=True):
        torch.testing.assert_close(mine, reference)
    assert not torch.allclose(found["wrapped"][0], found["plain"][0])
