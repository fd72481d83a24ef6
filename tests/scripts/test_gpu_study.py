"""The study of a larger decoder runs at toy size on a CPU, keeps to its time, and goes on."""

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_study

TINY = ["--tiny", "--rates", "1e-3", "--seeds", "2", "--steps", "2"]


def records(folder):
    lines = (folder / "gpu-0.001.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_it_runs_and_goes_on_where_it_was(tmp_path, capsys):
    assert gpu_study.main([*TINY, "--out", str(tmp_path)]) == 0
    assert "| (1, 2) | " in capsys.readouterr().out
    first = records(tmp_path)
    trials = [(r["trial"]["seed"], r["trial"]["parallel"], r["trial"]["violation"]) for r in first]
    scales = [(1.0, 1.0), (2, 1), (2, 2), (1, 2)]
    assert trials == [(seed, *pair) for seed in (0, 1) for pair in scales]
    losses = [r["result"]["reporting"] for r in first]
    assert len({*losses}) == 8
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.count("2 seeds") == 3

    path = tmp_path / "gpu-0.001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:30])  # as a killed run leaves it
    assert gpu_study.main([*TINY, "--out", str(tmp_path)]) == 0
    assert [r["result"]["reporting"] for r in records(tmp_path)] == losses


def test_what_does_not_fit_into_the_time_is_not_begun(tmp_path, capsys):
    assert gpu_study.main([*TINY, "--minutes", "0", "--out", str(tmp_path)]) == 0
    assert "Not one arm has been compared" in capsys.readouterr().out
    assert not (tmp_path / "gpu-0.001.jsonl").exists()


def test_a_dictionary_is_read_as_it_is_packed(tmp_path):
    path = tmp_path / "words.dict.dz"
    path.write_bytes(gzip.compress(b"an entry\n" * 500))
    text = gpu_study.read(path)
    assert (text.name, len(text.train), len(text.validation)) == (path.name, 3600, 900)
    with pytest.raises(FileNotFoundError):
        gpu_study.read(tmp_path / "none")


def test_results_of_another_text_are_refused(tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("one two three " * 2000)
    out = tmp_path / "out"
    assert gpu_study.main([*TINY, "--out", str(out)]) == 0
    assert gpu_study.main([*TINY, "--text", str(other), "--out", str(out)]) == 2
    assert "has results of another text" in capsys.readouterr().err
