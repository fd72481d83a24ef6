"""The study of semantic focus, at toy size: its tasks, training, restarts, and its page."""

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import focus_cost
import focus_report
import focus_study
from focus_tasks import TASKS
from focus_training import ACCURACY, SCORE, STEPS, train
from harness.texts import Text


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
    for tokens, target in zip(*TASKS["stack-manipulation"].sample(40, 20, seed=0), strict=True):
        left, dropped = 2, 0
        for token in reversed(tokens.tolist()):
            if token == 5:
                dropped += 1
            elif dropped:
                dropped -= 1
            else:
                left = token - 1 if token < 3 else token - 3
                break
        assert left == target
    signs = {6: "+", 7: "-", 8: "*", 9: "(", 10: ")"}
    for name in ("modular-arithmetic", "solve-equation"):
        for tokens, drawn in zip(*TASKS[name].sample(40, 24, seed=0), strict=True):
            target = int(drawn)
            known = [target + 1 if token == 12 else token for token in tokens.tolist() if token]
            left = list(itertools.takewhile(lambda token: token != 11, known))
            value = eval("".join(signs.get(token, str(token - 1)) for token in left)) % 5
            assert value == (target if name == "modular-arithmetic" else known[-1] - 1)


def toy(name, **changes):
    size = {"length": 12, "blocks": 1, "held_out": 20, "width": 8, "examples": 50}
    declared = {"cap": 8, "every": 4, "seeds": 2, "rates": (0.1, 0.2), "size": size}
    return dataclasses.replace(focus_study.STUDIES[name], **declared | changes)


def test_arms_are_compared_at_tuned_rates_and_a_run_goes_on_where_it_was(tmp_path):
    study = toy("even-pairs-adamw")
    told = []
    focus_study.run([study], tmp_path, tell=told.append)
    assert not focus_study.pending(study, study.store(tmp_path))
    found = focus_report.outcomes(study, study.store(tmp_path))
    assert [*found] == [*("plain", "top 3", "window 3", "gradient 3", "(2, 1)", "top 3 and (2, 1)")]
    for outcome in found.values():
        assert outcome.lr > 0
        assert len(outcome.metrics) == outcome.change.seeds == 2
        assert outcome.quartiles[1] <= 8
        assert 0 <= outcome.censored <= 2
    focus_study.run([study], tmp_path, tell=told.append)
    assert len(told) == len([*study.store(tmp_path).results()])
    (of_seed, _) = focus_study.measures(study, tmp_path)
    assert [row["step"] for row in of_seed["rows"]] == [0, 4]
    share, first = focus_report.conditions(focus_study.measures(study, tmp_path))
    assert 0 <= share <= 1
    assert (share > 0) or first is None
    with pytest.raises(ValueError, match="results of other settings"):
        toy("even-pairs-adamw", cap=9).store(tmp_path)


def test_the_command_line_lists_the_studies_and_refuses_unknown_ones(tmp_path, capsys):
    assert focus_study.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [*focus_study.STUDIES]
    with pytest.raises(SystemExit):
        focus_study.main(["run", "even-pears", "--out", str(tmp_path)])
    assert focus_study.main(["run", "text-adamw", "--out", str(tmp_path)]) == 2


def test_no_trial_begins_after_the_declared_hours(tmp_path):
    focus_study.run([toy("parity-adamw")], tmp_path, hours=0)
    assert not [*toy("parity-adamw").store(tmp_path).results()]


def test_arms_of_one_seed_see_the_same_text_and_a_window_changes_the_loss(tmp_path):
    text = Text.split("toy", "the cat sat on the mat. " * 200)
    study = toy("text-adamw", cap=2, keys=4, size={"batch": 2, "length": 16})
    focus_study.run([study], tmp_path, text)
    found = focus_report.outcomes(study, study.store(tmp_path))
    assert [*found] == ["plain", "top 4", "window 4"]
    assert len({outcome.metrics[0]["loss"] for outcome in found.values()}) == 3
    with pytest.raises(ValueError, match="needs a text"):
        study.function(None)


def test_a_run_that_does_not_get_there_is_censored_and_scored_by_its_accuracy():
    settings = {"cap": 8, "every": 4, "length": 12, "width": 8, "blocks": 1, "examples": 50}
    result = train(0, lambda optimizer, model: optimizer, 1e-9, task="parity", **settings)
    assert result[STEPS] == 8
    assert result["reached"] == 0
    assert result[SCORE] == pytest.approx(8 * (1.95 - result[ACCURACY]))


def test_the_conditions_are_counted_over_layers_and_steps():
    def row(step, w, x):
        return {"step": step, "lambda_w": w, "lambda_x": x}

    first = {"rows": [row(0, 2.0, 0.5), row(5, 0.5, 0.5), row(10, 0.5, 0.9)]}
    second = {"rows": [row(0, 2.0, 2.0), row(5, 0.5, 2.0), row(10, 0.9, 0.9)]}
    assert focus_report.conditions([first, second]) == (0.5, 7.5)
    assert focus_report.conditions([{"rows": [row(0, 1.0, 0.5)]}]) == (0.0, None)


def test_a_placeholder_that_has_no_result_is_an_error():
    report = focus_report.Report()
    with pytest.raises(ValueError, match="no result"):
        report.page("[[change earlier | top 99]]")
    with pytest.raises(ValueError, match="no placeholder is named 'chance'"):
        report.page("[[chance earlier | top 5]]")
    assert report.page("[[seeds earlier]]") == "10"


def test_the_page_is_what_the_results_give(tmp_path, monkeypatch):
    monkeypatch.setattr(focus_report, "save_both", lambda draw, path: draw().savefig(path, dpi=20))
    focus_report.write_page(docs=tmp_path)
    page = (tmp_path / "focus.md").read_text(encoding="utf-8")
    assert page == (focus_report.DOCS / "focus.md").read_text(encoding="utf-8")
    for ending in ("", "-dark"):
        assert (focus_report.DOCS / focus_report.FIGURE.replace(".", f"{ending}.")).exists()
    assert f"({focus_report.FIGURE})" in page


def test_the_cost_is_a_ratio_of_calls_that_give_finite_gradients(capsys):
    focus_cost.main(["--lengths", "32", "--keys", "4", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("times" in line for line in lines)
