"""Which vendor takes which call, and which comes first. No GPU runs here: calls have no data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qtuning_fast.attention.composed import vendors
from qtuning_fast.attention.composed.vendors import cuda, packages, vendor_for

CUDNN, FLASH_2, EFFICIENT = cuda.CUDNN, cuda.FLASH_2, cuda.EFFICIENT
FLASH_3, FLASH_4 = packages.FLASH_3, packages.FLASH_4
ON_GPU = [CUDNN, FLASH_2, EFFICIENT, FLASH_3, FLASH_4]
TAKING_MASKS = [CUDNN, EFFICIENT]
REFUSED = {
    "a CPU": (ON_GPU, {"device": "cpu"}, {}, "for CUDA devices"),
    "float64": (ON_GPU, {"dtype": torch.float64}, {}, "query is torch.float64"),
    "float32": ([CUDNN, FLASH_2, FLASH_3, FLASH_4], {"dtype": torch.float32}, {}, "query is torch.float32"),
    "head size": (ON_GPU, {"D": 16, "Dv": 264}, {}, "head sizes up to 256, got 16 and 264"),
    "samples": (ON_GPU, {"B": 65536}, {}, "up to 65535 samples"),
    "a mask": ([FLASH_2, FLASH_3, FLASH_4], {"mask": torch.bool}, {}, "no masks"),
    "a wide mask": (TAKING_MASKS, {"mask": torch.float32}, {}, "does not hold all values of torch.float32"),
    "a wide mask beside padding": (
        [EFFICIENT],
        {"mask": torch.float32, "padding": torch.bool},
        {},
        "does not hold all values of torch.float32",
    ),
    "a window": ([CUDNN, EFFICIENT, FLASH_4], {"window": (3, 0)}, {}, "not given windows"),
    "a window over fewer keys": ([FLASH_2, FLASH_3], {"window": (3, 0), "M": 8}, {}, "as many keys as queries"),
    "float16's in bfloat16": (TAKING_MASKS, {"mask": torch.float16}, {}, "does not hold all values"),
    "cuDNN, large heads": ([CUDNN], {"D": 136}, {}, "up to 128, got 136"),
    "cuDNN, one query": ([CUDNN], {"N": 1}, {}, "neither one query nor one key"),
    "cuDNN, one key": ([CUDNN], {"M": 1}, {}, "neither one query nor one key"),
    "cuDNN, bottom-right": ([CUDNN], {"N": 4, "is_causal": True}, {}, "top-left, and N, M are 4, 16"),
    "cuDNN, both": ([CUDNN], {"is_causal": True, "mask": torch.bool}, {}, "causality or a mask"),
    "cuDNN, padding": ([CUDNN], {"padding": torch.bool}, {}, "expanded for every query"),
    "cuDNN, half a tile": ([CUDNN], {"M": 192}, {}, "can return NaN"),
    "cuDNN, old": ([CUDNN], {}, {"cudnn": 91002}, "from cuDNN 9.15.1"),
    "cuDNN, none": ([CUDNN], {}, {"cudnn": 0}, "from cuDNN 9.15.1"),
    "cuDNN, Ampere": ([CUDNN], {}, {"capability": (8, 0)}, "9.0, 10.0 and 10.3"),
    "Turing": ([FLASH_2], {}, {"capability": (7, 5)}, "from 8.0 to 12.1, got 7.5"),
    "the next one": ([FLASH_2, EFFICIENT], {}, {"capability": (13, 0)}, "to 12.1, got 13.0"),
    "bfloat16 on Turing": ([EFFICIENT], {}, {"capability": (7, 5)}, "bfloat16 from compute capability 8.0"),
    "backward on Ada": ([FLASH_2], {"D": 200}, {"capability": (8, 9)}, "head size 200"),
    "another flash": ([FLASH_2], {}, {"other": "FA4"}, "FA4 was activated"),
    "3 on Blackwell": ([FLASH_3], {}, {"capability": (10, 0)}, "capability 9.0"),
    "4 on Hopper": ([FLASH_4], {}, {}, "10.x only, got 9.0"),
    "4, head size": ([FLASH_4], {"D": 96}, {"capability": (10, 0)}, "64 and 128 only, got 96"),
    "3 is missing": ([FLASH_3], {}, {"flash_3": "not there"}, "not there"),
    "4 is missing": ([FLASH_4], {}, {"capability": (10, 0), "flash_4": "not there"}, "not there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_each_refuses(machine, calls, case):
    who, options, installed, reason = REFUSED[case]
    machine(**installed)
    for vendor in who:
        assert reason in vendor.why_not(calls.fake_call(**options)), vendor.name


TAKEN = {
    "plain": ([CUDNN, FLASH_2, EFFICIENT, FLASH_3], {}, {}),
    "causal": ([CUDNN, FLASH_2, EFFICIENT, FLASH_3], {"is_causal": True}, {}),
    "bottom-right": ([FLASH_2, EFFICIENT, FLASH_3], {"is_causal": True, "N": 3}, {}),
    "a mask": (TAKING_MASKS, {"mask": torch.bool}, {}),
    "a window": ([FLASH_2, FLASH_3], {"window": (3, None), "is_causal": True}, {}),
    "one query in a window": ([FLASH_2, EFFICIENT, FLASH_3], {"window": (3, 0), "N": 1}, {}),
    "causal, half a tile": ([CUDNN], {"N": 192, "M": 192, "is_causal": True}, {}),
    "its own float mask": (TAKING_MASKS, {"mask": torch.bfloat16}, {}),
    "a narrow mask": ([EFFICIENT], {"mask": torch.float16, "dtype": torch.float32}, {}),
    "odd head sizes": ([CUDNN, FLASH_2, EFFICIENT, FLASH_3], {"D": 30, "Dv": 17}, {}),
    "float32": ([EFFICIENT], {"dtype": torch.float32}, {}),
    "float16 on Turing": ([EFFICIENT], {"dtype": torch.float16}, {"capability": (7, 5)}),
    "Ada": ([FLASH_2, EFFICIENT], {"D": 256}, {"capability": (8, 9)}),
    "Blackwell": ([CUDNN, FLASH_2, EFFICIENT, FLASH_4], {}, {"capability": (10, 3)}),
}


def test_none_is_given_packed_sequences(machine, calls):
    offsets = torch.empty(3, dtype=torch.int32, device="cuda")
    packed = replace(calls.fake_call(B=1), cu_seqlens_query=offsets, max_seqlen_query=9, max_seqlen_key=9)
    assert all(vendor.why_not(packed) == "it is not given packed sequences" for vendor in ON_GPU)


@pytest.mark.parametrize("case", TAKEN)
def test_what_each_takes(machine, calls, case):
    who, options, installed = TAKEN[case]
    machine(**installed)
    for vendor in who:
        assert vendor.why_not(calls.fake_call(**options)) is None, vendor.name


def test_on_rocm_all_refuse(machine, calls, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert all("ROCm" in vendor.why_not(calls.fake_call()) for vendor in ON_GPU)


def test_determinism_leaves_pytorchs_deterministic_ones(machine, calls):
    machine(capability=(9, 0))
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in CUDNN.why_not(calls.fake_call())
        assert "deterministic" in FLASH_3.why_not(calls.fake_call())
        assert vendor_for(calls.fake_call()) is FLASH_2
        assert vendor_for(calls.fake_call(mask=torch.bool)) is EFFICIENT
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_fastest_comes_first(machine, calls):
    assert vendor_for(calls.fake_call(device="cpu")) is vendors.CPU_FLASH
    assert vendor_for(calls.fake_call()) is FLASH_3
    machine(flash_3="missing")
    assert vendor_for(calls.fake_call()) is CUDNN
    assert vendor_for(calls.fake_call(N=9)) is CUDNN
    assert vendor_for(calls.fake_call(N=8)) is FLASH_2
    assert vendor_for(calls.fake_call(N=8, mask=torch.bool)) is CUDNN
    assert vendor_for(calls.fake_call(N=1, mask=torch.bool)) is EFFICIENT
    assert vendor_for(calls.fake_call(N=12, is_causal=True)) is FLASH_2
    machine(capability=(10, 0))
    assert vendor_for(calls.fake_call()) is FLASH_4
    machine(capability=(8, 6), flash_3="missing")
    assert vendor_for(calls.fake_call()) is FLASH_2
    assert vendor_for(calls.fake_call(dtype=torch.float32)) is EFFICIENT
    obstacles = vendor_for(calls.fake_call(dtype=torch.float64))
    assert isinstance(obstacles, dict) and obstacles.keys() == {vendor.name for vendor in vendors.VENDORS}


def test_a_compiler_sees_through_the_choice(calls, monkeypatch):
    constant = torch.compiler.assume_constant_result
    for module in (cuda, packages):
        monkeypatch.setattr(module, "capability", constant(lambda index: (9, 0)))
    monkeypatch.setattr(cuda, "cudnn_version", constant(lambda: 91900))
    torch._dynamo.reset()

    def name_length(query, key, value):
        vendor = vendor_for(calls.call_of(query, key, value))
        return query * len(vendor.name)

    with FakeTensorMode():
        call = calls.fake_call()
        compiled = torch.compile(name_length, fullgraph=True, backend="eager")
        assert compiled(call.query, call.key, call.value).shape == call.query.shape
    torch._dynamo.reset()
