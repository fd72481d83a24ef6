"""Fixtures of the tests beside this file."""

import pytest
import torch


@pytest.fixture
def compiled():
    """What compiles a model in one graph; the compiler is fresh before and after."""
    torch.compiler.reset()
    yield lambda model, backend="aot_eager": torch.compile(model, fullgraph=True, backend=backend)
    torch.compiler.reset()
