"""The benchmarks run, measure what they say, and the page shows what they measured."""

import json
import math
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench  # noqa: E402
import dispatch  # noqa: E402
import growth  # noqa: E402
import kernel  # noqa: E402
import memory  # noqa: E402
import overhead  # noqa: E402
import peers  # noqa: E402
from speed.arms import wrapped  # noqa: E402
from speed.cases import CASES, build  # noqa: E402
from speed.measure import counting_saved, in_turns, live_bytes, write  # noqa: E402

from spanopt import project  # noqa: E402

TINY = replace(CASES["demo"], name="tiny", width=16, heads=2, length=8, batch=2, layers=1)


def test_times_are_of_neighbours_and_none_always_goes_first():
    order = []

    def busy():
        order.append("a")
        begin = time.thread_time()
        while time.thread_time() - begin < 0.01:
            pass

    steps = {"a": busy, "b": lambda: order.append("b")}
    times = in_turns(steps, rounds=18, warm_up=2)
    assert {name: len(x) for name, x in times.items()} == {"a": 18, "b": 18}
    assert (times["a"] > 0.01).all()
    rounds = [tuple(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}


def test_saved_bytes_count_each_storage_once():
    x = torch.randn(100, requires_grad=True)
    with counting_saved() as saved:
        y = (x[:50] * x[50:]).exp()
    assert y.requires_grad
    assert sum(saved.values()) == 4 * (100 + 50)


def test_live_bytes_count_what_python_reaches():
    before = live_bytes()
    kept = {"x": [torch.zeros(1000)]}
    kept["view"] = [kept["x"][0][:10]]
    assert live_bytes() - before == 4000


@pytest.mark.parametrize("name", CASES)
def test_every_case_trains_and_has_the_attention_that_it_says(name):
    case = replace(CASES[name], width=64, heads=4, length=16, batch=2, layers=2)
    case = replace(case, kv_heads=2 if case.kv_heads else None)
    setting = build(case)
    optimizer = wrapped(setting)
    setting.loss().backward()
    optimizer.step()
    layers = optimizer.hooks.sites
    assert [(layer.heads, layer.kv_heads) for layer in layers] == [(4, case.key_heads)] * 2
    again = build(case)
    torch.testing.assert_close(again.x, setting.x, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_overhead_is_measured(compiled):
    row = overhead.measure(TINY, compiled, rounds=2)
    low, middle, high = row["ratio"]
    assert 0 < low <= middle <= high < 100
    assert 1 < row["one_solve"] < row["computed"]
    assert 0 < row["noise"][0] <= row["noise"][2]
    json.dumps(row)


def test_memory_is_measured_in_processes_of_their_own():
    row = memory.measure(CASES["demo"], rounds=1, threads=1)
    for name in ("saved", "left", "peak"):
        assert 0 < row[name][0] <= row[name][1] * 1.5
    assert row["saved"][0] == row["saved"][1]


def test_the_operations_of_a_step_are_those_of_its_matrix_products():
    case = replace(CASES["ViT-B/16"], width=64, heads=4, length=16, batch=2, layers=2)
    setting = build(case)
    weights = sum(p.numel() for p in setting.model.parameters() if p.ndim == 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = setting.loss()
        loss.backward()
    assert counter.get_total_flops() == case.step_flops(weights)


def test_the_peak_is_that_of_the_process_itself():
    ballast = torch.ones(2**28, dtype=torch.uint8)
    assert memory.peak_in_fresh_process(CASES["demo"], "plain", threads=1) > 2**27
    assert memory.resident_peak() > memory.peak_in_fresh_process(CASES["demo"], "plain", threads=1)
    assert ballast.sum() == 2**28


@pytest.mark.long
def test_growth_dispatch_and_peers_are_measured():
    row = growth.measure(TINY, rounds=3)
    assert row["each"][1] * row["layers"] * row["heads"] * row["tokens"] / 1e6 == pytest.approx(
        row["added"], rel=1e-6
    )
    own = dispatch.measure_step(rounds=2)
    assert set(own["percent"]) == {"hooks", "step", "zero_grad"}
    rows = {row["peer"]: row for row in peers.measure(TINY, rounds=2)}
    assert rows["AdamW"]["ratio"] == [1, 1, 1]
    assert rows["AdamW"]["state"] == pytest.approx(2, rel=0.05)
    assert rows["span-scaled AdamW"]["state"] == pytest.approx(2, rel=0.05)
    assert rows["Lookahead"]["state"] == pytest.approx(3, rel=0.05)


def test_attaching_is_measured_on_so_many_modules():
    assert dispatch.measure_attaching(1)["modules"] >= 10_000


def test_the_ways_give_the_same_projection_and_are_measured():
    q, g = kernel.attention_like((1, 3, 40, 8), 3), kernel.attention_like((1, 3, 40, 8))
    assert (q.stride(), g.stride()) == ((2880, 8, 72, 1), (960, 8, 24, 1))
    for way in kernel.WAYS.values():
        torch.testing.assert_close(way(q, g), project(q, g), rtol=1e-4, atol=1e-4)
    row = kernel.measure((1, 3, 40, 8), torch.bfloat16, rounds=2)
    assert set(row["ratios"]) == set(kernel.WAYS)
    assert all(math.isfinite(x) for ratio in row["ratios"].values() for x in ratio)
    assert kernel.measure_setups((1, 3, 40, 8), rounds=2)["span"] == [1, 1, 1]


def test_results_are_written_with_what_they_were_measured_with(tmp_path):
    options = Namespace(out=tmp_path / "a" / "b.json", threads=1, rounds=3)
    write(options, [{"x": 1.5}])
    record = json.loads(options.out.read_text())
    assert record["rows"] == [{"x": 1.5}]
    assert (record["threads"], record["torch"]) == (1, torch.__version__)


def test_what_is_measured_again_takes_its_row_and_others_stay(tmp_path):
    options = Namespace(out=tmp_path / "x.json", threads=1, rounds=3, cases=[])
    write(options, [{"case": name, "x": 1} for name in "abc"])
    options.cases = ["b", "d"]
    write(options, [{"case": name, "x": 2} for name in "bd"])
    rows = json.loads(options.out.read_text())["rows"]
    assert [(row["case"], row["x"]) for row in rows] == [("a", 1), ("b", 2), ("c", 1), ("d", 2)]


def test_quartiles_are_shown_with_the_median_first():
    low, middle, high = np.percentile([1.0, 2.0, 4.0], [25, 50, 75])
    assert bench.three([low, middle, high], 1) == "2.0 (1.5 to 3.0)"


@pytest.mark.parametrize("script", [overhead, memory, peers])
def test_an_unknown_case_is_named(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["nothing"])
    assert "no case is named 'nothing'" in capsys.readouterr().err


def test_an_unknown_benchmark_or_placeholder_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        bench.main(["run", "nothing"])
    assert "no benchmark is named 'nothing'" in capsys.readouterr().err
    for name in bench.RUNS:
        (tmp_path / f"{name}.json").write_text('{"rows": []}')
    page = bench.Page(tmp_path)
    for text, message in (
        ("[[nothing]]", "names nothing"),
        ("[[ratio demo]]", "no placeholder looks like"),
        ("[[ratio | nothing]]", "have no case 'nothing'"),
    ):
        with pytest.raises(ValueError, match=message):
            page.fill(text)


def test_the_page_shows_what_was_measured(tmp_path):
    named = [replace(TINY, name=name) for name in ("decoder N=512", "demo")]
    card = {"card": "Card 1", "date": "2026-01-01", "torch": "2.13.0", "rows": []}
    card["rows"].append({"model": "tiny", "ratio": [1.0, 1.5, 2.0], "launches": 12, "MiB": 0.25})
    accuracy = [["dtype", "condition"], ["float32", "1e+00"]]
    counts = {name: [2**20, 2**21] for name in ("saved", "left", "peak")}
    memory_row = {"case": "tiny", "layers": 1, **counts, "ratio": [1.9, 2.0, 2.1]}
    results = {
        "overhead": [overhead.measure(case, compiled=False, rounds=2) for case in named],
        "compiled": [overhead.measure(case, compiled=False, rounds=2) for case in named],
        "memory": [memory_row],
        "deep": [memory_row | {"layers": 12}],
        "kernel": {
            "ways": [kernel.measure((1, 2, 16, 4), torch.float32, rounds=2)],
            "setups": kernel.measure_setups((1, 2, 16, 4), rounds=2),
        },
        "dispatch": {
            "own": dispatch.measure_step(rounds=1),
            "attaching": {"modules": 10_001, "layers": 100, "seconds": [0.1, 0.2, 0.3]},
        },
        "growth": [{"sweep": sweep, **growth.measure(TINY, rounds=2)} for sweep in growth.SWEEPS],
        "peers": peers.measure(named[1], rounds=2),
        "accuracy": accuracy,
    }
    for name, rows in results.items():
        write(Namespace(out=tmp_path / f"{name}.json", threads=1, rounds=2), rows)
    assert "make bench-gpu" in bench.Page(tmp_path, tmp_path / "none").gpu()
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "card.json").write_text(json.dumps(card))
    page = bench.Page(tmp_path, tmp_path / "gpu")
    text = page.fill(bench.TEMPLATE.read_text(encoding="utf-8"))
    assert "### Card 1" in text
    assert "| tiny | 1.500 (1.000 to 2.000) | 12 | 0.250 |" in text
    assert bench.three(results["overhead"][0]["ratio"]) in text.splitlines()[4]
    assert "10,001 modules, 100 of them attention layers, 0.20 (0.10 to 0.30) s" in text
    assert "| float32 | 1e+00 |" in text
    for layers in (1, 12):
        row = f"| tiny | {layers} | 1.0 | 2.0000 | 1.0 | 2.0000 | 1.0 | 2.0000 (1.9000 to 2.1000) |"
        assert row in text
    assert text.count("\n| tiny") == 3 < text.count("\n| demo |")
    figure = bench.ratio_by_length(page)
    assert len(figure.axes[0].lines) == 5


def test_the_page_is_what_the_results_give(tmp_path):
    """docs/performance.md is up to date, and the README quotes it."""
    bench.write_report(tmp_path)
    text = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert text == (bench.DOCS / "performance.md").read_text(encoding="utf-8")
    for path in tmp_path.glob("*.png"):
        assert (bench.DOCS / path.name).exists()
        assert f"({path.stem.removesuffix('-dark')}.png)" in text
    page = bench.Page()
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for case, words in (
        ("decoder N=512", "times as long at width 768"),
        ("demo", "times at the demo's width 96"),
    ):
        ratio = page.case("overhead", case)["ratio"]
        assert f"{ratio[1]:.2f} {words}" in readme
