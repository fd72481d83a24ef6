"""``python -m spanopt inspect`` on models that can be scaled, that cannot, and on none."""

import json
import subprocess
import sys

import pytest
import torch
from models import Decoder, ScoreAttention
from torch import nn

from spanopt.__main__ import main
from spanopt.inspection import inspect_model


class Sigmoid(ScoreAttention):
    def forward(self, x):
        q, k, v = self.project(x)
        return self.out_proj(((q @ k.mT).sigmoid() @ v).transpose(1, 2).flatten(-2))


class ByHand(ScoreAttention):
    def forward(self, x):
        q, k, v = self.project(x)
        return self.out_proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Skipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = ScoreAttention(), ScoreAttention()

    def forward(self, x):
        return self.used(x)


class Router(nn.Module):
    """Multiplies and takes a softmax, and is no attention."""

    def __init__(self):
        super().__init__()
        self.gate, self.noise = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return (self.gate(x) @ self.noise.weight).softmax(-1) * x


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = ScoreAttention()

    def forward(self, x, wanted):
        return self.attn(x)[wanted["rows"]]


def decoder():
    return Decoder(layers=2)


def mixed():
    return nn.Sequential(ScoreAttention(), Sigmoid(), ByHand(), Router())


def with_inputs():
    return TwoInputs(), (torch.randn(2, 8, 16), {"rows": 0})


def two_inputs():
    return TwoInputs()


def linear():
    return nn.Linear(2, 2)


def no_model():
    return 3


def test_every_layer_of_a_good_model_is_listed(capsys):
    assert main(["inspect", "test_inspection:decoder"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "layer class tap heads head dim Q/K train scaled"
    assert " ".join(lines[1].split()) == "blocks.0.attn ScoreAttention score 4 4 yes yes"
    assert lines[-1] == "2 of 2 attention layers can be scaled"


def test_json_says_what_would_be_missed_and_why(capsys):
    assert main(["inspect", "--json", "test_inspection:mixed"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert [(x["name"], x["tap"]) for x in found["layers"]] == [
        ("0", "score"),
        ("1", None),
        ("2", "softmax"),
    ]
    missed = [x["missed"] for x in found["layers"]]
    assert missed[0] is missed[2] is None
    assert "qk_modules" in missed[1]


def test_a_layer_that_does_not_run_is_named():
    inspection = inspect_model(Skipped())
    assert [x.missed for x in inspection.layers] == [None, "it did not run in this forward pass"]
    assert not inspection.ok


def test_the_factory_may_give_inputs(capsys):
    assert main(["inspect", "test_inspection:with_inputs"]) == 0
    assert "1 of 1" in capsys.readouterr().out


def test_without_a_forward_pass_the_report_says_so(capsys):
    main(["inspect", "test_inspection:two_inputs"])
    assert "No forward pass could be made" in capsys.readouterr().out
    inspection = inspect_model(mixed(), (torch.ones(3),))
    assert not inspection.ok
    assert [x.missed for x in inspection.layers][1:] == ["not known without a forward pass"] * 3


def test_a_model_without_attention_is_not_ok(capsys):
    assert main(["inspect", "test_inspection:linear"]) == 1
    assert "No attention layer was found in Linear" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_inspection"], "not of the form package.module:factory"),
        (["no_such_module:x"], "No module named 'no_such_module'"),
        (["test_inspection:absent"], "no attribute 'absent'"),
        (["test_inspection:no_model"], "gave int"),
        (["--hf", '{"model_type": "nope"}'], "nope"),
        (["--hf", "absent.json"], "absent.json"),
        ([], "required"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_inspection_leaves_the_model_as_it_was():
    model = decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert inspect_model(model).ok
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_are_shown():
    model = decoder()
    model.blocks[0]["attn"].q_proj.requires_grad_(False)
    model.blocks[1].requires_grad_(False)
    assert [x.trains for x in inspect_model(model).layers] == ["some", "no"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Transformer(8, 2, 1, 1),
        nn.TransformerEncoderLayer(8, 2),
        nn.Sequential(nn.Embedding(5, 8), nn.TransformerEncoderLayer(8, 2)),
        nn.Sequential(nn.LayerNorm(16), ScoreAttention()),
    ],
    ids=["nn.Transformer", "layer", "embedding", "norm first"],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_inputs_are_made_up_for_usual_models(model):
    inspection = inspect_model(model)
    assert inspection.note is None
    assert inspection.ok


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


@pytest.mark.parametrize(
    ("model_type", "attention", "tap"),
    [("bert", "sdpa", "score"), ("bert", "eager", "softmax"), ("vit", "sdpa", "score")],
)
def test_a_transformers_config_is_enough(model_type, attention, tap, capsys):
    config = json.dumps({"model_type": model_type, **SMALL})
    assert main(["inspect", "--json", "--hf", config, "--attn", attention]) == 0
    assert {x["tap"] for x in json.loads(capsys.readouterr().out)["layers"]} == {tap}


@pytest.mark.parametrize("model_type", ["whisper", "t5", "clip"])
def test_inputs_are_made_up_for_models_of_other_senses(model_type, capsys):
    assert main(["inspect", "--hf", model_type]) == 0
    assert "No forward pass" not in capsys.readouterr().out


def test_a_large_model_is_inspected_without_memory_for_it(capsys):
    assert main(["inspect", "--hf", "llama"]) == 0  # 6.7 billion parameters
    assert "32 of 32 attention layers can be scaled" in capsys.readouterr().out


def test_a_config_file_is_read(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "vit", "image_size": 32, **SMALL}))
    assert main(["inspect", "--hf", str(path)]) == 0
    assert "2 of 2" in capsys.readouterr().out


def test_it_runs_as_a_module(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef build():\n    return nn.TransformerEncoderLayer(8, 2)\n"
    )
    command = [sys.executable, "-m", "spanopt", "inspect", "mine:build"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "self_attn  MultiheadAttention  packed" in done.stdout
