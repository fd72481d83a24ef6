"""The models of the registry of transformers, none of them picked by hand, against references.

A short run tries those that a hash picks, ``--soak`` all. ``make registry`` writes the page.
"""

import hashlib

from run import CHUNK, every_case, verify_in_a_process

FAILURES = {"wrong", "broken", "crashed"}
SHARE = 96  # one model in so many is tried in a short run


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
    rows = verify_in_a_process(cases)
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
    names = ("llama", "vit", "whisper", "t5")
    cases = [f"{name}:{attention}" for name in names for attention in ("sdpa", "eager")]
    assert [row["outcome"] for row in verify_in_a_process(cases)] == ["verified"] * 8
