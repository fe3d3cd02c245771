"""The gradient of the sinks."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.kernels import backward_sink
from qtuning_fast.kernels.arguments import PerQuery
from qtuning_fast.kernels.forward import forward
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 2, "Hkv": 1, "G": 2, "N": 5, "M": 7, "P": 3, "D": 16, "Dv": 24, "sink": True}


@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"N": 70, "B": 3}, {"P": 0, "M": 3, "is_causal": True}, {"M": 0, "P": 0}, {"B": 0}], ids=str
)
def test_it_is_the_definitions(checked, gradient_at, by_definition, options, has_delta):
    call = checked(**BASE | options)
    d_output = gradient_at(call)
    output, lse, rest = forward(call)
    delta = (output * d_output).sum(-1).contiguous().detach() if has_delta else None
    d_sink = torch.full_like(call.sink, torch.nan).detach()
    backward_sink.launch(call, output, d_output, PerQuery(lse, rest, delta), d_sink).run()
    _, _, exact = by_definition(call, d_output)
    torch.testing.assert_close(d_sink.double(), exact["sink"], rtol=1e-5, atol=1e-5)
