"""What a compiler is told of functions whose results never change."""

from __future__ import annotations

import torch

from qtuning_fast.attention.common import constant


def test_a_compiler_takes_the_result_and_does_not_look_inside() -> None:
    calls = []

    @constant
    def size() -> int:
        calls.append(None)
        torch._dynamo.graph_break()  # which fullgraph would refuse
        return 3

    assert size() == 3
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x * size(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    traced = len(calls)
    compiled(torch.zeros(2))
    assert traced >= 2 and len(calls) == traced
    torch._dynamo.reset()
