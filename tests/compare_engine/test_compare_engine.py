"""Comparisons from the first trial to the reading."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy_training
from toy_training import simulated, train

from spanopt.compare import Arm, compare
from spanopt.compare.arms import FROZEN, NEAR_NULL, PLAIN

ROOT = Path(__file__).parents[2]
quiet = functools.partial(compare, progress=False)
BARE = {"controls": (), "progress": False}


def test_a_halved_learning_rate_is_found():
    result = compare(train, {"half": Arm(params={"lr": 5e-3})}, seeds=6, **BARE)
    assert result.changes["half"].low > 0
    assert result.readings[0].startswith("half is worse than plain training: +")
    assert "Plain training run twice with one seed gives the same result." in result.readings


def test_arms_are_paired_and_a_known_effect_is_read_with_its_controls():
    result = quiet(simulated, {"(2, 1)": (2, 1)}, seeds=6, larger_is_better=False)
    assert result.changes["(2, 1)"].mean == pytest.approx(-2, abs=0.3)
    assert result.changes["(2, 1)"].spread < 0.3  # 10 % between seeds
    assert result.changes[NEAR_NULL].mean == 0
    assert result.changes[FROZEN].seeds == 5
    assert result.readings[0].startswith(
        "(2, 1) helps, and no more than uniform (2, 2) does, as far as these seeds tell: -"
    )
    assert any("Freezing Q and K does not clearly hurt here" in line for line in result.readings)
    text = str(result)
    assert "uniform (2, 2)" in text
    assert result.losses(PLAIN) == [r["result"]["metrics"]["loss"] for r in plain_trials(result)]


def plain_trials(result):
    return [r for r in result.trials() if r["trial"]["arm"] == PLAIN and r["trial"]["again"] == 0]


def test_where_larger_is_better_the_words_turn_around():
    result = compare(
        simulated, {"(2, 1)": (2, 1)}, seeds=4, larger_is_better=True, controls=(), progress=False
    )
    assert result.readings[0].startswith("(2, 1) is worse than plain training: -")


def test_each_arm_is_tuned_on_seeds_of_its_own_until_its_best_is_inside(tmp_path):
    result = compare(
        simulated, {"(2, 1)": (2, 1)}, seeds=2, tune={"lr": [4.0, 8.0]}, controls=["near-null"],
        tuning_seeds=[90], out=tmp_path, progress=False,
    )  # fmt: skip
    assert result.values() == {PLAIN: 1.0, "(2, 1)": 1.0, NEAR_NULL: 1.0}
    tried = {(r["trial"]["arm"], r["trial"]["value"]) for r in result.trials()
             if r["trial"]["seed"] == 90}  # fmt: skip
    assert tried == {(arm, v) for arm in (PLAIN, "(2, 1)") for v in (8.0, 4.0, 2.0, 1.0, 0.5)}
    assert {r["trial"]["value"] for r in result.trials() if r["trial"]["seed"] < 90} == {1.0}


def test_in_the_same_time_an_arm_gets_fewer_steps(monkeypatch):
    monkeypatch.setattr(
        "spanopt.compare.wrapping.Wrap.step_ms",
        property(lambda wrap: 1.0 if wrap.arm.scales is None else 1.5),
    )
    result = compare(train, {"(2, 1)": (2, 1)}, seeds=3, steps=12, **BARE)
    shorter = [r for r in result.trials() if r["trial"]["steps"] == 8]
    assert [r["trial"]["seed"] for r in shorter] == [0, 1, 2]
    assert all(r["result"]["metrics"]["steps taken"] == 8 for r in shorter)
    assert result.equal_time["(2, 1)"].mean > result.changes["(2, 1)"].mean
    assert any("takes 1.50 times as long" in line for line in result.readings)


def test_seeds_are_added_until_intervals_are_narrow():
    result = compare(simulated, {"(2, 1)": (2, 1)}, until=0.25, seeds=40, **BARE)
    change = result.changes["(2, 1)"]
    assert change.high - change.low <= 0.25
    assert 3 < len(result.seeds) < 40
    assert len(plain_trials(result)) == len(result.seeds)
    assert "any time" in result.table()


def odd(seed, wrap):
    """Fail, diverge or train, by the seed."""
    if seed == 1 and wrap.arm.scales is not None:
        raise ZeroDivisionError("no data")
    value = simulated(seed, wrap)
    return float("nan") if seed == 2 and wrap.arm.scales is None else value


def test_what_fails_or_diverges_is_recorded_and_the_rest_goes_on(tmp_path):
    result = compare(odd, {"(2, 1)": (2, 1)}, seeds=6, out=tmp_path, **BARE)
    assert result.changes["(2, 1)"].seeds == 4
    assert result.changes["(2, 1)"].diverged == 2
    assert "Failed: (2, 1), seed 1: ZeroDivisionError: no data" in result.readings
    assert "Diverged: plain, seed 2." in result.readings
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    again = compare(odd, {"(2, 1)": (2, 1)}, seeds=6, out=tmp_path, **BARE)
    assert (tmp_path / "trials.jsonl").read_text().splitlines() == lines
    assert str(again) == str(result)
    compare(odd, {"(2, 1)": (2, 1)}, seeds=6, out=tmp_path, retry=True, **BARE)
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == len(lines) + 1


def test_a_function_that_always_fails_is_given_up():
    def broken(seed, wrap):
        raise ZeroDivisionError("no data")

    with pytest.raises(RuntimeError, match=r"(?s)first 3 trials failed.*no data"):
        compare(broken, {"(2, 1)": (2, 1)}, seeds=6, **BARE)


def test_noise_that_the_seed_does_not_decide_is_reported():
    calls = []

    def noisy(seed, wrap):
        calls.append(seed)
        return simulated(seed, wrap) * (1 + 0.001 * len(calls))

    result = compare(noisy, {"(2, 1)": (2, 1)}, seeds=3, **BARE)
    (line,) = [line for line in result.readings if "run twice" in line]
    assert "differs by up to 0.1 %" in line


def test_a_store_of_other_settings_is_refused_by_what_differs(tmp_path):
    run = functools.partial(compare, out=tmp_path, **BARE)
    run(simulated, {"(2, 1)": (2, 1)}, seeds=2)
    for arguments, message in (
        (
            {"arms": {"(2, 1)": (3, 1)}},
            r"arms\['\(2, 1\)'\].*\['parallel'\] was 2.0 and is now 3.0",
        ),
        ({"seeds": 3}, r"seeds was \[0, 1\] and is now \[0, 1, 2\]"),
        ({"steps": 5}, "steps was None and is now 5"),
        ({"train": train}, "train was 'toy_training:simulated' and is now 'toy_training:train'"),
    ):
        given = {"train": simulated, "arms": {"(2, 1)": (2, 1)}, "seeds": 2} | arguments
        with pytest.raises(ValueError, match=message):
            run(**given)


def test_processes_give_what_one_gives_and_one_that_dies_fails_its_trial_alone():
    arms = {"(2, 1)": (2, 1)}
    several = compare(toy_training.dies, arms, seeds=3, workers=2, **BARE)
    (line,) = [line for line in several.readings if line.startswith("Failed")]
    assert line.startswith("Failed: (2, 1), seed 1: BrokenProcessPool")
    alone = compare(simulated, arms, seeds=3, **BARE)
    assert several.losses(PLAIN) == alone.losses(PLAIN)
    first, _, last = alone.losses("(2, 1)")
    assert several.losses("(2, 1)") == [first, None, last]


def test_the_example_compares():
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "compare.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    result = compare(
        example.train, {"(2, 1)": (2, 1)}, seeds=2, steps=2, tuning_metric="tuning", **BARE
    )
    assert result.changes["(2, 1)"].seeds == 2


def test_a_function_that_processes_cannot_import_is_refused():
    with pytest.raises(ValueError, match=r"other processes can import: .*Put it at the top"):
        compare(lambda seed, wrap: 1.0, {"(2, 1)": (2, 1)}, seeds=2, workers=2, **BARE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 1}, "two different seeds or more"),
        ({"seeds": [1, 1]}, "two different seeds or more"),
        ({"tune": {"lr": [1.0]}}, "at least two values"),
        ({"tune": {"lr": [1.0, 2.0], "steps": [1, 2]}}, "one argument and its values"),
        ({"tune": {"seed": [1.0, 2.0]}}, "can't be tuned"),
        ({"tune": {"lr": [1.0, 2.0]}, "tuning_seeds": [1]}, "seeds and tuning_seeds share"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"until": 0}, "until is a width in per cent above 0"),
        ({"margin": 0}, "margin is a change"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(simulated, {"(2, 1)": (2, 1)}, **BARE | arguments)


def test_a_killed_comparison_resumes_and_loses_only_trials_in_progress(tmp_path):
    code = (
        "import sys, toy_training, spanopt.__main__\n"
        "assert not {'scipy', 'rich', 'matplotlib'} & set(sys.modules)  # only when comparing\n"
        "from spanopt.compare import compare\n"
        "compare(toy_training.killed_at, {'(2, 1)': (2, 1)}, seeds=4, controls=(),"
        f" out={str(tmp_path / 'out')!r}, progress=False)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    path = tmp_path / "out" / "trials.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and len(path.read_bytes().splitlines()) >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    with open(path, "ab") as file:
        file.write(b'{"trial": {"ar')  # half written
    arguments = (toy_training.killed_at, {"(2, 1)": (2, 1)})
    resumed = compare(*arguments, seeds=4, out=tmp_path / "out", **BARE)
    whole = compare(*arguments, seeds=4, **BARE)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[: len(kept)] == kept
    assert len(lines) == 10  # 4 seeds, 2 arms, 2 repetitions
    assert all(json.loads(line)["trial"] for line in lines)
    for arm in (PLAIN, "(2, 1)"):
        assert resumed.losses(arm) == pytest.approx(whole.losses(arm), rel=1e-6)


def test_the_picture_is_written(tmp_path):
    result = quiet(simulated, {"(2, 1)": (2, 1)}, seeds=3)
    result.plot(tmp_path / "arms.png")
    assert (tmp_path / "arms.png").stat().st_size > 5000


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install '.\[compare\]' in a clone"):
        compare(simulated, {"(2, 1)": (2, 1)}, seeds=2, **BARE)


def test_each_process_of_a_pool_sees_one_device():
    from spanopt.compare.pool import _start

    class Turns:
        def get(self):
            return "3"

    before, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()
    seen = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("spanopt.compare.pool.threading.Thread", lambda **_: NoThread())
            _start(Turns(), None, lambda: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]), ())
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    assert seen == ["3"]
    assert torch.get_num_threads() == threads


class NoThread:
    def start(self):
        pass
