"""The demo: it runs end to end, survives SIGKILL bit for bit, and says what its figures show."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "train_text.py"
sys.path.insert(0, str(SCRIPT.parent))  # as for a script
train_text = importlib.import_module("train_text")
results, resuming, texts = (
    importlib.import_module(f"text_demo.{name}") for name in ("results", "resuming", "texts")
)
TINY = (
    *("--width", "12", "--heads", "2", "--layers", "1", "--length", "16", "--batch", "4"),
    *("--threads", "1", "--seeds", "2", "--steps", "12", "--eval-every", "4"),
)
# Runs the script and kills it within the n-th call of os.<name>, before or after it takes effect.
KILL_WITHIN = """
import os, runpy, signal, sys
name, calls, after = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "after"
real = getattr(os, name)
def deadly(*args):
    global calls
    calls -= 1
    if calls == 0 and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args)
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(os, name, deadly)
sys.argv = sys.argv[4:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def restore_torch():
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    words = ["span", "violation", "query", "key", "gradient", "of", "the", "and"]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(800)), encoding="utf-8")
    return path


def results_of(out):
    return json.loads((out / "results.json").read_text())


def losses_of(out):
    return [(row["plain"], row["span"]) for row in results_of(out)["seeds"]]


def run_here(text, out, *options):
    return train_text.main([*TINY, "--text", str(text), "--out", str(out), *options])


def command(text, out, *options):
    return [*map(str, (SCRIPT, *TINY, "--text", text, "--out", out, *options))]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the text ------------------------------------------------------------------------------------


def test_default_text_is_long_enough_and_split_by_position():
    train, validation = texts.default_text()
    assert len(train) > 200_000
    assert len(validation) == pytest.approx(len(train) / 9, rel=0.01)
    data = texts.encode(train, validation, length=128)
    assert data.windows.shape == (64, 129)
    assert data.vocabulary == len(set(train + validation))


def test_encoding_round_trips_and_the_parts_do_not_overlap():
    data = texts.encode("abcabcé" * 3, "aXYb" * 2, length=7)
    alphabet = sorted(set("abcéXY"))
    assert "".join(alphabet[i] for i in data.train) == "abcabcé" * 3
    assert ["".join(alphabet[i] for i in window) for window in data.windows] == ["aXYb" * 2]


def test_a_hub_dataset_is_loaded_with_its_own_validation_split(monkeypatch):
    class Rows(dict):
        column_names = ("text",)

    def load_dataset(*args):
        assert args == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        return {name: Rows(text=[name, "text"]) for name in ("test", "train", "validation")}

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert texts.dataset_text("wikitext-2") == ("train\ntext", "validation\ntext")


# --- whole runs ----------------------------------------------------------------------------------


def test_the_script_runs_end_to_end(text, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, *command(text, out)], capture_output=True, text=True, check=True
    )
    results = results_of(out)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert results["reading"] in done.stdout
    assert "span-scaled" in done.stdout
    assert results["config"]["optimizer"] == "torch.optim.AdamW"
    assert [row["seed"] for row in results["seeds"]] == [0, 1]
    for row in results["seeds"]:
        assert row["curves"]["steps"] == [0, 4, 8, 12]
        assert row["plain"] == row["curves"]["plain"][-1] < row["curves"]["plain"][0]
        assert row["plain"] != row["span"]
        assert row["curves"]["plain"][0] == row["curves"]["span"][0]
        assert row["change_percent"] == pytest.approx(100 * (row["span"] / row["plain"] - 1))
        assert 0.1 < row["step_time_ratio"] < 10
    assert losses_of(out)[0] != losses_of(out)[1]
    changes = [row["change_percent"] for row in results["seeds"]]
    assert results["mean_change_percent"] == pytest.approx(sum(changes) / 2)


def test_unit_scales_give_both_arms_the_same_losses_bit_for_bit(text, tmp_path):
    assert run_here(text, tmp_path / "out", "--parallel", "1", "--violation", "1") == 0
    assert all(plain == span for plain, span in losses_of(tmp_path / "out"))
    assert results_of(tmp_path / "out")["reading"].startswith("No difference")


@pytest.mark.parametrize("name", ["yogi", "torch_optimizer.RAdam", "Adahessian", "lbfgs"])
def test_other_optimizers_train_by_name(text, tmp_path, name):
    lr = "0.005" if name == "lbfgs" else "0.05"  # a higher one lets LBFGS diverge on some machines
    options = ("--optimizer", name, "--lr", lr, "--seeds", "1")
    assert run_here(text, tmp_path / "out", *options) == 0
    results = results_of(tmp_path / "out")
    row = results["seeds"][0]
    assert name.rpartition(".")[2].lower() in results["config"]["optimizer"].lower()
    assert row["plain"] < row["curves"]["plain"][0]
    assert math.isfinite(row["span"])
    assert row["plain"] != row["span"]


def test_divergence_is_reported_and_not_compared(text, tmp_path):
    options = ("--optimizer", "SGD", "--lr", "1e38")
    assert run_here(text, tmp_path / "out", *options) == 0
    results = results_of(tmp_path / "out")
    assert results["reading"].startswith("No comparison: plain training diverged in 2 of 2 seeds")
    assert results["seeds"][0]["plain"] is None


# --- checkpoints ---------------------------------------------------------------------------------

KILLS = [
    ("replace", 1, "before"),  # the first checkpoint is written but not in place
    ("replace", 2, "after"),
    ("fsync", 2, "before"),
]


def kill_at_random(arguments, rng):
    """Kill a run within 0.3 s of its first new checkpoint; say whether it finished."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in process.stdout:
        if line.startswith("step "):
            break
    time.sleep(rng.uniform(0, 0.3))
    process.kill()
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode == 0


@pytest.mark.long
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(text, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    longer = ("--steps", "60", "--eval-every", "7")
    subprocess.run([sys.executable, *command(text, whole, *longer)], check=True)
    resume = command(text, killed, *longer, "--resume")
    for name, calls, when in KILLS:
        arguments = [sys.executable, "-c", KILL_WITHIN, name, str(calls), when, *resume]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    seed = random.randrange(2**32)
    print("random moments of seed", seed)
    rng = random.Random(seed)
    for _ in range(8):
        if kill_at_random(resume, rng):
            break
    subprocess.run([sys.executable, *resume], check=True)
    assert losses_of(killed) == losses_of(whole)
    rows = zip(results_of(killed)["seeds"], results_of(whole)["seeds"], strict=True)
    assert all(a["curves"] == b["curves"] for a, b in rows)


def test_resuming_a_finished_run_leaves_its_results_as_they_are(text, tmp_path):
    out = tmp_path / "out"
    run_here(text, out)
    before = contents(out)
    assert run_here(text, out, "--resume") == 0
    assert contents(out) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--steps", "16"), "steps: 12, now 16"),
        (("--parallel", "3"), "parallel: 2.0, now 3.0"),
        (("--optimizer", "SGD"), "optimizer: torch.optim.AdamW, now torch.optim.SGD"),
    ],
)
def test_resuming_with_another_configuration_is_refused(text, tmp_path, capsys, options, named):
    out = tmp_path / "out"
    run_here(text, out)
    before = contents(out)
    capsys.readouterr()
    assert run_here(text, out, "--resume", *options) == 2
    assert named in capsys.readouterr().err
    assert contents(out) == before


def test_resuming_with_another_text_is_refused(text, tmp_path, capsys):
    out = tmp_path / "out"
    run_here(text, out)
    before = contents(out)
    text.write_text(text.read_text() + "!")
    assert run_here(text, out, "--resume") == 2
    assert "text (sha256)" in capsys.readouterr().err
    assert contents(out) == before


def test_a_damaged_checkpoint_is_refused(text, tmp_path, capsys):
    out = tmp_path / "out"
    run_here(text, out)
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:1000])
    assert run_here(text, out, "--resume") == 2
    assert "cannot read" in capsys.readouterr().err


def rewritten(path, change):
    """Change the content of a checkpoint and give it the digest of what it is now."""
    head = len(resuming.MAGIC) + 65
    saved = torch.load(io.BytesIO(path.read_bytes()[head:]), weights_only=True)
    change(saved)
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest().encode()
    path.write_bytes(resuming.MAGIC + digest + b"\n" + buffer.getvalue())


def assert_resuming_is_refused(text, out, capsys, part):
    before = contents(out)
    capsys.readouterr()
    assert run_here(text, out, "--resume") == 2
    error = capsys.readouterr().err
    assert error.startswith("train_text.py: error: ")
    assert error.count("\n") == 1
    assert part in error
    assert contents(out) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Give a text and the folder of a run that has ended, to copy."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "text.txt"
    path.write_text("a text of words and more words " * 60, encoding="utf-8")
    with torch.random.fork_rng():
        assert run_here(path, folder / "out") == 0
    return path, folder / "out"


@pytest.fixture
def run_of(finished, tmp_path):
    text, out = finished
    shutil.copytree(out, tmp_path / "out")
    return text, tmp_path / "out"


@pytest.mark.parametrize("place", [0.3, 0.5, 0.9, 0.99])
def test_a_flipped_bit_in_a_checkpoint_is_refused(run_of, capsys, place):
    text, out = run_of
    content = bytearray((out / "checkpoint.pt").read_bytes())
    content[int(place * len(content))] ^= 1
    (out / "checkpoint.pt").write_bytes(content)
    assert_resuming_is_refused(text, out, capsys, "it is damaged (its digest is another)")


@pytest.mark.parametrize("content", [b"", b"something else", b"PK\x03\x04" + bytes(200)])
def test_a_file_that_is_no_checkpoint_is_refused(run_of, capsys, content):
    text, out = run_of
    (out / "checkpoint.pt").write_bytes(content)
    assert_resuming_is_refused(text, out, capsys, "it is no checkpoint of this script")


def swap_arms(saved):
    saved["arms"] = dict(zip(("span", "plain"), saved["arms"].values(), strict=True))


def change_state(saved):
    saved["arms"]["plain"]["model"].popitem()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (swap_arms, "its arms are swapped"),
        (lambda saved: saved["arms"].pop("span"), "its arms are ['plain']"),
        (lambda saved: saved["records"].clear(), "it has 0 seeds"),
        (lambda saved: saved["records"].append(saved["records"][0]), "it has 3 seeds"),
        (lambda saved: saved["records"][0]["steps"].pop(), "seed 0 ends at step 8"),
        (lambda saved: saved["records"][0]["steps"].reverse(), "steps [12, 8, 4, 0]"),
        (lambda saved: saved["records"][1]["losses"]["span"].pop(), "not one loss for each"),
        (lambda saved: saved["records"][1].pop("losses"), "not one loss for each"),
        (lambda saved: saved["records"][1].update(more=1), "not what a run writes"),
        (lambda saved: saved.pop("records"), "it has no records"),
        (change_state, "the checkpoint does not fit the arm plain"),
    ],
)
def test_a_checkpoint_with_another_content_is_refused(run_of, capsys, change, part):
    text, out = run_of
    rewritten(out / "checkpoint.pt", change)
    assert_resuming_is_refused(text, out, capsys, part)


def test_symbolic_links_are_not_followed(run_of, tmp_path, capsys):
    text, out = run_of
    elsewhere = tmp_path / "elsewhere"
    (out / "checkpoint.pt").rename(elsewhere)
    (out / "checkpoint.pt").symlink_to(elsewhere)
    assert_resuming_is_refused(text, out, capsys, "it is a symbolic link")
    written = elsewhere.read_bytes()
    other = tmp_path / "other"
    other.write_text("of somebody else")
    (out / "checkpoint.pt.tmp").symlink_to(other)
    (out / "results.json.tmp").symlink_to(other)
    assert run_here(text, out) == 0
    assert elsewhere.read_bytes() == written
    assert other.read_text() == "of somebody else"
    assert not (out / "checkpoint.pt").is_symlink()
    assert sorted(contents(out)) == ["checkpoint.pt", "curves.png", "results.json"]


@pytest.mark.parametrize("size", [1000, 100_000], ids=["checkpoint", "picture"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(text, tmp_path, capsys, size):
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        assert run_here(text, out) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    error = capsys.readouterr().err
    name = "checkpoint.pt" if size == 1000 else "curves.png"
    assert error == f"train_text.py: error: cannot write {out / name}: File too large\n"
    assert sorted(contents(out)) == ([] if size == 1000 else ["checkpoint.pt"])


def test_without_resume_a_run_starts_afresh(text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_here(text, out, "--parallel", "3")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_text, "save_checkpoint", interrupt)
        assert run_here(text, out) == 130
    assert contents(out) == {}, "what the earlier run wrote is gone"
    assert run_here(text, out, "--resume") == 0
    run_here(text, tmp_path / "other")
    assert losses_of(out) == losses_of(tmp_path / "other")


# --- mistakes ------------------------------------------------------------------------------------


def assert_one_line_error(arguments, capsys, *parts):
    assert train_text.main([*TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("train_text.py: error: ")
    assert captured.err.count("\n") == 1
    assert all(part in captured.err for part in parts), captured.err


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("adamq", ("no optimizer is named adamq", "did you mean", "Adam")),
        ("Optimizer", ("no optimizer is named Optimizer",)),
        ("SparseAdam", ("cannot train this model", "dense gradients")),
        ("Lookahead", ("cannot train this model",)),
    ],
)
def test_an_unfit_optimizer_is_named(text, tmp_path, capsys, name, parts):
    arguments = ("--text", str(text), "--out", str(tmp_path / "out"), "--optimizer", name)
    assert_one_line_error(arguments, capsys, *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read"),
        (b"caf\xe9 au lait", "not UTF-8"),
        (b"", "too short"),
        (b"short" * 32, "too short"),
    ],
)
def test_an_unfit_text_is_named(tmp_path, capsys, content, part):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    out = str(tmp_path / "out")
    assert_one_line_error(("--text", str(path), "--out", out), capsys, part)


def test_a_text_just_long_enough_trains(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a short text " * 13)
    assert len(path.read_text()) == 169  # a tenth is 17 characters, one more than a window
    assert run_here(path, tmp_path / "out") == 0


def test_the_script_as_a_command_reports_a_mistake_without_a_traceback(tmp_path):
    arguments = command(tmp_path / "missing.txt", tmp_path / "out")
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("train_text.py: error: cannot read")
    assert done.stderr.count("\n") == 1


def test_a_missing_datasets_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_one_line_error(("--dataset", "wikitext-2"), capsys, "pip install datasets")


def test_a_missing_network_is_named(capsys, monkeypatch):
    def load_dataset(*_):
        raise ConnectionError("no route to host\nand a lot more")

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    parts = ("cannot load the dataset name:config", "ConnectionError: no route to host")
    assert_one_line_error(("--dataset", "name:config"), capsys, *parts)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--seeds", "0"), "above 0"),
        (("--steps", "many"), "not a number"),
        (("--lr", "-1"), "above 0"),
        (("--parallel", "nan"), "finite"),
        (("--heads", "5"), "multiple of --heads 5"),
        (("--text", "a", "--dataset", "b"), "not allowed with"),
    ],
)
def test_bad_values_are_named(capsys, options, part):
    with pytest.raises(SystemExit) as stop:
        train_text.main([*TINY, *options])
    assert stop.value.code == 2
    assert part in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_named(text, tmp_path, capsys):
    out = tmp_path / "file"
    out.write_text("")
    arguments = ("--text", str(text), "--out", str(out))
    assert_one_line_error(arguments, capsys, "cannot write to")


# --- the reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "span", "start", "conclusive"),
    [
        ([2.0, 2.1, 2.2], [1.98, 2.08, 2.18], "Span scaling lowered", True),
        ([2.0, 2.1, 2.2], [2.02, 2.12, 2.22], "Span scaling raised", True),
        ([2.0, 2.0, 2.0], [1.9, 2.1, 2.01], "The difference is inside the seeds' spread", False),
        ([2.0, 2.0, 2.0], [1.999, 1.99, 1.80], "The difference is inside the seeds' spread", False),
        ([2.0] * 5, [1.9, 1.9, 1.9, 1.9, 2.0001], "The seeds do not agree on the sign", False),
        ([2.0], [1.9], "Span scaling changed the validation loss by -5.00 %", False),
    ],
)
def test_the_reading_follows_from_the_figures(plain, span, start, conclusive):
    reading = results.read_result(plain, span)
    assert reading.startswith(start)
    assert ("no conclusion" not in reading) == conclusive
    assert "\n" not in reading


def test_the_reading_gives_the_figures():
    reading = results.read_result([2.0, 2.0, 2.0], [1.98, 1.96, 1.94])
    assert "in all 3 seeds" in reading
    assert "mean -2.00 %" in reading
    assert "seeds 1.00 %" in reading
    assert "1 time in 4" in reading


def test_one_seed_says_nothing_about_spread():
    assert "one seed says nothing about spread" in results.read_result([2.0], [1.0])


@pytest.mark.parametrize(
    ("plain", "span", "named"),
    [
        ([2.0, math.nan], [2.0, 2.0], "plain training diverged in 1 of 2 seeds (loss"),
        ([2.0, 2.0], [math.inf, math.nan], "span-scaled training diverged in 2 of 2 seeds"),
        ([math.nan], [math.nan], "1 of 1 seeds and span-scaled training diverged in 1 of 1"),
    ],
)
def test_divergence_leaves_nothing_to_compare(plain, span, named):
    reading = results.read_result(plain, span)
    assert reading.startswith("No comparison: ")
    assert named in reading
