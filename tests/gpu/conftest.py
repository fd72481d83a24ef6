"""All tests in this folder want a GPU: ``make test-gpu``."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no GPU here"))


@pytest.fixture(autouse=True)
def _settings_as_they_were():
    from spanopt.projection import set_formulation

    yield
    set_formulation("auto")
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
