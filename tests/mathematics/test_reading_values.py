"""Where values may be read, and that what is read leaves no trace."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from spanopt import rescale
from spanopt.mathematics.spans import _kept_identity


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_graph_holds_for_bases_of_any_magnitude(mode):
    def rescaled(basis, x):
        return rescale(x, basis, parallel=2.0, violation=1.0)

    torch.manual_seed(0)
    basis, x = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 16, 8)
    graph = make_fx(rescaled, tracing_mode=mode)(basis, x)
    for scale in (1.0, 1e-25, 0.0, 1e25):
        torch.testing.assert_close(graph(basis * scale, x), rescaled(basis * scale, x))


def test_what_is_kept_in_inference_mode_serves_training_too():
    _kept_identity.cache_clear()
    with torch.inference_mode():
        rescale(torch.randn(16, 8), torch.randn(16, 8), parallel=2.0, violation=1.0)
    assert _kept_identity.cache_info().currsize == 1
    assert not _kept_identity(8, torch.float32, torch.device("cpu")).is_inference()
