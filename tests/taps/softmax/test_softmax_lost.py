"""Where the way from product to softmax is lost, an error says at which operation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spanopt import (
    UnscaledLayerError,
    attach,
)
from taps.softmax.softmax_forms import (
    PADDED_KEYS,
    SCALE,
    WEIGHTS,
    WINDOW,
    ByHand,
    N,
    both_inputs,
    check,
    padded_oracle,
    scores,
    tokens,
)

# Functions that no mode sees.


class Script(nn.Module):
    """Weights of scores that a function of TorchScript changes."""

    def __init__(self, source):
        super().__init__()
        self.changed = torch.jit.CompilationUnit(f"def changed(x):\n    return {source}\n").changed

    def forward(self, q, k):
        return self.changed(scores(q, k)).masked_fill(PADDED_KEYS, -torch.inf).softmax(-1)


@pytest.mark.parametrize("source", ["torch.tanh(x / 2.0) * 2.0", "x.abs().sqrt().neg()"])
def test_an_elementwise_script_is_followed_also_when_it_is_optimised(source):
    class Layer(ByHand):
        def __init__(self):
            super().__init__(None)
            self.weigh = Script(source)

    model, inputs = Layer().double(), both_inputs()
    hook = padded_oracle(True, ~PADDED_KEYS.squeeze(2).numpy())
    for _ in range(3):  # TorchScript optimises a function when it is run again
        check(model, *inputs, hook=hook)


@pytest.mark.parametrize(
    "source", ["x.cumsum(-1) * 2.0", "x.softmax(1) / 2.0", "x + x.mean(-1, keepdim=True)"]
)
def test_a_script_that_is_not_elementwise_loses_the_scores(source):
    class Layer(ByHand):
        def __init__(self):
            super().__init__(None)
            self.weigh = Script(source)

    model, inputs = nn.Sequential(Layer().double()), both_inputs()
    for _ in range(3):
        model[0](*inputs).sum().backward()
    with attach(model, SCALE) as hooks:
        model[0](*inputs).sum().backward()
        with pytest.raises(UnscaledLayerError, match="layer '0'"):
            hooks.check()


class Own(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.roll(1, -1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad.roll(-1, -1)


LOSSES = {
    "flip": lambda x: x.flip(-1).softmax(-1),
    "roll": lambda x: ((x + 1).roll(1, -1) * 2).softmax(-1),
    "pad": lambda x: F.pad(x / 2, (1, 1)).relu().softmax(-1)[..., 1:-1],
    "cumsum": lambda x: x.cumsum(-1).masked_fill(WINDOW, -1e9).softmax(-1),
    "OwnBackward": lambda x: (Own.apply(x) + 1).softmax(-1),
    "a softmax that is not over one side's tokens": lambda x: x.softmax(1),
}


@pytest.mark.parametrize("operation", LOSSES)
def test_the_error_names_the_operation_at_which_the_product_was_lost(operation):
    model = nn.Sequential(ByHand(lambda q, k: LOSSES[operation](scores(q, k)))).double()
    message = f"their product was lost on its way to a softmax: at {operation}\\."
    with attach(model, SCALE) as hooks:
        with pytest.raises(UnscaledLayerError, match=message):
            hooks.probe(model[0], both_inputs())
        model[0](*both_inputs()).sum().backward()
        with pytest.raises(UnscaledLayerError, match=message):
            hooks.check()


class Distances(ByHand):
    def __init__(self):
        super().__init__(lambda q, k: (-torch.cdist(q, k)).softmax(-1))


class Recurrent(ByHand):
    def __init__(self):
        super().__init__(lambda q, k: scores(q, k).tril() / N)


def test_the_error_says_of_each_kind_of_layer_what_was_seen():
    model = nn.Sequential(Distances(), Recurrent(), Distances()).double()
    with attach(model, SCALE), pytest.raises(UnscaledLayerError) as raised:
        model(tokens())
    text = str(raised.value)
    assert text.count("Each Distances called no attention that can be seen: it took a softmax") == 1
    assert "The Recurrent called no attention that can be seen: neither torch.nn" in text
    assert text.index("pass qk_modules=") < text.index("give it the scale None")


def test_for_layers_without_a_softmax_the_first_advice_is_a_pattern_with_the_scale_none():
    blocks = [
        nn.ModuleDict({"linear_attn": Recurrent(), "attn": ByHand(WEIGHTS["q @ k.mT"])})
        for _ in range(2)
    ]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks)}).double()

    def run_all(x):
        for block in model["blocks"]:
            for layer in block.values():
                x = layer(x)
        return x

    with attach(model, SCALE) as hooks:
        run_all(tokens()).sum().backward()
        with pytest.raises(UnscaledLayerError) as raised:
            hooks.check()
    text = str(raised.value)
    advice = "give it the scale None: scales={..., '*.linear_attn': None}"
    assert text.index(advice) < text.index("pass qk_modules=")
    with attach(model, {"*": SCALE, "*.linear_attn": None}) as hooks:
        run_all(tokens()).sum().backward()
        hooks.check()
