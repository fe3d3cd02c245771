"""The GPU's own attention, as the composed backend calls it: right, deterministic where it says so, and capturable."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.attention.composed import context
from qtuning_fast.attention.composed.vendors import Vendor, vendor_for
from qtuning_fast.attention.composed.vendors.cuda import CUDNN, EFFICIENT, FLASH_2
from qtuning_fast.attention.composed.vendors.packages import FLASH_3, FLASH_4

pytestmark = pytest.mark.gpu

# Weights and their gradients are rounded before they are multiplied, and so are results: a few units of the largest
# value. Float32 goes through three products of TF32, and its sums are longer than its precision is fine.
TOLERANCES = {
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.float32: 128 * torch.finfo(torch.float32).eps,
}
LSE_TOLERANCE = 1e-4  # it is computed and returned in float32

BASE = {"B": 2, "Hq": 4, "Hkv": 2, "N": 130, "M": 130, "D": 64, "Dv": 64, "dtype": torch.bfloat16}
THREE = [CUDNN, FLASH_2, EFFICIENT]
CASES = {  # who does it, and how it differs from BASE
    "no group": (THREE, {"Hq": 2}),
    "group": ([*THREE, FLASH_3, FLASH_4], {}),
    "causal": ([*THREE, FLASH_3, FLASH_4], {"is_causal": True}),
    "bottom-right": ([FLASH_2, EFFICIENT, FLASH_3], {"is_causal": True, "N": 67}),
    "more queries": (THREE, {"is_causal": True, "M": 67}),
    "head size 128": ([CUDNN, FLASH_2], {"D": 128, "Dv": 128}),
    "head size 256": ([FLASH_2, EFFICIENT], {"D": 256, "Dv": 256}),
    "odd head sizes": (THREE, {"D": 30, "Dv": 17}),
    "by position": (THREE, {"layout": "by position"}),
    "packed": (THREE, {"layout": "packed", "Hq": 2}),
    "unaligned": (THREE, {"layout": "unaligned"}),
    "broadcast": ([CUDNN], {"layout": "broadcast"}),
    "float16": ([CUDNN, FLASH_2], {"dtype": torch.float16, "is_causal": True}),
    "float32": ([EFFICIENT], {"dtype": torch.float32, "mask": "whole"}),
    "window": ([FLASH_2, FLASH_3], {"window": (40, 3)}),
    "window, left": ([FLASH_2, FLASH_3], {"window": (40, None)}),
    "window, right": ([FLASH_2, FLASH_3], {"window": (None, 3), "N": 67}),
    "window, causal": ([FLASH_2, FLASH_3], {"window": (40, None), "is_causal": True, "N": 67}),
    "one query": ([FLASH_2, EFFICIENT], {"N": 1, "M": 4099, "Hq": 8, "B": 1}),
    "few queries": ([FLASH_2], {"N": 5, "M": 1000}),
    "one key": ([FLASH_2], {"M": 1}),
    "padding": ([EFFICIENT], {"mask": "padding"}),
    "padding, one query": ([EFFICIENT], {"mask": "padding", "N": 1, "M": 1000}),
    "by position mask": ([CUDNN, EFFICIENT], {"mask": "by position"}),
    "by head": ([EFFICIENT], {"mask": "by head"}),
    "added": ([CUDNN, EFFICIENT], {"mask": "whole", "is_bool": False, "M": 63}),
    "mask and causal": ([EFFICIENT], {"mask": "padding", "is_causal": True, "N": 67}),
    "added and causal": ([EFFICIENT], {"mask": "padding", "is_bool": False, "is_causal": True, "N": 67}),
}


@pytest.fixture
def gpu_call(calls):
    return lambda **options: calls.real_call(**BASE | options, device="cuda")


def ready(vendor: Vendor, call) -> None:
    """Skips what this machine lacks. PyTorch's own two must be there."""
    why_not = vendor.why_not(call)
    if why_not is not None and vendor not in (FLASH_2, EFFICIENT):
        pytest.skip(f"{vendor.name}: {why_not}")
    assert why_not is None


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("vendor", "case"),
    [pytest.param(vendor, case, id=f"{vendor.name}, {case}") for case in CASES for vendor in CASES[case][0]],
)
def test_both_passes_are_right(calls, gpu_call, vendor, case):
    call = gpu_call(**CASES[case][1])
    ready(vendor, call)
    calls.assert_right(vendor, call, TOLERANCES[call.query.dtype], LSE_TOLERANCE)


@pytest.mark.parametrize("vendor", THREE, ids=lambda vendor: vendor.name)
def test_the_layout_of_the_outputs_gradient_does_not_matter(calls, gpu_call, vendor):
    call = gpu_call(layout="by position")
    ready(vendor, call)
    o, L, rest = calls.forward(call, vendor)
    room = torch.ones_like(o)
    for d_o in (room, room.contiguous(), room[:1, :1, :1, :1].expand(o.shape)):
        found = context.backward(call, vendor, o, L, rest, d_o)
        exact = calls.gradients(
            call.query.double(), call.key.double(), call.value.double(), None, False, call.scale,
            o.double(), L.double(), d_o.double(),
        )  # fmt: skip
        for x, x_exact in zip(found, exact):
            calls.assert_close(x, x_exact, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("options", [{"is_causal": True}, {"mask": "padding"}, {"dtype": torch.float32}])
def test_the_same_bits_every_time(calls, gpu_call, deterministic, options):
    call = gpu_call(**{"N": 1024, "M": 1024, "Hq": 8} | options)
    vendor = vendor_for(call)
    assert vendor is (FLASH_2 if "is_causal" in options else EFFICIENT)

    def passes():
        o, L, rest = calls.forward(call, vendor)
        return o, L, *context.backward(call, vendor, o, L, rest, torch.ones_like(o))

    first = passes()
    for _ in range(3):
        assert all(x.equal(y) for x, y in zip(first, passes()))


@pytest.mark.parametrize(("vendor", "mask"), [(FLASH_2, None), (EFFICIENT, "padding")], ids=["no mask", "padding"])
def test_a_decoding_step_can_be_captured(calls, gpu_call, vendor, mask):
    call = gpu_call(N=1, M=1000, Hq=8, mask=mask)
    assert vendor_for(call) is vendor
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls.forward(call, vendor)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls.forward(call, vendor)
    call.query.neg_()
    call.key.mul_(0.5)
    graph.replay()
    for x, y in zip(captured, calls.forward(call, vendor)):
        assert x.equal(y)


def test_a_training_step_can_be_captured(calls, gpu_call):
    call = gpu_call(is_causal=True)
    for vendor in (FLASH_2, EFFICIENT):

        def passes(vendor=vendor):
            o, L, rest = calls.forward(call, vendor)
            return o, L, *context.backward(call, vendor, o, L, rest, torch.ones_like(o))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            passes()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = passes()
        graph.replay()
        o, L, *_ = passes()
        assert captured[0].equal(o) and captured[1].equal(L)
        assert not any(x.isnan().any() for x in captured)


def test_a_compiler_sees_through_the_choice(calls, gpu_call):
    torch._dynamo.reset()

    def name_length(query, key, value):
        return query * len(vendor_for(calls.call_of(query, key, value)).name)

    call = gpu_call()
    arguments = call.query, call.key, call.value
    compiled = torch.compile(name_length, fullgraph=True, backend="eager")
    assert compiled(*arguments).equal(name_length(*arguments))
    torch._dynamo.reset()
