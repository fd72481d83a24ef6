"""The benchmark on GPUs runs, and the page shows what it measured."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench
import gpu

from spanopt.projection import set_formulation


@pytest.fixture(autouse=True)
def _auto():
    yield
    set_formulation("auto")


def test_it_runs_on_a_cpu_and_the_page_shows_it(tmp_path, capsys):
    arguments = ["--device", "cpu", "--tiny", "--rounds", "2", "--out", str(tmp_path / "x.json")]
    gpu.main([*arguments, "GPT-2 small N=512"])
    assert "GPT-2 small N=512, eager: plain" in capsys.readouterr().out
    record = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    (row,) = record["rows"]
    assert row["kernels added"] > 0
    assert all(value > 0 for value in (row["plain step, ms"], *row["wrapped / plain"]))
    record["left_out"] = ["GPT-2 medium N=1024, eager: no time was left"]
    (tmp_path / "x.json").write_text(json.dumps(record), encoding="utf-8")
    page = bench.Page(gpus=tmp_path).gpu()
    assert page.startswith("### CPU\n")
    assert "Left out: GPT-2 medium N=1024, eager: no time was left." in page
    assert f"| {bench.three(row['wrapped / plain'])} |" in page


def test_what_the_time_is_not_enough_for_is_left_out_and_said(tmp_path, capsys):
    arguments = ["--device", "cpu", "--minutes", "0", "--out", str(tmp_path / "x.json")]
    gpu.main([*arguments, "ViT-B/16"])
    assert "ViT-B/16, compiled: no time was left" in capsys.readouterr().out
    assert not (tmp_path / "x.json").exists()


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "PyTorch sees no GPU here; --device cpu --tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["nothing"])
    assert "no case is named 'nothing'" in capsys.readouterr().err
