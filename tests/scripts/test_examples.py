"""The examples run as scripts, do what they say, and go on where they ended."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EXAMPLES = Path(__file__).parents[2] / "examples"
ELSEWHERE = {  # examples that other tests start
    "accelerate_loop": "integrations/test_trainers.py",
    "compare": "compare_engine/test_compare_engine.py",
    "ddp": "training/test_distributed.py",
    "decoder": "scripts/test_examples.py",  # a module that monitor, ddp and fsdp import
    "fsdp": "training/test_distributed.py",
    "hf_trainer": "integrations/test_trainers.py",
    "lightning_module": "integrations/test_trainers.py",
    "train_text": "scripts/test_train_text.py",
}
HERE = {"finetune_hf", "gpt2_pretrain", "minimal", "monitor"}


@pytest.fixture
def start(monkeypatch, capsys):
    """Run an example with arguments, and return what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def text(tmp_path):
    lines = [
        f"Line {i} of a text about spans and gradients, {'word ' * (i % 7)}." for i in range(60)
    ]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def losses(printed):
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]


def test_every_example_is_started_by_a_test():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == HERE | set(ELSEWHERE)
    for name, test in ELSEWHERE.items():
        assert name in (EXAMPLES.parent / "tests" / test).read_text(encoding="utf-8"), name


def test_minimal_learns_and_has_25_lines(start):
    first, *_, last = losses(start("minimal"))
    assert last < 0.6 * first
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) == 25


def test_monitor_prints_rows_and_draws(start, tmp_path):
    printed = start("monitor", tmp_path / "shares.png", 4)
    assert "parallel_share" in printed
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")


def test_gpt2_pretrain_goes_on_as_if_it_had_not_stopped(start, text, tmp_path):
    small = ("--width", 16, "--layers", 1, "--heads", 2, "--length", 16, "--batch", 2)
    options = (*small, "--text", text, "--lr", "1e-2", "--eval-every", 3)
    printed = start("gpt2_pretrain", *options, "--steps", 6, "--out", tmp_path / "whole")
    assert "transformer.h.0.attn" in printed
    whole = torch.load(tmp_path / "whole" / "checkpoint.pt")
    assert whole["step"] == 6
    assert whole["optimizer"]["span_groups"][0]["parallel"] == 2.0

    class Interrupted(Exception):
        pass

    saved = torch.save

    def save_once(*arguments):
        saved(*arguments)
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save_once)
        with pytest.raises(Interrupted):
            start("gpt2_pretrain", *options, "--steps", 6, "--out", tmp_path / "halves")
    assert torch.load(tmp_path / "halves" / "checkpoint.pt")["step"] == 3
    printed = start("gpt2_pretrain", *options, "--steps", 6, "--out", tmp_path / "halves")
    assert "going on from step 3" in printed
    halves = torch.load(tmp_path / "halves" / "checkpoint.pt")
    for name, value in whole["model"].items():
        assert torch.equal(value, halves["model"][name]), name


def test_finetune_hf_trains_a_model_from_a_folder_on_padded_batches(start, text, tmp_path):
    tokenizer = Tokenizer(models.BPE(vocab={"<end>": 0, **byte_vocabulary(1)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        tmp_path / "base"
    )
    config = hf.GPT2Config(
        vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=0
    )
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    options = ("--text", text, "--length", 48, "--lr", "1e-2", "--out", tmp_path / "tuned")
    printed = start("finetune_hf", "--model", tmp_path / "base", *options)
    before, after = losses(printed)
    assert after < before
    base, tuned = (
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / name).transformer.h[0].attn.c_attn.weight
        for name in ("base", "tuned")
    )
    assert not torch.equal(base, tuned)


def byte_vocabulary(first):
    """Return a number for each byte, as ByteLevel writes it."""
    return {byte: first + i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
