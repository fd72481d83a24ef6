"""The study's machinery: pairing, choice of learning rates, statistics, restarts, the page."""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
from experiments.primary import CONFIRMATION, PRIMARY  # noqa: E402
from experiments.search import (  # noqa: E402
    CHOSEN,
    SEARCH,
    chosen_by_rule,
    confirmation,
)
from experiments.settings import MUON_CONFIRMATION, SETTINGS  # noqa: E402
from harness.experiment import Experiment  # noqa: E402
from harness.optimizers import OPTIMIZERS, build_optimizers  # noqa: E402
from harness.partial import drawn_by_rate, worth  # noqa: E402
from harness.report import Report  # noqa: E402
from harness.runner import run_experiments  # noqa: E402
from harness.store import Store  # noqa: E402
from harness.tasks import TASKS, build_task  # noqa: E402
from harness.texts import Text  # noqa: E402
from harness.training import raise_qk_rate, run_trial  # noqa: E402
from harness.trial import Trial  # noqa: E402
from harness.wrapping import ByShare, random_subspace, spectral, wrap  # noqa: E402

from spanopt import SpanScale  # noqa: E402
from spanopt.compare.reading import in_words  # noqa: E402
from spanopt.compare.statistics import adjusted, compared  # noqa: E402

LETTERS = "".join(chr(97 + (i * i + i // 7) % 23) + " " * (i % 5 == 0) for i in range(12_000))
TEXT = Text.split("letters", LETTERS)
TINY = Trial(steps=4, batch=2, length=16, layers=1, width=16, heads=2)


def experiment(**changes):
    arms = {"plain": TINY, "(2, 1)": replace(TINY, parallel=2.0)}
    options = {"baseline": "plain", "lrs": (4e-3, 8e-3), "seeds": (0, 1), "tuning_seeds": (9,)}
    return Experiment("tiny", "?", arms, **options | changes)


class Losses:
    """A store in which the loss depends on the learning rate by a formula."""

    def __init__(self, loss):
        self.loss, self.asked = loss, set()

    def get(self, trial):
        if trial not in self.asked:
            return None
        loss = self.loss(trial)
        return {"tuning": loss, "reporting": loss}

    def run(self, experiment):
        while trials := experiment.pending(self):
            self.asked.update(trials)


@pytest.mark.parametrize("best", [5e-4, 3e-3, 6e-3, 1.1e-2, 5e-2])
def test_the_learning_rate_is_that_of_the_least_loss_wherever_it_is(best):
    store = Losses(lambda trial: math.log(trial.lr / best) ** 2)
    e = experiment(lrs=(4e-3, 8e-3, 16e-3))
    store.run(e)
    nearest = min(e.values.points, key=lambda lr: abs(math.log(lr / best)))
    assert e.best("plain", store) == nearest
    tried = e.swept("plain", store)
    at = e.values.points.index(nearest)
    assert {*e.values.points[at - 1 : at + 2]} <= set(tried)  # better than its neighbours
    assert {trial.seed for trial in store.asked if trial.lr != nearest} == {9}


def test_a_diverged_rate_is_not_chosen():
    store = Losses(lambda trial: None if trial.lr > 5e-3 else -math.log(trial.lr))
    e = experiment()
    store.run(e)
    assert e.best("plain", store) == 4e-3


def test_an_arm_may_be_compared_on_fewer_seeds(tmp_path):
    e = experiment(lrs=(4e-3,), seeds=(0, 1, 2), fewer={"(2, 1)": 2})
    assert len(e.pending(Store(tmp_path))) == 5 == e.size()
    assert [trial.seed for trial in e.comparison("(2, 1)", 4e-3)] == [0, 1]
    loss = {(1.0, 0): 2.0, (1.0, 1): 4.0, (1.0, 2): 9.0, (2.0, 0): 2.2, (2.0, 1): 4.2}
    store = Losses(lambda trial: loss[trial.parallel, trial.seed])
    store.run(e)
    change = Report({"tiny": [e]}, store).change(e, "(2, 1)")
    assert (change.mean, change.seeds) == (pytest.approx(7.5), 2)


def test_settings_are_compared_in_one_table():
    loss = {1.0: 2.0, 2.0: 1.9}
    store = Losses(lambda trial: loss[trial.parallel] + 1e-3 * trial.seed * trial.parallel)
    first, second = experiment(lrs=(4e-3,)), experiment(lrs=(4e-3,), seeds=(0, 1, 2))
    second = replace(second, name="second", arms=second.arms | {"both": replace(TINY, violation=2)})
    loss[1.0] = 2.0
    store.run(first)
    store.run(second)
    lines = Report({"all": [first, second]}, store).page("[[settings all]]").splitlines()
    assert lines[0].startswith("| setting | learning rate | plain's loss | (2, 1) | both |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| tiny", "| second"]
    assert "| -4.9" in lines[2]
    assert lines[2].count("|") == lines[3].count("|") == 8


def test_a_setting_off_the_scale_is_named_and_not_drawn():
    store = Losses(
        lambda trial: (2.0 if trial.width == 16 else 1 + trial.seed) * trial.parallel**0.01
    )
    near = experiment(lrs=(4e-3,), seeds=(0, 1, 2))
    wide = {name: replace(arm, width=8) for name, arm in near.arms.items()}
    wide["(2, 1)"] = replace(wide["(2, 1)"], parallel=1e50)
    far = replace(near, name="far", arms=wide)
    store.run(near)
    store.run(far)
    figure = Report({"all": [near, far]}, store).forest_of_settings([near, far], ["(2, 1)", "none"])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tiny"]
    assert "not shown: far, (2, 1): +216" in axes.get_xlabel()


def test_a_table_can_have_more_columns():
    store, e = Losses(lambda trial: 1.0 + trial.seed), experiment(lrs=(4e-3,))
    store.run(e)
    report = Report({"all": [e]}, store, {"tiny": {"step": {"(2, 1)": "1.3"}}})
    head, _, plain, scaled = report.page("[[table tiny]]").splitlines()
    assert head.endswith("| adjusted p | step |")
    assert plain.endswith("|  |")
    assert scaled.endswith("| 1.3 |")


def test_steps_to_the_baselines_loss():
    curves = {1.0: [(10, 3.0), (20, 2.0)], 2.0: [(10, 2.5), (20, 1.5)]}

    class Curves(Losses):
        def get(self, trial):
            return super().get(trial) and {"curve": curves[trial.parallel]}

    e, store = experiment(lrs=(4e-3,)), Curves(lambda trial: 1.0)
    store.asked.update(t for arm in e.arms for t in e.comparison(arm, 4e-3))
    report = Report({"tiny": [e]}, store)
    assert report.page("[[steps tiny | (2, 1)]]") == "15"
    curves[2.0] = [(10, 4.0), (20, 2.5)]
    assert report.steps_to(e, "(2, 1)") == "> 20"


def test_an_arm_may_take_the_rate_of_another():
    store = Losses(lambda trial: math.log(trial.lr / (4e-3 * trial.parallel)) ** 2)
    own, shared = experiment(), experiment(lr_of={"(2, 1)": "plain"})
    store.run(own)
    store.run(shared)
    assert own.best("(2, 1)", store) == 8e-3
    assert shared.best("(2, 1)", store) == 4e-3


def test_arms_start_from_the_same_weights_and_see_the_same_batches():
    tasks = []
    for trial in (TINY, replace(TINY, parallel=2.0), replace(TINY, parallel=3.0, path="inputs")):
        torch.manual_seed(trial.seed)
        task = build_task(trial, TEXT)
        rng = np.random.default_rng(trial.seed)
        tasks.append([*task.model.state_dict().values(), task.batch(rng), task.batch(rng)])
    for other in tasks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tasks[0], other, strict=True))
    torch.manual_seed(1)
    assert not torch.equal(build_task(replace(TINY, seed=1), TEXT).batch(rng), tasks[0][-2])


def test_a_trial_gives_the_same_losses_again():
    first, second = run_trial(TINY, TEXT), run_trial(TINY, TEXT)
    assert first["reporting"] == second["reporting"] != first["tuning"]


def gradients(trial):
    torch.manual_seed(0)
    task = build_task(trial, TEXT)
    task.loss(task.model, task.batch(np.random.default_rng(0))).backward()
    return {name: p.grad for name, p in task.model.named_parameters()}


@pytest.mark.parametrize("path", ["weights", "inputs"])
def test_a_gradient_is_scaled_on_one_of_its_ways_only(path):
    base = replace(TINY, layers=2)
    plain = gradients(base)
    scaled = gradients(replace(base, parallel=2.0, violation=2.0, path=path))
    last = "blocks.1.attention.qkv.weight"
    width = TINY.width
    factor = 2.0 if path == "weights" else 1.0
    torch.testing.assert_close(scaled[last][: 2 * width], factor * plain[last][: 2 * width])
    torch.testing.assert_close(scaled[last][2 * width :], plain[last][2 * width :])
    earlier = "blocks.0.mlp.0.weight"
    same = torch.allclose(scaled[earlier], plain[earlier], rtol=1e-5)
    assert same == (path == "weights")


def test_a_rate_of_their_own_for_queries_and_keys_is_that_of_adamw():
    weights = {}
    for lr, qk_lr in ((8e-3, 1.5), (8e-3, 1.0), (12e-3, 1.0)):
        trial = replace(TINY, lr=lr, qk_lr=qk_lr)
        torch.manual_seed(0)
        model = build_task(trial, TEXT).model
        (optimizer,) = build_optimizers(trial, model)
        raise_qk_rate(optimizer, model, trial)
        for step in range(4):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        weights[lr, qk_lr] = dict(model.named_parameters())
    mixed, plain, higher = weights.values()
    for name, weight in mixed.items():
        rows = 2 * TINY.width if "qkv" in name else 0
        torch.testing.assert_close(weight[:rows], higher[name][:rows])
        assert torch.equal(weight[rows:], plain[name][rows:])


def test_a_rate_of_their_own_is_refused_where_it_would_not_be_exact():
    trial = replace(TINY, qk_lr=1.5, optimizer="Muon")
    with pytest.raises(ValueError, match="exact for AdamW alone, not for Muon"):
        run_trial(trial, TEXT)


def test_an_arm_may_train_at_a_multiple_of_its_rate(tmp_path):
    e = experiment(lrs=(4e-3,), lr_factor={"(2, 1)": 1.1})
    store = Losses(lambda trial: trial.lr)
    store.run(e)
    assert Report({"all": [e]}, store).change(e, "(2, 1)").mean == pytest.approx(10)


def fixed_rates():
    """An experiment whose second arm gains as much as a rate 1.1 times as high, half of it run."""
    arms = {"plain": TINY, "(2, 1)": replace(TINY, parallel=2.0)}
    arms |= {f"x {f:g}": replace(TINY, lr=f) for f in (1.05, 1.1, 1.2)}
    e = experiment(lrs=(4e-3,), seeds=tuple(range(6)), lr_factor={"x 1.05": 1.05, "x 1.1": 1.1,
                   "x 1.2": 1.2})  # fmt: skip
    e = replace(e, arms=arms)
    noise = {0: -1e-3, 1: 1e-3, 2: 0.0}
    store = Losses(
        lambda t: 2.0 * (1 + t.seed / 9) * (
            1 - 0.08 * math.log(t.lr / 4e-3) - (0.08 * math.log(1.1) + noise[t.seed] * 0.1)
            * (t.parallel == 2.0)
        )
    )  # fmt: skip
    store.run(e.part(e.arms, slice(0, 3)))
    return e, Report({"rates": [e]}, store)


def test_a_gain_is_worth_a_factor_of_the_learning_rate():
    e, report = fixed_rates()
    factor, low, high = worth(e, "(2, 1)", e.lr_factor, report.store)
    assert factor == pytest.approx(1.1, rel=1e-3)
    assert low < factor < high
    assert report.page("[[worth tiny | (2, 1)]]").startswith("1.10 (1.")
    assert report.page("[[between tiny | (2, 1) against x 1.1]]") == "+0.00 % (-0.03 to +0.03)"


def test_a_comparison_that_is_not_complete_is_reported_as_far_as_it_is():
    e, report = fixed_rates()
    page = report.page("[[rates rates]]\n\n[[missing rates]]\n\n[[so-far tiny | (2, 1)]]")
    assert "| (2, 1) | -0.76 % (-0.79 to -0.74), 3 seeds |" in page
    elsewhere = report.page("[[elsewhere rates]]").splitlines()
    assert elsewhere[0].startswith("| setting | (2, 1) | x 1.05 | x 1.1 |")
    assert elsewhere[2].startswith("| tiny | -0.76 % (-0.79 to -0.74), 3 seeds | ")
    best_first = [line.split(" | ")[0] for line in report.page("[[arms tiny]]").splitlines()[2:]]
    assert (best_first[0], best_first[-1], len(best_first)) == ("| x 1.2", "| x 1.05", 4)
    assert "- tiny: 15 of 30 runs are left." in page
    begun = replace(e, arms=e.arms | {"more": replace(TINY, parallel=7.0)})
    left = Report({"rates": [begun]}, report.store).page("[[missing rates]]")
    assert left == "- tiny: 21 of 36 runs are left; no run of `more`."
    assert page.splitlines()[-1] == "-0.76 % (-0.79 to -0.74)"
    figure = drawn_by_rate([e], ["(2, 1)", "x 1.1", "none"], report.store)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["(2, 1) (3 seeds)", "x 1.1 (3 seeds)"]
    with pytest.raises(ValueError, match=r"3 runs of 'plain' are missing"):
        report.page("[[change tiny | (2, 1)]]")


def test_what_has_not_been_run_at_all_is_named():
    e, _ = fixed_rates()
    report = Report({"rates": [e]}, Losses(lambda trial: 1.0))
    left = report.page("[[missing rates]]")
    assert left == "- Not one arm has been compared in tiny (30). In brackets: runs."
    with pytest.raises(ValueError, match="has not been run"):
        report.page("[[so-far tiny | (2, 1)]]")


def test_the_order_of_the_comparison_at_fixed_rates_misses_nothing():
    whole, parts = Losses(lambda trial: 1.0), Losses(lambda trial: 1.0)
    for e in study.GROUPS["rates"]:
        whole.run(e)
    for e in study.to_run(["rates"]):
        parts.run(e)
    assert parts.asked == whole.asked
    others = {
        seed
        for name, e in study.EXPERIMENTS.items()
        if "rate-" not in name
        for seed in (*e.seeds, *e.tuning_seeds)
    }
    assert not others & {trial.seed for trial in whole.asked}


def test_the_random_subspace_is_a_projection_of_the_spans_dimension():
    basis, grad = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8)
    torch.manual_seed(0)
    once = random_subspace(grad, basis, basis)
    torch.manual_seed(0)
    torch.testing.assert_close(random_subspace(once, basis, basis), once)
    eye = torch.eye(40).expand(2, 3, 40, 40)
    torch.manual_seed(0)
    assert random_subspace(eye, basis, basis).diagonal(dim1=-2, dim2=-1).sum(-1).round().eq(8).all()


def test_spectral_weights_shrink_the_directions_of_the_span():
    directions, _ = torch.linalg.qr(torch.randn(2, 40, 3))
    basis = directions * torch.tensor([4.0, 2.0, 1.0])
    parts = spectral(directions, basis, basis)
    torch.testing.assert_close(parts, directions * torch.tensor([1.0, 0.5, 0.25]))
    assert spectral(directions, torch.zeros_like(basis), basis).count_nonzero() == 0


def test_the_scales_of_the_first_steps_end_there():
    base = replace(TINY, steps=8, parallel=8.0, violation=8.0)
    curves = {
        kind: run_trial(replace(base, scale_schedule=kind), TEXT)["curve"]
        for kind in ("constant", "early-50", "early-100")
    }
    assert curves["early-100"] == curves["constant"]
    assert curves["early-50"][:4] == curves["constant"][:4]
    assert curves["early-50"][5:] != curves["constant"][5:]


def test_factors_follow_the_measured_share():
    task = build_task(replace(TINY, length=32), TEXT)
    sgd = torch.optim.SGD(task.model.parameters(), lr=0.0)
    optimizer = wrap(sgd, task.model, replace(TINY, parallel=3.0))
    by_share = ByShare(optimizer, most=3.0, every=1)
    task.loss(task.model, task.batch(np.random.default_rng(0))).backward()
    optimizer.step()
    rows = [*by_share.monitor.rows]
    by_share.step()
    (group,) = optimizer.span_groups
    for side in ("query", "key"):
        shares = [r["parallel_share"] / r["chance_share"] for r in rows if r["side"] == side]
        assert group[side] == (tuple(min(max(x, 1.0), 3.0) for x in shares), 1.0)
    by_share.monitor.close()


def test_separate_matrices_attend_as_one_does():
    separate, together = (
        build_task(replace(TINY, separate=separate), TEXT).model for separate in (True, False)
    )
    weights = separate.state_dict()
    for kind in ("weight", "bias"):
        name = "blocks.0.attention."
        parts = [weights.pop(f"{name}{side}.{kind}") for side in "qkv"]
        weights[f"{name}qkv.{kind}"] = torch.cat(parts)
    together.load_state_dict(weights)
    tokens = torch.randint(0, 5, (2, 16))
    torch.testing.assert_close(separate(tokens), together(tokens))


def test_the_span_of_a_random_projection_of_the_input_is_a_control():
    base = replace(TINY, layers=2, length=40)
    plain = gradients(base)
    runs = {
        scales: gradients(
            replace(base, parallel=scales[0], violation=scales[1], projection="random-input")
        )
        for scales in ((1.0, 0.0), (0.0, 1.0), (2.0, 2.0))
    }
    last = "blocks.1.attention.qkv.weight"
    parts = runs[1.0, 0.0][last] + runs[0.0, 1.0][last]
    torch.testing.assert_close(parts[:32], plain[last][:32])
    torch.testing.assert_close(runs[2.0, 2.0][last][:32], 2 * plain[last][:32])
    # Q is in the span of the input, and so is this one: the weights see more than by chance.
    of_span, rest = (runs[scales][last][:32].norm() for scales in ((1.0, 0.0), (0.0, 1.0)))
    assert of_span > 0.3 * rest


@pytest.mark.parametrize("name", TASKS)
def test_every_task_learns(name, monkeypatch):
    monkeypatch.setattr("harness.tasks.PRETRAINING_STEPS", 2)
    monkeypatch.setattr("harness.texts.SUBWORDS", 300)
    model, length = ("learned", 17) if name == "digits" else ("rotary", 16)
    base = Trial(
        steps=30, batch=8, length=length, layers=1, width=32, heads=2, task=name, model=model
    )
    results = [run_trial(replace(base, parallel=p, lr=4e-3), TEXT) for p in (1.0, 3.0)]
    for result in results:
        assert result["tuning"] < result["curve"][0][1]
    assert results[0]["tuning"] != results[1]["tuning"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_scaled_and_plain(name):
    base = replace(TINY, steps=12, optimizer=name, lr=1e-2)
    results = [run_trial(replace(base, parallel=p), TEXT) for p in (1.0, 3.0)]
    for result in results:
        assert result["tuning"] < result["curve"][0][1]
    assert results[0]["tuning"] != results[1]["tuning"]


def test_measuring_changes_nothing():
    base = replace(TINY, steps=12, layers=2)
    result = run_trial(replace(base, monitored=True), TEXT)
    assert result["reporting"] == run_trial(base, TEXT)["reporting"]
    rows = result["monitor"]
    assert {row["step"] for row in rows} == set(range(12))
    assert len(rows) == 12 * 2 * 2
    assert all(0 < row["parallel_share"] < 1 and row["chance_share"] == 0.5 for row in rows)
    json.dumps(result)


@pytest.mark.parametrize("schedule", ["warm-up", "decay"])
def test_scales_move(schedule):
    base = replace(TINY, steps=12, parallel=3.0)
    moved = run_trial(replace(base, scale_schedule=schedule), TEXT)
    assert moved["tuning"] not in (run_trial(base, TEXT)["tuning"], None)


def test_one_layer_and_one_side_can_be_chosen():
    base = replace(TINY, layers=2, parallel=3.0)
    losses = {
        run_trial(replace(base, side=side, where=where), TEXT)["tuning"]
        for side in ("both", "query", "key")
        for where in ("all", "first", "last")
    }
    assert len(losses) == 9


def test_the_statistics_are_students():
    plain, arm = [2.0, 2.1, 1.9, 2.0], [1.98, 2.09, 1.90, 1.97]
    change = compared(arm, plain)
    values = np.array([100 * (a / b - 1) for a, b in zip(arm, plain, strict=True)])
    half = 3.1824463 * values.std(ddof=1) / 2  # the 97.5 % quantile of t with 3 degrees
    assert change.mean == pytest.approx(values.mean())
    assert (change.low, change.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert 0 < change.p < 1
    assert change.seeds == 4


def test_diverged_runs_are_counted():
    change = compared([1.9, None, 2.0], [2.0, 2.0, 2.1])
    assert (change.seeds, change.diverged) == (2, 1)
    assert math.isnan(compared([None, 1.0], [1.0, 1.0]).mean)


def test_p_values_are_adjusted_by_benjamini_and_hochberg():
    assert adjusted([0.01, 0.04, 0.03, math.nan])[:3] == pytest.approx([0.03, 0.04, 0.04])


def test_an_experiment_runs_resumes_and_is_reported(tmp_path):
    e = experiment(lrs=(4e-3,))
    store = Store(tmp_path)
    run_experiments([e], store, TEXT, workers=2)
    path = tmp_path / "tiny.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    # a killed run: a line is lost, another one half written
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])
    again = Store(tmp_path)
    assert len(e.pending(again)) == 2
    run_experiments([e], again, TEXT, workers=1)
    after = [json.loads(line) for line in path.read_text().splitlines()]
    before = [json.loads(line) for line in lines]
    losses = lambda records: {  # noqa: E731
        (r["trial"]["seed"], r["trial"]["parallel"]): r["result"]["reporting"] for r in records
    }
    assert losses(after) == losses(before)
    assert Store(tmp_path).texts == {TEXT.digest: "letters"}
    report = Report({"tiny": [e]}, Store(tmp_path))
    page = report.page("[[table tiny]]\n[[change tiny | (2, 1)]] [[loss tiny | plain]]")
    change = compared(*([losses(before)[seed, p] for seed in (0, 1)] for p in (2.0, 1.0)))
    assert f"| {change.mean:+.2f} | {change.low:+.2f} to {change.high:+.2f} |" in page
    assert f"{np.mean([losses(before)[seed, 1.0] for seed in (0, 1)]):.4f}" in page.splitlines()[-1]


@pytest.mark.long
def test_a_killed_study_loses_only_what_was_running(tmp_path):
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "import test_study as t\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    e = t.experiment(lrs=(4e-3,), seeds=tuple(range(200)))\n"
        "    t.run_experiments([e], t.Store(Path(sys.argv[3])), t.TEXT, workers=1)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    out = tmp_path / "out"
    paths = [str(ROOT / "benchmarks"), str(Path(__file__).parent)]
    process = subprocess.Popen(
        [sys.executable, str(script), *paths, str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT)])},
    )
    path = out / "tiny.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and len(path.read_bytes().splitlines()) > 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()  # and not the workers, who end by themselves
    process.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    e = experiment(lrs=(4e-3,), seeds=tuple(range(200)))
    assert len(e.pending(Store(out))) == 400 - len(whole)


def test_a_failed_run_is_named_and_nothing_is_lost(tmp_path):
    e = experiment(lrs=(4e-3,))
    arms = {**e.arms, "bad": replace(TINY, heads=3)}  # 16 features do not divide into 3 heads
    with pytest.raises(RuntimeError, match=r"a run failed: .*heads=3"):
        run_experiments([replace(e, arms=arms)], Store(tmp_path), TEXT, workers=1)
    assert len(Store(tmp_path).folder.joinpath("tiny.jsonl").read_text().splitlines()) == 2


def test_results_of_two_texts_are_not_mixed(tmp_path):
    store = Store(tmp_path)
    store.append("tiny", TINY, TEXT, {"tuning": 1.0, "reporting": 1.0})
    with pytest.raises(ValueError, match=r"another text, 'letters', and this run's is 'other'"):
        Store(tmp_path).check_text(Text.split("other", LETTERS[::-1]))
    store.check_text(TEXT)


def test_a_line_that_is_no_result_is_named(tmp_path):
    (tmp_path / "tiny.jsonl").write_text('{"trial": {"sed": 1}}\n')
    with pytest.raises(ValueError, match=r"tiny\.jsonl, line 1, is not a result"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("placeholder", "message"),
    [
        ("[[table nothing]]", "no experiment is named 'nothing'"),
        ("[[loss tiny | (9, 9)]]", "has no arm"),
        ("[[loss tiny | plain]]", "are missing"),
        ("[[settings nothing]]", "no group is named 'nothing'"),
        ("[[table]]", "no placeholder looks like"),
        ("[[colour tiny]]", "no placeholder is named 'colour'"),
    ],
)
def test_a_placeholder_that_cannot_be_filled_is_an_error(placeholder, message, tmp_path):
    report = Report({"tiny": [experiment(lrs=(4e-3,))]}, Store(tmp_path))
    with pytest.raises(ValueError, match=message):
        report.page(placeholder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "no group or experiment is named 'nothing'"),
        (["run", "--train-text", "a.txt"], "--train-text and --valid-text go together"),
        (["run", "--text", "a", "--train-text", "b", "--valid-text", "c"], "goes without"),
        (["table", "primary"], "the learning rate of 'plain' has not been chosen yet"),
        (["run", "--workers", "0"], "--workers must be at least 1"),
        (["run", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path, capsys):
    try:
        status = study.main([*arguments, "--out", str(tmp_path)])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_the_search_chose_is_what_its_rule_chooses():
    first, report = SEARCH[0], Report({"search": SEARCH}, Store(study.RESULTS))
    if first.pending(report.store):
        assert CHOSEN == ()
    else:
        changes = {arm: report.change(first, arm).mean for arm in first.arms}
        assert chosen_by_rule(changes) == CHOSEN
    confirmed = confirmation(("(1.2, 1)", "(2, 1), spectral"))
    assert [*confirmed.arms] == [
        *("plain", "(1.2, 1)", "uniform (1.2, 1.2)", "(2, 1), spectral", "uniform (2, 2)")
    ]
    assert not {*confirmed.seeds, *confirmed.tuning_seeds} & {*first.seeds, *first.tuning_seeds}
    assert {arm.text for arm in confirmed.arms.values()} == {"help topics"}


def test_the_rule_takes_the_two_that_are_furthest_ahead_of_plain_and_control():
    changes = dict.fromkeys(SEARCH[0].arms, 0.0)
    assert chosen_by_rule(changes) == ()
    changes |= {"(2, 1), spectral": -0.2, "(1.2, 1)": -0.9, "uniform (1.2, 1.2)": -1.0}
    assert chosen_by_rule(changes) == ("(2, 1), spectral",)  # the other is behind its control
    changes |= {"(2, 1), ridge 0.1": -0.3, "(2, 1) in the first 5 %": -0.1, "(1.2, 1)": math.nan}
    assert chosen_by_rule(changes) == ("(2, 1), ridge 0.1", "(2, 1), spectral")


def test_a_trial_may_name_another_text(tmp_path):
    other = replace(TINY, text="Python source")
    assert run_trial(other, TEXT)["reporting"] != run_trial(TINY, TEXT)["reporting"]
    store = Store(tmp_path)
    store.append("tiny", other, TEXT, {"tuning": 1.0, "reporting": 1.0})
    line = json.loads((tmp_path / "tiny.jsonl").read_text())
    assert line["text"]["name"] == "Python's source"
    Store(tmp_path).check_text(TEXT)  # it is not the text that the study was given
    assert Store(tmp_path).get(other) == {"tuning": 1.0, "reporting": 1.0}
    assert Store(tmp_path).get(TINY) is None
    with pytest.raises(ValueError, match=r"no text is named 'none', only 'given', help topics"):
        run_trial(replace(TINY, text="none"), TEXT)


def test_what_remains_is_run_in_an_order_that_misses_nothing():
    whole, parts = Losses(lambda trial: 1.0), Losses(lambda trial: 1.0)
    for group in study.LATER:
        for e in study.GROUPS[group]:
            whole.run(e)
    for e in study.to_run(["remaining"]):
        parts.run(e)
    assert parts.asked == whole.asked


def test_every_experiment_is_well_formed():
    for e in study.EXPERIMENTS.values():
        assert e.baseline in e.arms
        assert {*e.lr_of, *e.lr_of.values(), *e.baselines, *e.baselines.values()} <= {*e.arms}
        assert not set(e.seeds) & set(e.tuning_seeds)
        assert len({*e.arms.values()}) == len(e.arms)
        assert set(e.lrs) <= set(e.values.points)


def test_the_page_is_what_the_results_give(tmp_path, monkeypatch):
    """docs/evidence.md is up to date, and the README quotes it."""
    monkeypatch.setattr(study, "save_both", lambda draw, path: draw().savefig(path, dpi=20))
    study.write_report(Store(study.RESULTS), tmp_path)
    page = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert page == (study.DOCS / "evidence.md").read_text(encoding="utf-8")
    for path in tmp_path.glob("*.png"):
        assert (study.DOCS / path.name).exists()
        assert f"({path.name})" in page
    report = Report(study.GROUPS, Store(study.RESULTS))
    changes = [report.change(e, "(2, 1)") for e in SETTINGS]
    worse = sum(change.mean > 0 for change in changes)
    assert f"In {worse} of these {len(changes)} settings the mean of (2, 1) is worse" in page
    assert not any(change.high < 0 for change in changes)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    docstring = " ".join(SpanScale.__doc__.split())
    quoted = re.findall(r"[+-]\d+\.\d+ % \([+-]\d+\.\d+ to [+-]\d+\.\d+\)", readme)
    assert len(quoted) >= 4
    assert [words for words in quoted if words not in " ".join(page.split())] == []
    assert in_words(report.change(PRIMARY, "(0, 1): violation only")) in readme
    for placeholder in ("[[so-far rate-0.001 | (2, 1)]]", "[[worth rate-0.001 | (2, 1)]]"):
        assert report.page(placeholder) in readme
    assert in_words(report.change(MUON_CONFIRMATION, "uniform (2, 2)")) in readme
    change = report.change(CONFIRMATION, "(2, 1)")
    assert in_words(change) in readme
    assert f"{change.mean:+.2f} % (95 % interval {change.low:+.2f} to" in docstring
