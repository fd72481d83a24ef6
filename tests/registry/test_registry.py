"""The models of the registry of transformers, none of them picked by hand, against references.

A short run tries those that a hash picks, ``--soak`` all. ``make registry`` writes the page.
"""

import hashlib

import pytest
import run
from run import CHUNK, every_case, verify_in_a_process

FAILURES = {"wrong", "broken", "crashed"}
SHARE = 128  # one model in so many is tried in a short run


def sampled(case):
    name = case.rsplit(":", 1)[0]
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % SHARE == 0


def chunks(cases, size):
    return [cases[i : i + size] for i in range(0, len(cases), size)]


def pytest_generate_tests(metafunc):
    if "cases" in metafunc.fixturenames:
        every, soak = every_case(), metafunc.config.getoption("soak")
        some = every if soak else [case for case in every if sampled(case)]
        groups = chunks(some, CHUNK)
        metafunc.parametrize("cases", groups, ids=[f"{g[0].rsplit(':')[0]}..." for g in groups])


def test_gradients_are_the_references_or_the_model_is_refused(cases):
    rows = list(verify_in_a_process(cases))
    assert [f"{row['type']}:{row['attention']}" for row in rows] == cases
    failed = [row for row in rows if row["outcome"] in FAILURES]
    assert not failed, "\n".join(map(str, failed))
    # Of any dozen models some are verified, or nothing would be tested.
    assert any(row["outcome"] == "verified" for row in rows)
    for row in rows:
        if row["outcome"] == "verified":
            assert row["error"] < 1e-2 * row["changes"]
            assert row["changes"] > 1e-4
        if row["outcome"] == "refused":
            assert len(row["refused"]) > 40
            assert any(word in row["refused"] for word in ("layer", "scale", "mask"))


def test_models_that_everyone_knows_are_built_and_verified():
    names = ("llama", "whisper", "t5")
    cases = [f"{name}:{attention}" for name in names for attention in ("sdpa", "eager")]
    assert [row["outcome"] for row in verify_in_a_process(cases)] == ["verified"] * 6


def test_an_interrupted_run_goes_on_from_the_rows_it_has(tmp_path, monkeypatch):
    cases = [f"m{i}:sdpa" for i in range(3)]
    tried = []

    def verify(some):
        for case in some:
            if len(tried) == 2:
                raise KeyboardInterrupt
            tried.append(case)
            outcome = "wrong" if case == cases[0] else "verified"
            yield {"type": case[:2], "attention": "sdpa", "outcome": outcome}

    monkeypatch.setattr(run, "every_case", lambda: cases)
    monkeypatch.setattr(run, "verify_in_a_process", verify)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run.verify_all(path, [], 1)
    with path.open("a") as file:
        file.write('{"type": "m2", "atten')  # cut off
    tried.clear()
    rows = run.verify_all(path, run.kept_rows(path, ["wrong"]), 1)
    assert sorted(row["type"] for row in rows) == ["m0", "m1", "m2"]
    assert tried == [cases[0], cases[2]]
    assert run.kept_rows(path, []) == rows


def test_rows_of_other_versions_are_not_mixed_in(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"torch": "1.0", "transformers": "1.0"}\n')
    with pytest.raises(SystemExit, match=r"is of .*1\.0.* leave --resume out"):
        run.kept_rows(path, [])
