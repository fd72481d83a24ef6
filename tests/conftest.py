import pytest
import torch

# The tests run two at a time, one thread each.
torch.set_num_threads(1)


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
