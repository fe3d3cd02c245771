"""PyTorch's operators on a GPU: our side of the calls is exact, and the calls fit the operators.

Stand-ins with the operators' conventions, in plain PyTorch, show the first, PyTorch's meta kernels the second.
"""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.attention.composed.vendors import Attention, cuda
from qtuning_fast.attention.composed.vendors.cuda import CUDNN, EFFICIENT, FLASH_2

VENDORS = [CUDNN, FLASH_2, EFFICIENT]


@pytest.mark.parametrize(
    ("vendor", "name"), [(CUDNN, "cudnn"), (FLASH_2, "flash"), (EFFICIENT, "mem_efficient")], ids=lambda x: str(x)[:16]
)
def test_pytorchs_switches_are_respected(machine, calls, vendor, name):
    switch = getattr(torch.backends.cuda, f"enable_{name}_sdp")
    switch(False)
    try:
        assert "switched off" in vendor.why_not(calls.fake_call())
    finally:
        switch(True)
    assert vendor.why_not(calls.fake_call()) is None


def test_a_setting_that_changes_cudnns_layouts_is_respected(machine, calls, monkeypatch):
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert "AVOID_RECOMPILE" in CUDNN.why_not(calls.fake_call())


def test_both_passes_are_exact(stand_ins, calls, vendor, case):
    calls.assert_right(vendor, calls.real_call(**calls.CASES[case]), 1e-12, 1e-12)


def test_a_cache_is_read_where_it_lies(stand_ins, calls, monkeypatch):
    """Decoding copies and repeats no keys: they reach the kernel as they are."""
    call = calls.real_call(N=1, M=32, mask="padding", layout="by position")
    seen = []
    kernel = stand_ins._efficient_attention_forward

    def spy(q, k, v, *rest, **options):
        seen.extend((k.data_ptr(), v.data_ptr()))
        return kernel(q, k, v, *rest, **options)

    monkeypatch.setattr(stand_ins, "_efficient_attention_forward", spy)
    calls.forward(call, EFFICIENT)
    assert seen == [call.key.data_ptr(), call.value.data_ptr()]


class MetaKernels:
    """PyTorch's operators, on tensors without data."""

    def __getattr__(self, name):
        return getattr(torch.ops.aten, name)

    def _efficient_attention_backward(self, *arguments, scale):
        # PyTorch's own meta kernel lacks a parameter, and takes a scale for two. The schema shows that it is one.
        operator = torch.ops.aten._efficient_attention_backward
        assert "scale" in [argument.name for argument in operator.default._schema.arguments if argument.kwarg_only]
        return operator(*arguments)


def test_calls_fit_pytorchs_operators(monkeypatch, calls, vendor, fitting):
    call = calls.real_call(**calls.CASES[fitting], dtype=torch.bfloat16)
    monkeypatch.setattr(cuda, "aten", MetaKernels())
    monkeypatch.setattr(cuda, "starts_aligned", lambda x: x.storage_offset() * x.element_size() % 16 == 0)
    q, k, v, mask = (
        None if x is None else x.to("meta") for x in (call.query, call.key, call.value, calls.additive(call))
    )
    x = Attention(q, k, v, mask, call.is_causal, call.scale)
    o, L = vendor.forward(x)
    assert o.shape == (*q.shape[:3], v.shape[-1]) and o.dtype == q.dtype
    assert L.shape == q.shape[:3] and L.dtype == torch.float32
    found = vendor.backward(x, o, L, torch.empty_like(o))
    assert [d.shape for d in found] == [y.shape for y in (q, k, v)]
