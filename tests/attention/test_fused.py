"""The fused kernels in Triton's interpreter: what is launched, and what is refused."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import explain_backend, prefix_attention
from qtuning_fast.attention.arguments import INPUTS
from qtuning_fast.kernels import backward
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 1, "Hkv": 1, "G": 2, "N": 17, "M": 15, "P": 5, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}


@pytest.fixture
def arguments(make_call):
    return make_call(**BASE | WHOLE, mask="padding bool")


def run(arguments):
    return prefix_attention(**arguments, backend="fused")


@pytest.mark.parametrize(
    ("needed", "launched"),
    [
        ({"query"}, ["fold", "backward_queries"]),
        ({"key"}, ["backward_queries", "backward_keys"]),
        ({"prefix_key"}, ["fold", "backward_queries", "backward_keys", "backward_prefix"]),
        ({"query", "key", "value"}, ["fold", "backward_queries", "backward_keys"]),
        ({"U_key"}, ["fold", "backward_queries", "backward_keys", "backward_prefix", "backward_reweighting"]),
        (set(INPUTS), ["fold", "backward_queries", "backward_keys", "backward_prefix", "backward_reweighting"]),
    ],
    ids=lambda x: "-".join(sorted(x)) if isinstance(x, (set, list)) else str(x),
)
def test_only_what_is_needed_is_launched(arguments, call_of, needed, launched):
    call = call_of(arguments)
    output = run(arguments)
    lse = torch.zeros(output.shape[:-1])
    gradients = backward.rooms(call, [name for name in INPUTS if name in needed])
    found = list(backward.launches(call, output, lse, lse, output, gradients))
    launches = {launch.kernel.fn.__name__.removesuffix("_kernel"): launch for launch in found}
    assert list(launches) == launched
    if keys := launches.get("backward_keys"):
        assert (keys.programs > keys.arguments["prefix_programs"]) == bool(needed & {"key", "value"})
        assert (keys.arguments["d_key"].pointer is not None) == ("key" in needed)
        assert (keys.arguments["parts"].needed) == bool(needed - {"query", "key", "value"})
    assert (launches["backward_queries"].arguments["d_query"].pointer is not None) == ("query" in needed)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"D": 257}, "up to 256, got 257"),
        ({"Dv": 300}, "up to 256, got 300"),
    ],
)
def test_what_it_cannot_do_it_refuses_by_name(make_call, options, complaint):
    with pytest.raises(NotImplementedError, match=complaint):
        run(make_call(**BASE | options))


def test_auto_leaves_the_interpreter_alone(arguments):
    choice = explain_backend(**arguments)
    assert choice.backend != "fused" and "interpreter" in choice.rejected["fused"]
