"""Models that are spread over processes train as in one, and the scripts that show how run.

torchrun on the CPU, once for each number of processes: the cases are in distributed_worker.py.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_worker import ATTENTION, CASES, batches, made, reference

from spanopt import SpanScale

WORKER = Path(__file__).parents[1] / "distributed_worker.py"
EXAMPLES = Path(__file__).parents[2] / "examples"


def torchrun(processes, script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(script), *map(str, arguments)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=300)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(2, id="2 processes"),
        pytest.param(4, id="4 processes", marks=pytest.mark.long),
    ],
)
def outcomes(request, tmp_path_factory):
    """What each process says of each case."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first of pytest's processes runs it for all
        directory = directory.parent
    directory = directory / f"distributed-{request.param}"
    log = directory / "log"
    try:
        directory.mkdir()
    except FileExistsError:
        while not log.exists():
            time.sleep(0.2)
    else:
        specs = (getattr(item, "callspec", None) for item in request.session.items)
        wanted = {spec.params.get("case") for spec in specs if spec is not None}
        names = [name for name in CASES if name in wanted]
        printed = "it took too long"
        try:
            run = torchrun(request.param, WORKER, directory, *names)
            printed = run.stdout + run.stderr
        finally:
            (directory / "part").write_text(printed, encoding="utf-8")
            (directory / "part").rename(log)
    files = [directory / f"{rank}.json" for rank in range(request.param)]
    missing = {"trace": log.read_text(encoding="utf-8")}
    return [
        {"": missing} | (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})
        for file in files
    ]


@pytest.mark.parametrize("case", CASES)
def test_processes_train_like_one(outcomes, case):
    for rank, of_process in enumerate(outcomes):
        outcome = of_process.get(case, of_process[""])
        assert "trace" not in outcome, f"process {rank}: {outcome['trace']}"
        assert outcome["error"] < 1e-12


@pytest.mark.parametrize("attention", ATTENTION)
def test_what_they_are_compared_with_is_far_from_plain_training(attention):
    model, twin = made(attention)
    scaled, plain = reference(model, batches()), reference(twin, batches(), scale=SpanScale(1, 1))
    assert max((scaled[name] - plain[name]).abs().max() for name in plain) > 1e-2


def test_the_scripts_train_alike_and_go_on_from_their_checkpoints(tmp_path):
    printed = []
    for script, option in (("ddp.py", "--checkpoint"), ("fsdp.py", "--checkpoints")):
        losses = []
        for steps in (3, 6):
            arguments = ("--steps", steps, option, tmp_path / script)
            run = torchrun(2, EXAMPLES / script, *arguments)
            # Gloo can abort a process that is done and shutting down (pytorch/pytorch#190489).
            aborted = run.stderr.startswith("terminate called without an active exception")
            assert run.returncode == 0 or aborted, run.stderr
            losses += re.findall(r"step +(\d+)  loss ([\d.]+)", run.stdout)
        printed.append(losses)
    assert printed[0] == printed[1]
    assert [int(step) for step, _ in printed[0]] == [1, 2, 3, 4, 5, 6]
    assert float(printed[0][-1][1]) < float(printed[0][0][1]) - 0.3
