"""Global settings of torch.compile: when they are made, and their undoing."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.oldest


def run(script):
    """Run a script in a fresh process, in which nobody has imported Dynamo."""
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=here, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_importing_the_library_imports_nothing_that_takes_seconds():
    run(
        """
import sys
import torch
before = set(sys.modules)
import spanopt
new = set(sys.modules) - before
slow = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp",
        "transformers", "lightning", "accelerate", "matplotlib", "pandas", "scipy", "rich")
assert not new.intersection(slow), new.intersection(slow)
from torch import nn
with spanopt.attach(nn.MultiheadAttention(8, 2), spanopt.SpanScale(2.0)) as hooks:
    x = torch.randn(5, 1, 8)
    hooks.sites[0].module(x, x, x)[0].sum().backward()
assert "torch._dynamo" not in sys.modules, "training without the compiler imports it"
assert not any("spanopt" in type(finder).__module__ for finder in sys.meta_path)
"""
    )


FLAG = "torch._dynamo.config.skip_nnmodule_hook_guards"


@pytest.mark.parametrize("first", ["dynamo", "attach"])
def test_taking_the_last_attachment_off_restores_what_was_set(first):
    run(
        f"""
import torch
from torch import nn
from spanopt import SpanScale, attach
if {first == "dynamo"}:
    import torch._dynamo
    assert {FLAG}
hooks = [attach(nn.MultiheadAttention(8, 2), SpanScale(2.0)) for _ in range(2)]
import torch._dynamo
assert not {FLAG}
hooks[0].remove()
hooks[0].remove()
assert not {FLAG}, "another attachment is left"
hooks[1].remove()
assert {FLAG}
{FLAG} = False
with attach(nn.MultiheadAttention(8, 2), SpanScale(2.0)):
    assert not {FLAG}
assert not {FLAG}, "the user had set it so"
"""
    )


def test_an_attachment_taken_off_before_the_compiler_is_imported_sets_nothing():
    run(
        f"""
import torch
from torch import nn
from spanopt import SpanScale, attach
with attach(nn.MultiheadAttention(8, 2), SpanScale(2.0)):
    pass
import torch._dynamo
assert {FLAG}
"""
    )


def test_compiled_code_of_a_twin_made_after_the_attachment_is_not_run_in_place_of_hooks():
    run(
        """
import copy
import sys
import torch
from models import Decoder, gradients, loss_of, tokens
from spanopt import SpanScale, attach
plain = Decoder(layers=1).double()
model, batch = copy.deepcopy(plain), tokens()
with attach(model, SpanScale(2.0, 0.5)) as hooks:
    eager = gradients(model, loss_of(model(batch), batch))
    hooks.forget()
    assert "torch._dynamo" not in sys.modules
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    loss_of(compiled(batch), batch).backward()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(model, loss_of(run(batch), batch))
    assert hooks.unseen() == []
for name, gradient in eager.items():
    torch.testing.assert_close(found[name], gradient)
"""
    )
