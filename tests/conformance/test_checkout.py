"""The tests of PyTorch and of torch-optimizer themselves, with every optimizer in them wrapped.

They are in no wheel: ``make conformance CHECKOUT=...`` names a checkout of one of the two. Each of
its tests runs bare and wrapped. One that passes bare must pass wrapped.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# In a checkout: the test files, and the tests in them that use an optimizer.
PARTS = {
    "test/optim": "",
    "test/test_optim.py": "",
    "test/test_torch.py": "grad_scal or GradScal",
    "tests": "",
}


def outcomes(checkout, part, report, *options):
    """Run a part of the checkout's tests; return {test id: "passed", "failed" or "skipped"}."""
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    if (checkout / "torch_optimizer").is_dir():
        paths.insert(0, str(checkout))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    command += [f"--junitxml={report}", "--rootdir", str(checkout), str(part), *options]
    if PARTS[part.relative_to(checkout).as_posix()]:
        command += ["-k", PARTS[part.relative_to(checkout).as_posix()]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    print(done.stdout[-2000:])
    found = {}
    for case in ET.parse(report).iter("testcase") if report.exists() else ():
        ends = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = {(): "passed", ("skipped",): "skipped"}.get(tuple(ends), "failed")
    return found, done.stdout


def test_what_passes_bare_passes_wrapped(request, tmp_path):
    given = request.config.getoption("checkout")
    if not given:
        pytest.skip("no --checkout of pytorch/pytorch or jettify/pytorch-optimizer was given")
    checkout = Path(given).resolve()
    parts = [checkout / part for part in PARTS if (checkout / part).exists()]
    if (checkout / "test/optim").exists():  # which test_optim.py of some versions only collects
        parts = [part for part in parts if part.name != "test_optim.py" or not collects(part)]
    assert parts, f"{checkout} has none of {', '.join(PARTS)}"
    lost, passed = [], 0
    for number, part in enumerate(parts):
        bare, _ = outcomes(checkout, part, tmp_path / f"bare{number}.xml")
        wrapped, log = outcomes(checkout, part, tmp_path / f"{number}.xml", "-p", "wrapping")
        good = {name for name, outcome in bare.items() if outcome == "passed"}
        passed += len(good)
        lost += [
            f"{name}: {wrapped.get(name, 'not run')}"
            for name in sorted(good)
            if wrapped.get(name) != "passed"
        ]
        # Tests that made no optimizer would prove nothing.
        assert not good or "wrapped: 0 optimizers" not in log
    assert passed, "none of the checkout's tests passes bare: is it of this version of PyTorch?"
    assert not lost, "\n".join(lost)


def collects(path):
    return "from optim.test_optim import" in path.read_text(encoding="utf-8")
