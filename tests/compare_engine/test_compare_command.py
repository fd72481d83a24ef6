"""The command line and the progress that it shows."""

import io
import json

import pytest
from rich.console import Console
from toy_training import simulated

from spanopt.__main__ import main
from spanopt.compare import compare


def test_the_command_line_compares_and_resumes(tmp_path, capsys, monkeypatch):
    arguments = ["compare", "toy_training:simulated", "--arm", "2,1", "--arm", "2,1,pooled"]
    arguments += ["--seeds", "3", "--out", str(tmp_path / "x"), "--tune", "lr=1,2"]
    arguments += ["--controls", "uniform", "--plot", str(tmp_path / "x.png")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "(2, 1), pooled  1 " in printed
    assert "(2, 1) helps" in printed
    lines = (tmp_path / "x" / "trials.jsonl").read_text()
    assert main(arguments) == 0
    assert capsys.readouterr().out == printed
    assert (tmp_path / "x" / "trials.jsonl").read_text() == lines
    settings = json.loads((tmp_path / "x" / "settings.json").read_text())
    assert settings["arms"]["(2, 1), pooled"]["options"] == {"projection": "pooled"}
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy_training", "--arm", "2,1"], "not of the form package.module:train"),
        (["toy_training:none", "--arm", "2,1"], "cannot import 'toy_training:none'"),
        (["toy_training:simulated", "--arm", "2"], "--arm is two factors"),
        (["toy_training:simulated", "--arm", "2,1", "--tune", "lr"], "--tune is a name and values"),
        (["toy_training:simulated", "--arm", "2,1", "--seeds", "1"], "two different seeds"),
        (["toy_training:simulated", "--arm", "2,1", "--tune", "rate=1,2"], "called with the arg"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_progress_shows_the_table_as_it_stands(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console", lambda **_: Console(file=shown, force_terminal=True, width=100)
    )
    compare(simulated, {"(2, 1)": (2, 1)}, seeds=4, controls=())
    text = shown.getvalue()
    assert "interval, any time" in text
    assert "-2.0" in text or "-1.9" in text
    assert "10/10" in text


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr("spanopt.compare.progress.EVERY", 0.0)
    compare(simulated, {"(2, 1)": (2, 1)}, seeds=2, controls=())
    assert "3 trials done, 3 or more left" in capsys.readouterr().err
