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


def wrong_inputs():
    return TwoInputs(), (torch.randn(2, 8, 3), {"rows": 0})


class Gpt(Decoder):
    """Its first parameter is not the embedding's, and its forward does not name ids."""

    def __init__(self):
        super().__init__(layers=1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, targets=None):
        return super().forward(x) * self.scale


class ClassToken(nn.Module):
    """The layers are registered before the embedding that the forward begins with."""

    def __init__(self):
        super().__init__()
        self.attn = ScoreAttention()
        self.head = nn.Linear(16, 11)
        self.embedding = nn.Embedding(11, 16)

    def forward(self, x):
        return self.head(self.attn(self.embedding(x)))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": ScoreAttention()}) for _ in range(4))
        self.last = ScoreAttention()

    def forward(self, x):
        for block in self.blocks:
            x = block["attn"](x)
        return self.last(x)


def deep():
    return Deep()


def raises():
    raise ValueError("no such width\nand more")


def leaves():
    sys.exit("gone")


def needs_arguments(width, depth=2):
    return nn.Linear(width, depth)


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
    assert main(["inspect", "test_inspection:two_inputs"]) == 3
    printed = capsys.readouterr().out
    assert "unverified: 1 attention layers found" in printed
    assert "No forward pass could be made with inputs that were made up" in printed
    assert main(["inspect", "--json", "test_inspection:two_inputs"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["verified"] is found["ok"] is False
    inspection = inspect_model(mixed(), (torch.ones(3),))
    assert not inspection.ok
    assert not inspection.verified
    assert [x.missed for x in inspection.layers][1:] == ["not known without a forward pass"] * 3


def test_inputs_of_the_factory_that_fail_are_named_as_such(capsys):
    assert main(["inspect", "test_inspection:wrong_inputs"]) == 3
    printed = capsys.readouterr().out
    assert "those that the factory returned) fail in the model's forward pass: Run" in printed
    assert "made up" not in printed
    assert "unverified" in printed


def test_ids_are_made_up_for_a_model_that_begins_with_an_embedding():
    assert inspect_model(Gpt()).ok
    assert inspect_model(ClassToken()).ok


def test_equal_rows_are_collapsed(capsys):
    assert main(["inspect", "test_inspection:deep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:-2]] == [
        "blocks.0.attn to blocks.3.attn",
        "last",
    ]
    assert lines[-1] == "5 of 5 attention layers can be scaled"
    assert main(["inspect", "--json", "test_inspection:deep"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 5


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
        (["test_inspection:deeep"], "no attribute 'deeep'; did you mean deep"),
        (["test_inspection:raises"], "'test_inspection:raises' raised ValueError: no such width"),
        (["test_inspection:leaves"], "raised SystemExit: gone"),
        (["test_inspection:needs_arguments"], "needs arguments, (width, depth=2)"),
        (["mm.py:GPT"], "'mm.py' is a file: name the module, as in mm:GPT"),
        (["os:system"], "'os:system' is a builtin function, neither a model nor"),
        (["os:abort"], "'os:abort' is a builtin function, neither a model nor"),
        (["os:path"], "'os:path' is a module, neither a model nor"),
        (["--hf", "lama"], "has no model type 'lama'. Did you mean llama"),
        (["--hf", '{"hidden_size": 3}'], "no model_type"),
        (["--hf", '{"model_type": "nope"}'], "nope"),
        (["--hf", "absent.json"], "absent.json"),
        ([], "required"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    if arguments:
        assert error.count("\n") == 1


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
