from pathlib import Path

import models_table
import pytest
import torch
from hypothesis import HealthCheck, settings

# The tests run two at a time, one thread each.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="all of the long runs, not a part of each")
    parser.addoption("--checkout", metavar="PATH", help="of PyTorch or torch-optimizer: its tests")
    parser.addoption("--models-table", metavar="FILE", help="write what was tested of models here")


def pytest_configure(config):
    """Have hypothesis generate thousands of cases in long runs, and the same few in short ones."""
    soak = config.getoption("soak")
    settings.register_profile(
        "spanopt",
        max_examples=2000 if soak else 60,
        stateful_step_count=25,
        derandomize=not soak,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("spanopt")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("soak"):
        left_out = pytest.mark.skip(reason="a long run, which `make soak` does")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(left_out)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        models_table.note(dict(report.user_properties))


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("models_table")
    if path and exitstatus == 0 and not hasattr(session.config, "workerinput"):
        old = Path(path).read_text(encoding="utf-8")
        Path(path).write_text(models_table.page(old), encoding="utf-8")


@pytest.fixture
def soak(request):
    return request.config.getoption("soak")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_mode_left():
    """No test may leave a function mode entered."""
    before = torch.overrides._get_current_function_mode_stack()
    yield
    assert torch.overrides._get_current_function_mode_stack() == before


@pytest.fixture(autouse=True)
def _doctest_torch(doctest_namespace):
    torch.manual_seed(0)
