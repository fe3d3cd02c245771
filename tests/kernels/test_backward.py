"""The backward pass: of five launches those that some gradient needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtuning_fast.attention.arguments import INPUTS, trainable
from qtuning_fast.kernels import backward
from qtuning_fast.kernels.forward import forward
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")
BASE = {"dtype": torch.float32, "B": 1, "Hkv": 1, "G": 2, "N": 17, "M": 15, "P": 5, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}
BOTH = ("fold", "backward_queries")


@pytest.mark.parametrize(
    ("needed", "launched"),
    [
        ({"query"}, ["fold", "backward_queries"]),
        ({"key"}, ["backward_queries", "backward_keys"]),
        ({"prefix_key"}, ["fold", "backward_queries", "backward_keys", "backward_prefix"]),
        ({"query", "key", "value"}, ["fold", "backward_queries", "backward_keys"]),
        ({"sink"}, ["fold", "backward_queries", "backward_sink"]),
        ({"U_key"}, ["fold", "backward_queries", "backward_keys", "backward_prefix", "backward_reweighting"]),
        (set(INPUTS), [*BOTH, "backward_keys", "backward_prefix", "backward_reweighting", "backward_sink"]),
    ],
    ids=lambda x: "-".join(sorted(x)) if isinstance(x, (set, list)) else str(x),
)
def test_only_what_is_needed_is_launched(checked, needed, launched):
    call = checked(**BASE | WHOLE, mask="padding bool", sink=True)
    output, _, _ = forward(call)
    lse = torch.zeros(output.shape[:-1])
    gradients = backward.rooms(call, [name for name in INPUTS if name in needed])
    found = list(backward.launches(call, output, lse, lse, output, gradients))
    launches = {launch.kernel.fn.__name__.removesuffix("_kernel"): launch for launch in found}
    assert list(launches) == launched
    if keys := launches.get("backward_keys"):
        assert (keys.programs > keys.arguments["prefix_programs"]) == bool(needed & {"key", "value"})
        assert (keys.arguments["d_key"].pointer is not None) == ("key" in needed)
        assert (keys.arguments["parts"].needed) == bool(needed - {"query", "key", "value", "sink"})
    assert (launches["backward_queries"].arguments["d_query"].pointer is not None) == ("query" in needed)


def test_room_for_gradients_lies_as_kernels_write_it(checked):
    call = checked(**BASE | WHOLE)
    strided = replace(
        call,
        query=call.query.detach().transpose(1, 2).contiguous().transpose(1, 2),
        prefix_key=call.prefix_key.detach().mT.contiguous().mT,
    )
    room = backward.rooms(strided, ["query", "prefix_key", "U_value"])
    assert list(room) == ["query", "prefix_key", "U_value"]
    assert room["query"].stride() == strided.query.stride() and room["prefix_key"].is_contiguous()
    for name, x in room.items():
        assert (x.shape, x.dtype) == (getattr(call, name).shape, getattr(call, name).dtype)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["query"], set()),
        (["V_key"], {"key"}),
        (["prefix_value", "gate_tau"], {"value", "gate"}),
        (INPUTS, {"key", "value", "gate"}),
    ],
    ids=lambda names: "-".join(sorted(names)) or "none",
)
def test_parts_follow_from_the_gradients(names, parts):
    needed = backward.parts_needed(dict.fromkeys(names, torch.empty(0)))
    assert {name for name, is_needed in needed.items() if is_needed} == parts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "mask": "padding bool"},
        {"T": 2, "B": 3},
        {"window": (4, 3), "softcap": 2.0, "sink": True},
    ],
    ids=str,
)
def test_all_gradients_are_those_of_the_definition(checked, gradient_at, by_definition, options):
    call = checked(**BASE | WHOLE | options)
    d_output = gradient_at(call)
    _, _, exact = by_definition(call, d_output)
    found = backward.backward(call, *forward(call), d_output, trainable(call))
    for name, x in zip(trainable(call), found, strict=True):
        torch.testing.assert_close(x.double(), exact[name], rtol=1e-4, atol=1e-4, msg=name)
