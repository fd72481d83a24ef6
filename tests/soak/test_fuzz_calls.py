"""Layers called in every way a model may call them: the oracle's gradients, or an error by name.

A case is a program: which layer is called, how, and in what dtype. Whatever it is, silence with
other gradients than the oracle's is the one outcome that may not be.
"""

import contextlib
import copy
import re

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ScoreAttention, attention
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from spanopt import SpanScale, SpanScaledOptimizer, UnscaledLayerError

QUERY, KEY = (4.0, 0.25), (0.25, 3.0)
SCALE = SpanScale(query=QUERY, key=KEY)
TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.bfloat16: 0.15,
    torch.float16: 0.05,
}


class Manual(ScoreAttention):
    """The same attention, written out."""

    def forward(self, x):
        q, k, v = self.project(x)
        scores = (q @ k.mT) / q.shape[-1] ** 0.5
        y = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).flatten(-2))


class Own(ScoreAttention):
    """The same, which uses the weights of its modules and does not call them."""

    def project(self, x, context=None):
        modules = self.q_proj, self.k_proj, self.v_proj
        linear = nn.functional.linear
        return [linear(x, m.weight, m.bias).unflatten(-1, (4, -1)).transpose(1, 2) for m in modules]


class Packed(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` of one input."""

    def __init__(self):
        super().__init__(16, 4, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]

    def reference(self, x, query, key):
        q, k, v = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (q, k, v))
        return self.out_proj(attention(q, k, v, query, key).transpose(1, 2).flatten(-2))


LAYERS = {"score": ScoreAttention, "softmax": Manual, "packed": Packed, "own": Own}
# Ways that spanopt says it scales, and ways of which it may say that it does not.
PROMISED = ("call", "checkpoint", "no_grad", "interrupted", "dropped")
OTHER = ("forward", "reentrant", "checkpoint of forward", "reentrant of forward")


class Model(nn.Module):
    """Two attention layers, called by a program."""

    def __init__(self, kinds):
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[kind]() for kind in kinds)

    def forward(self, x, program, reference=False):
        for index, way in program:
            layer = self.layers[index]

            def call(y, layer=layer):
                return layer.reference(y, query=QUERY, key=KEY) if reference else layer(y)

            forward = call if reference else layer.forward
            if way == "call":
                x = x + call(x)
            elif way == "forward":
                x = x + forward(x)
            elif way.startswith(("checkpoint", "reentrant")):
                inner = forward if way.endswith("forward") else call
                x = x + checkpoint(inner, x, use_reentrant=way.startswith("reentrant"))
            elif way == "no_grad":
                with torch.no_grad():
                    y = call(x)
                x = x + y
            elif way == "dropped":
                call(x)
            elif not reference:
                handle = layer.out_proj.register_forward_pre_hook(interrupt)
                handle_of_packed = layer.register_forward_hook(interrupt)
                with contextlib.suppress(KeyboardInterrupt):
                    call(x)
                handle.remove()
                handle_of_packed.remove()
        return x


def interrupt(*_):
    raise KeyboardInterrupt


def gradients(model, x, program, **options):
    model.zero_grad()
    model(x, program, **options).float().pow(3).mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# Five times as many as of other cases: 10,000 in a long run.
MANY = settings(max_examples=5 * settings.default.max_examples)
WAYS = st.sampled_from(PROMISED + OTHER)
PROGRAMS = st.lists(st.tuples(st.integers(0, 1), WAYS), min_size=1, max_size=5)


@MANY
@given(
    st.tuples(st.sampled_from(sorted(LAYERS)), st.sampled_from(sorted(LAYERS))),
    PROGRAMS,
    st.sampled_from(list(TOLERANCE)),
    st.integers(0, 99),
)
def test_a_program_of_calls_gives_the_oracles_gradients_or_an_error(kinds, program, dtype, seed):
    torch.manual_seed(seed)
    model = Model(kinds).to(dtype)
    there = copy.deepcopy(model)
    x = torch.randn(2, 7, 16, dtype=dtype, requires_grad=True)
    optimizer = SpanScaledOptimizer(SGD(model.parameters(), lr=0.0), model, SCALE)
    expected = gradients(there, x, program, reference=True) if uses(program) else {}
    try:
        actual = gradients(model, x, program) if expected else {}
        optimizer.step()
    except (UnscaledLayerError, RuntimeError) as error:
        # The message goes on with the layers that were scaled.
        missing = re.split(r"[(;] ?scaled:", str(error))[0]
        named = [i for i in range(2) if f"layers.{i}" in missing]
        assert named, error  # noqa: PT017
        # Where all calls are of ways that are promised, only a layer without one is an error.
        for index in named:
            ways = {way for i, way in program if i == index}
            assert ways & set(OTHER) or not ways & {"call", "checkpoint"}, error  # noqa: PT017
        return
    finally:
        optimizer.detach()
    assert actual.keys() == expected.keys()
    size = max([g.abs().max().item() for g in expected.values()], default=1.0)
    for name, grad in expected.items():
        assert (actual[name] - grad).abs().max().item() <= TOLERANCE[dtype] * size, name


def uses(program):
    return any(way not in ("no_grad", "interrupted", "dropped") for _, way in program)
