"""Fixtures of the tests beside this file."""

import pytest
import torch
from models import gradients


@pytest.fixture
def compiled():
    """Return what runs a model in one compiled graph, without compiling again the second time."""
    torch.compiler.reset()
    code = {}

    def run_compiled(model, real, *inputs, backend="aot_eager"):
        stance = "fail_on_recompile" if model in code else "default"
        if model not in code:
            code[model] = torch.compile(model, fullgraph=True, backend=backend)
        with torch.compiler.set_stance(stance):
            y = code[model](*inputs)
        return gradients(model, y[real].pow(3).sum())

    yield run_compiled
    torch.compiler.reset()
