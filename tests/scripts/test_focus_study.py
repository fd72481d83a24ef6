"""The study of semantic focus, at toy size: its tasks, an arm's training, restarts, the table."""

import itertools
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import focus_cost
import focus_study
from focus_tasks import TASKS

TOY = {
    "cap": 8,
    "every": 4,
    "length": 16,
    "width": 8,
    "blocks": 1,
    "examples": 50,
    "held_out": 20,
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_draw_tokens_and_classes_in_range_and_anew_for_each_seed(task):
    spec = TASKS[task]
    x, y = spec.sample(60, 24, seed=1)
    assert x.shape == (60, 24)
    assert x.min() >= 0
    assert x.max() < spec.tokens
    assert y.min() >= 0
    assert y.max() < spec.classes
    assert len(y.unique()) > 1
    again, other = spec.sample(60, 24, seed=1), spec.sample(60, 24, seed=2)
    assert x.equal(again[0])
    assert not x.equal(other[0])


def test_the_classes_are_those_that_the_tokens_say():
    x, y = TASKS["even-pairs"].sample(40, 20, seed=0)
    assert y.equal((x[:, 0] != x[:, -1]).long())
    x, y = TASKS["parity"].sample(40, 20, seed=0)
    assert y.equal((x - 1).sum(1) % 2)
    x, y = TASKS["cycle-navigation"].sample(40, 20, seed=0)
    assert y.equal((x - 2).sum(1) % 5)
    for tokens, target in zip(*TASKS["missing-duplicate"].sample(40, 20, seed=0), strict=True):
        at = tokens.tolist().index(3)
        assert tokens[(at + 10) % 20] == target + 1
    signs = {6: "+", 7: "-", 8: "*", 9: "(", 10: ")"}
    for name in ("modular-arithmetic", "solve-equation"):
        for tokens, drawn in zip(*TASKS[name].sample(40, 24, seed=0), strict=True):
            target = int(drawn)
            known = [target + 1 if token == 12 else token for token in tokens.tolist() if token]
            left = list(itertools.takewhile(lambda token: token != 11, known))
            value = eval("".join(signs.get(token, str(token - 1)) for token in left)) % 5
            assert value == (target if name == "modular-arithmetic" else known[-1] - 1)


def test_arms_are_compared_with_tuned_rates_and_a_run_goes_on_where_it_was(tmp_path):
    options = {"arms": ["top 5", "window 5"], "seeds": 2, "rates": [0.1, 0.2], "progress": False}
    rows = focus_study.run("even-pairs", tmp_path, **options, **TOY)
    assert [row["arm"] for row in rows] == ["plain", "top 5", "window 5"]
    for row in rows:
        assert row["seeds"] == 2
        assert row["lr"] > 0
        assert row["quartiles"][1] <= TOY["cap"]
        assert 0 <= row["censored"] <= 2
    text = focus_study.as_text(rows)
    assert len(text.splitlines()) == 5
    trials = (tmp_path / "trials.jsonl").read_text(encoding="utf-8")
    assert focus_study.run("even-pairs", tmp_path, **options, **TOY) == rows
    assert (tmp_path / "trials.jsonl").read_text(encoding="utf-8") == trials


def test_a_run_that_does_not_get_there_is_censored():
    result = focus_study.train(0, lambda optimizer, model: optimizer, 1e-9, task="parity", **TOY)
    assert result[focus_study.METRIC] == TOY["cap"]
    assert result["reached"] < 0.5


def test_the_measures_of_scores_are_those_of_full_attention():
    rows = focus_study.measure("even-pairs", 0, 0.1, **TOY)
    measured = [row["lambda_w"] for row in rows if row["side"] == "query"]
    assert measured
    assert all(math.isfinite(value) for value in measured)


def test_the_cost_is_a_ratio_of_calls_that_give_finite_gradients(capsys):
    focus_cost.main(["--lengths", "32", "--keys", "4", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("times" in line for line in lines)
