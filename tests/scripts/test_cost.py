"""What span scaling costs, counted and not timed: operations, bytes saved, tensors kept."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spanopt import SpanScaledOptimizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from speed.cases import CASES, build, training_step
from speed.measure import counting_saved, live_bytes

SMALL = {
    "decoder": replace(CASES["demo"], width=64, heads=4, length=48, batch=2, layers=2),
    "wide heads": replace(CASES["decoder N=512"], width=256, heads=2, length=40, batch=2),
    "gqa": replace(CASES["Llama-like GQA"], width=64, heads=4, kv_heads=2, length=48, batch=2),
    "vit": replace(CASES["ViT-B/16"], width=64, heads=4, length=50, batch=2),
    "encoder": replace(CASES["padded encoder"], width=64, heads=4, length=48, batch=2),
}


def wrapped(case, scales=(2.0, 1.0)):
    setting = build(case)
    adamw = torch.optim.AdamW(setting.model.parameters(), lr=1e-3)
    if scales is not None:
        adamw = SpanScaledOptimizer(adamw, setting.model, {"*": scales})
    return setting, adamw


def flops(case, scales):
    setting, optimizer = wrapped(case, scales)
    with FlopCounterMode(display=False) as counter:
        training_step(setting, optimizer)()
    return counter.get_total_flops()


def product_flops(case, tokens=1):
    """Those of matrix products in the projections: of tokens by d, and in two factorisations."""
    d = case.width // case.heads
    of_head = 10 * tokens * case.length * d**2 + 2 * block_flops(d)
    return case.layers * case.batch * (case.heads + case.key_heads) * of_head


def block_flops(d):
    """Those of the products in the Cholesky factor of a d x d matrix: none up to 32 x 32."""
    return 0 if d <= 32 else d**3 // 4 + 2 * block_flops(d // 2)


@pytest.mark.parametrize("kind", SMALL)
def test_a_step_takes_the_operations_that_the_documentation_says(kind):
    case = SMALL[kind]
    added = flops(case, (2.0, 1.0)) - flops(case, None)
    assert added == product_flops(case)
    # What LAPACK does, 11/3 d^3 a head or less, is not counted here and is there.
    assert 0.5 * case.projection_flops(one_solve=False) < added
    assert added < case.projection_flops(one_solve=False)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.5, 1.5), (0.0, 0.0)])
def test_equal_scales_project_nothing(kind, scales):
    assert flops(SMALL[kind], scales) == flops(SMALL[kind], None)


def test_operations_grow_linearly_with_layers_heads_and_tokens():
    case = SMALL["decoder"]
    added = {
        name: flops(other, (2.0, 1.0)) - flops(other, None)
        for name, other in {
            "one": case,
            "layers": replace(case, layers=6),
            "heads": replace(case, heads=12, width=192),
            "batch": replace(case, batch=6),
        }.items()
    }
    assert added["layers"] == added["heads"] == added["batch"] == 3 * added["one"]
    longer = replace(case, length=3 * case.length)
    assert flops(longer, (2.0, 1.0)) - flops(longer, None) == product_flops(case, tokens=3)


def saved(case, scales):
    setting, _ = wrapped(case, scales)
    with counting_saved(setting.model.parameters()) as storages:
        loss = setting.loss()
    assert loss.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("kind", SMALL)
def test_nothing_more_is_saved_for_backward(kind):
    plain, ours = saved(SMALL[kind], None), saved(SMALL[kind], (2.0, 1.0))
    # A padded encoder's mask of real tokens, one byte each; attention saves Q and K anyway.
    masks = 2 * SMALL[kind].layers * SMALL[kind].batch * SMALL[kind].length
    assert plain <= ours <= plain + (masks if kind == "encoder" else 0)


@pytest.mark.parametrize("kind", SMALL)
def test_no_tensor_is_kept_beyond_backward(kind):
    setting, optimizer = wrapped(SMALL[kind])
    step = training_step(setting, optimizer)

    def left():
        step()
        return live_bytes()

    first = left()
    loss = setting.loss()
    assert live_bytes() > first
    loss.backward()
    del loss
    assert left() == first
