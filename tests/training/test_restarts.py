"""Killed runs that are resumed, and checkpoints that are not what they should be."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compare import equal, same_state
from models import Decoder, loss_of, tokens, train
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from spanopt import SpanScale, SpanScaledOptimizer, SpanScheduler
from spanopt.schedules import chained, constant, cosine, linear

STEPS, KILLS = 60, 20


def run(path: Path) -> None:
    """Train to the end, from the checkpoint if there is one, saving it at every step."""
    torch.manual_seed(0)
    model = nn.Sequential(Decoder(width=32), nn.Dropout(0.1))
    optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-2), model, {"*": (3.0, 0.5)})
    rates = OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    warm_up = chained((linear(20), 20), (constant(), 20), cosine(20))
    scales = SpanScheduler(optimizer, {"*": warm_up, "*.1.attn": lambda step: 1 + step / 100})
    parts = {"model": model, "optimizer": optimizer, "rates": rates, "scales": scales}
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        start = state["step"]
    for step in range(start, STEPS):
        batch = tokens()
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        optimizer.step()
        rates.step()
        scales.step()
        if step == 30:
            optimizer.span_groups[0]["key"] = (1.5, 1.0)  # until the schedule moves it
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"rng": torch.get_rng_state(), "step": step + 1}, f"{path}.new")
        os.replace(f"{path}.new", path)


def kill_at_random(folder: Path, seed: int) -> None:
    """Run once to the end, and once more in as many pieces as there are kills."""
    torch.set_num_threads(1)

    def start(path):
        pid = os.fork()
        if pid == 0:
            run(path)
            os._exit(0)
        return pid

    began = time.monotonic()
    os.waitpid(start(folder / "whole.pt"), 0)
    time_of_all = time.monotonic() - began
    moments, kills = random.Random(seed), 0
    while True:
        pid = start(folder / "pieces.pt")
        if kills < KILLS:
            time.sleep(moments.uniform(0, 1.2 * time_of_all / KILLS))
        if kills == KILLS or os.waitpid(pid, os.WNOHANG)[0]:
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    if kills == KILLS:
        os.waitpid(pid, 0)
    print(json.dumps({"kills": kills}))


def flat(value, at=""):
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flat(item, f"{at}/{i}")
    else:
        yield at, value


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path):
    command = [sys.executable, __file__, str(tmp_path), "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kills"] == KILLS
    whole, pieces = (dict(flat(torch.load(tmp_path / f"{n}.pt"))) for n in ("whole", "pieces"))
    assert whole.keys() == pieces.keys()
    assert len(whole) > 100
    for at, value in whole.items():
        same = torch.equal(value, pieces[at]) if torch.is_tensor(value) else value == pieces[at]
        assert same, at


# Checkpoints that are not what they should be.


def wrapped(model, make=lambda p: AdamW(p, lr=1e-2), scales=None):
    return SpanScaledOptimizer(make(model.parameters()), model, scales or {"*": (3.0, 0.5)})


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_groups(change):
    def changed(state):
        state = copy.deepcopy(state)
        change(state["span_groups"])
        return state

    return changed


CORRUPT = {
    "no state": (without("state"), "not a state dict of AdamW, .*KeyError: 'state'"),
    "no groups": (without("param_groups"), "not a state dict of AdamW, .*KeyError: 'param_groups'"),
    "a model's state dict": (lambda state: Decoder().state_dict(), "not a state dict of AdamW"),
    "None for groups": (lambda state: {**state, "param_groups": None}, "not a state dict of Adam"),
    "None for state": (lambda state: {**state, "state": None}, "not a state dict of AdamW"),
    "other parameters": (lambda state: {**state, "span_parameters": {"a": 1}}, "span_parameters"),
    "a number of parameters": (lambda state: {**state, "span_parameters": 3}, "span_parameters"),
    "not finite": (
        with_groups(lambda groups: groups[1].update(parallel=float("nan"))),
        "scales in the checkpoint .* finite",
    ),
    "no scale": (with_groups(lambda groups: groups[1].update(key="2")), "scales in the checkpoint"),
    "too few heads": (
        with_groups(lambda groups: groups[1].update(parallel=[2.0, 3.0])),
        "'blocks.1.attn': 2 per-head values",
    ),
    "a layer too few": (with_groups(lambda groups: groups.pop()), "only in the model: .*1.attn"),
    "numbers for layers": (lambda state: {**state, "span_groups": 7}, "scales in the checkpoint"),
    "a parameter too few": (
        lambda state: {
            **state,
            "param_groups": [{**state["param_groups"][0], "params": [0]}],
        },
        "parameter group",
    ),
}


@pytest.mark.parametrize(("change", "message"), CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_checkpoint_is_refused_and_changes_nothing(change, message):
    model = Decoder()
    optimizer = wrapped(model)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    optimizer.span_groups[0]["parallel"] = 1.25
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(change(state))
    after = optimizer.state_dict()
    assert same_state(after, before)
    assert after["param_groups"] == before["param_groups"]
    assert after["span_groups"] == before["span_groups"]
    twin = copy.deepcopy(optimizer)
    assert equal(train(twin.model, twin), train(model, optimizer))


OTHERS = {
    "another width": (
        lambda: Decoder(width=32),
        "embed.weight: .11, 32. in the checkpoint, .11, 1",
    ),
    "fewer layers": (lambda: Decoder(layers=1), "only in the model: .'blocks.1.attn'"),
    "more layers": (lambda: Decoder(layers=3), "only in the checkpoint: .'blocks.2.attn'"),
    "another vocabulary": (
        lambda: Decoder(vocabulary=13),
        "embed.weight: .13, 16. in the checkpoint, .11, 16. in the model; head.weight: ",
    ),
}


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_architecture_is_refused_with_what_differs(other, message):
    there = other()
    optimizer = wrapped(there)
    train(there, optimizer)
    model = Decoder()
    fresh = wrapped(model)
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state
    assert fresh.span_groups[0]["parallel"] == 3.0


def test_other_parameter_groups_are_refused_with_their_sizes():
    model = Decoder()
    groups = lambda p: SGD([{"params": x} for x in p], lr=0.1)  # noqa: E731
    with pytest.raises(ValueError, match=r"parameters by group: \[1, 1, .* in the checkpoint"):
        wrapped(Decoder(), lambda p: SGD(p, lr=0.1)).load_state_dict(
            wrapped(model, groups).state_dict()
        )


def test_names_do_not_matter_as_wrappers_of_the_model_change_them():
    model = Decoder()
    inside = wrapped(nn.Sequential(copy.deepcopy(model)), scales={"*": SpanScale(3.0, 0.5)})
    saved = inside.state_dict()
    for entry in saved["span_groups"]:
        entry["name"] = entry["name"].removeprefix("0.")
    wrapped(model).load_state_dict(saved)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
def test_a_truncated_file_changes_nothing(cut, tmp_path):
    model = Decoder()
    optimizer = wrapped(model)
    train(model, optimizer)
    path = tmp_path / "checkpoint.pt"
    torch.save(optimizer.state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((RuntimeError, OSError)):
        optimizer.load_state_dict(torch.load(path, weights_only=True))
    assert same_state(optimizer.state_dict(), before)


if __name__ == "__main__":
    kill_at_random(Path(sys.argv[1]), int(sys.argv[2]))
