"""Attention by others: what each of them takes, who comes first, and what our side of the calls does to them.

None of the GPU's operators runs here. Stand-ins with their conventions, in plain PyTorch, show that our side is exact;
PyTorch's meta kernels show that the calls fit the operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qtuning_fast.attention.api import call_of as checked_call
from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.composed import context, vendors
from qtuning_fast.attention.composed.vendors import Attention, Vendor, cpu, cuda, packages, vendor_for
from qtuning_fast.attention.composed.vendors.base import folded

CUDNN, FLASH_2, EFFICIENT = cuda.CUDNN, cuda.FLASH_2, cuda.EFFICIENT
FLASH_3, FLASH_4 = packages.FLASH_3, packages.FLASH_4
ON_GPU = [CUDNN, FLASH_2, EFFICIENT, FLASH_3, FLASH_4]
TAKING_MASKS = [CUDNN, EFFICIENT]


# ---- who takes what -------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A GPU of some kind, and what is installed there. Calls made on it have no data."""

    def build(capability=(9, 0), cudnn=91900, flash_3=None, flash_4=None, other=None):
        for module in (cuda, packages):
            monkeypatch.setattr(module, "capability", lambda index: capability)
        monkeypatch.setattr(cuda, "cudnn_version", lambda: cudnn)
        monkeypatch.setattr(cuda, "other_flash_attention", lambda: other)
        monkeypatch.setattr(packages, "flash_3_missing", lambda: flash_3)
        monkeypatch.setattr(packages, "flash_4_missing", lambda: flash_4)

    build()
    monkeypatch.delenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", raising=False)
    with FakeTensorMode():
        yield build


def call_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> PrefixAttentionCall:
    return checked_call(
        query,
        key,
        value,
        prefix_key=key.new_empty(key.shape[1], 0, key.shape[3]),
        prefix_value=value.new_empty(value.shape[1], 0, value.shape[3]),
        gate=None,
        attn_mask=mask,
        is_causal=is_causal,
        scale=0.3,
    )


def fake_call(
    B=2,
    Hq=4,
    Hkv=2,
    N=16,
    M=16,
    D=64,
    Dv=None,
    dtype=torch.bfloat16,
    device="cuda",
    mask=None,
    padding=None,
    is_causal=False,
):
    """A call without data; `mask` and `padding` are the dtypes of masks."""
    return call_of(
        torch.empty(B, Hq, N, D, dtype=dtype, device=device),
        torch.empty(B, Hkv, M, D, dtype=dtype, device=device),
        torch.empty(B, Hkv, M, Dv or D, dtype=dtype, device=device),
        _fake_mask(mask, 1, 1, N, M, device=device) if padding is None else _fake_mask(padding, B, M, device=device),
        is_causal,
    )


def _fake_mask(dtype, *sizes, device):
    return None if dtype is None else torch.empty(sizes, dtype=dtype, device=device)


REFUSED = {
    "a CPU": (ON_GPU, {"device": "cpu"}, {}, "for CUDA devices"),
    "float64": (ON_GPU, {"dtype": torch.float64}, {}, "query is torch.float64"),
    "float32": ([CUDNN, FLASH_2, FLASH_3, FLASH_4], {"dtype": torch.float32}, {}, "query is torch.float32"),
    "head size": (ON_GPU, {"D": 16, "Dv": 264}, {}, "head sizes up to 256, got 16 and 264"),
    "samples": (ON_GPU, {"B": 65536}, {}, "up to 65535 samples"),
    "a mask": ([FLASH_2, FLASH_3, FLASH_4], {"mask": torch.bool}, {}, "no masks"),
    "a wide mask": (TAKING_MASKS, {"mask": torch.float32}, {}, "does not hold all values of torch.float32"),
    "float16's in bfloat16": (TAKING_MASKS, {"mask": torch.float16}, {}, "does not hold all values"),
    "cuDNN, large heads": ([CUDNN], {"D": 136}, {}, "up to 128, got 136"),
    "cuDNN, one query": ([CUDNN], {"N": 1}, {}, "neither one query nor one key"),
    "cuDNN, one key": ([CUDNN], {"M": 1}, {}, "neither one query nor one key"),
    "cuDNN, bottom-right": ([CUDNN], {"N": 4, "is_causal": True}, {}, "top-left, and N, M are 4, 16"),
    "cuDNN, both": ([CUDNN], {"is_causal": True, "mask": torch.bool}, {}, "causality or a mask"),
    "cuDNN, padding": ([CUDNN], {"padding": torch.bool}, {}, "written out for every query"),
    "cuDNN, half a tile": ([CUDNN], {"M": 192}, {}, "can return NaN"),
    "cuDNN, old": ([CUDNN], {}, {"cudnn": 91002}, "from cuDNN 9.15.1"),
    "cuDNN, none": ([CUDNN], {}, {"cudnn": 0}, "from cuDNN 9.15.1"),
    "cuDNN, Ampere": ([CUDNN], {}, {"capability": (8, 0)}, "9.0, 10.0 and 10.3"),
    "Turing": ([FLASH_2], {}, {"capability": (7, 5)}, "from 8.0 to 12.1, got 7.5"),
    "the next one": ([FLASH_2, EFFICIENT], {}, {"capability": (13, 0)}, "to 12.1, got 13.0"),
    "bfloat16 on Turing": ([EFFICIENT], {}, {"capability": (7, 5)}, "bfloat16 from compute capability 8.0"),
    "backward on Ada": ([FLASH_2], {"D": 200}, {"capability": (8, 9)}, "head size 200"),
    "another flash": ([FLASH_2], {}, {"other": "FA4"}, "FA4 has been activated"),
    "3 on Blackwell": ([FLASH_3], {}, {"capability": (10, 0)}, "capability 9.0"),
    "4 on Hopper": ([FLASH_4], {}, {}, "10.x only, got 9.0"),
    "4, head size": ([FLASH_4], {"D": 96}, {"capability": (10, 0)}, "64 and 128 only, got 96"),
    "3 is missing": ([FLASH_3], {}, {"flash_3": "not there"}, "not there"),
    "4 is missing": ([FLASH_4], {}, {"capability": (10, 0), "flash_4": "not there"}, "not there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_each_refuses(machine, case):
    who, options, installed, reason = REFUSED[case]
    machine(**installed)
    for vendor in who:
        assert reason in vendor.why_not(fake_call(**options)), vendor.name


TAKEN = {
    "plain": ([CUDNN, FLASH_2, EFFICIENT, FLASH_3], {}, {}),
    "causal": ([CUDNN, FLASH_2, EFFICIENT, FLASH_3], {"is_causal": True}, {}),
    "bottom-right": ([FLASH_2, EFFICIENT, FLASH_3], {"is_causal": True, "N": 3}, {}),
    "a mask": (TAKING_MASKS, {"mask": torch.bool}, {}),
    "causal, half a tile": ([CUDNN], {"N": 192, "M": 192, "is_causal": True}, {}),
    "its own float mask": (TAKING_MASKS, {"mask": torch.bfloat16}, {}),
    "a narrow mask": ([EFFICIENT], {"mask": torch.float16, "dtype": torch.float32}, {}),
    "odd head sizes": ([CUDNN, FLASH_2, EFFICIENT, FLASH_3], {"D": 30, "Dv": 17}, {}),
    "float32": ([EFFICIENT], {"dtype": torch.float32}, {}),
    "float16 on Turing": ([EFFICIENT], {"dtype": torch.float16}, {"capability": (7, 5)}),
    "Ada": ([FLASH_2, EFFICIENT], {"D": 256}, {"capability": (8, 9)}),
    "Blackwell": ([CUDNN, FLASH_2, EFFICIENT, FLASH_4], {}, {"capability": (10, 3)}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_each_takes(machine, case):
    who, options, installed = TAKEN[case]
    machine(**installed)
    for vendor in who:
        assert vendor.why_not(fake_call(**options)) is None, vendor.name


def test_on_rocm_all_refuse(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert all("ROCm" in vendor.why_not(fake_call()) for vendor in ON_GPU)


def test_determinism_leaves_pytorchs_deterministic_ones(machine):
    machine(capability=(9, 0))
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in CUDNN.why_not(fake_call())
        assert "deterministic" in FLASH_3.why_not(fake_call())
        assert vendor_for(fake_call()) is FLASH_2
        assert vendor_for(fake_call(mask=torch.bool)) is EFFICIENT
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("vendor", "name"), [(CUDNN, "cudnn"), (FLASH_2, "flash"), (EFFICIENT, "mem_efficient")], ids=lambda x: str(x)[:16]
)
def test_pytorchs_switches_are_respected(machine, vendor, name):
    switch = getattr(torch.backends.cuda, f"enable_{name}_sdp")
    switch(False)
    try:
        assert "switched off" in vendor.why_not(fake_call())
    finally:
        switch(True)
    assert vendor.why_not(fake_call()) is None


def test_a_setting_that_changes_cudnns_layouts_is_respected(machine, monkeypatch):
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert "AVOID_RECOMPILE" in CUDNN.why_not(fake_call())


def test_the_fastest_comes_first(machine):
    assert vendor_for(fake_call(device="cpu")) is vendors.CPU_FLASH
    assert vendor_for(fake_call()) is FLASH_3
    machine(flash_3="missing")
    assert vendor_for(fake_call()) is CUDNN
    assert vendor_for(fake_call(N=9)) is CUDNN
    assert vendor_for(fake_call(N=8)) is FLASH_2
    assert vendor_for(fake_call(N=8, mask=torch.bool)) is CUDNN
    assert vendor_for(fake_call(N=1, mask=torch.bool)) is EFFICIENT
    assert vendor_for(fake_call(N=12, is_causal=True)) is FLASH_2
    machine(capability=(10, 0))
    assert vendor_for(fake_call()) is FLASH_4
    machine(capability=(8, 6), flash_3="missing")
    assert vendor_for(fake_call()) is FLASH_2
    assert vendor_for(fake_call(dtype=torch.float32)) is EFFICIENT
    obstacles = vendor_for(fake_call(dtype=torch.float64))
    assert isinstance(obstacles, dict) and obstacles.keys() == {vendor.name for vendor in vendors.VENDORS}


def test_a_compiler_sees_through_the_choice(monkeypatch):
    constant = torch.compiler.assume_constant_result
    for module in (cuda, packages):
        monkeypatch.setattr(module, "capability", constant(lambda index: (9, 0)))
    monkeypatch.setattr(cuda, "cudnn_version", constant(lambda: 91900))
    torch._dynamo.reset()

    def name_length(query, key, value):
        vendor = vendor_for(call_of(query, key, value))
        return query * len(vendor.name)

    with FakeTensorMode():
        call = fake_call()
        compiled = torch.compile(name_length, fullgraph=True, backend="eager")
        assert compiled(call.query, call.key, call.value).shape == call.query.shape
    torch._dynamo.reset()


def test_packages_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert packages._flash_3_missing.__wrapped__() == "flash_attn_interface is not installed"
    assert packages._flash_4_missing.__wrapped__() == "flash_attn.cute is not installed"


def test_an_older_flash_attn_is_no_flash_attn_4(monkeypatch, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(packages, "find_spec", lambda name: spec)
    assert packages._flash_4_missing.__wrapped__() == "flash_attn.cute is not installed"
    (tmp_path / "cute").mkdir()
    (tmp_path / "cute" / "interface.py").touch()
    monkeypatch.setattr(packages, "import_module", lambda name: (_ for _ in ()).throw(ImportError("no cutlass")))
    assert packages._flash_4_missing.__wrapped__() == "flash_attn.cute cannot be used: no cutlass"
    interface = SimpleNamespace(_flash_attn_fwd=lambda q, k, v: None, _flash_attn_bwd=lambda q, k, v: None)
    monkeypatch.setattr(packages, "import_module", lambda name: interface)
    assert packages._flash_4_missing.__wrapped__() == "this version of flash_attn.cute is not known"


def flash_3_operators(forward_defaults=True):
    """torch.ops.flash_attn_3 as far as its schemas go."""

    def operator(required, optional, with_defaults=True):
        arguments = [SimpleNamespace(name=name, has_default_value=lambda: False) for name in required]
        arguments += [SimpleNamespace(name=name, has_default_value=lambda: with_defaults) for name in optional]
        return SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=arguments)))

    backward = ["dout", "q", "k", "v", "out", "softmax_lse"], ["dq", "dk", "dv", "softmax_scale", "is_causal"]
    return SimpleNamespace(
        fwd=operator(["q", "k", "v"], ["k_new", "softmax_scale", "is_causal"], forward_defaults),
        bwd=operator(*backward),
    )


def test_flash_attn_3_is_known_by_its_schemas(monkeypatch):
    flags = {}
    config = SimpleNamespace(CONFIG={"build_flags": flags})
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    monkeypatch.setattr(packages, "import_module", lambda name: config)
    monkeypatch.setattr(packages, "_flash_3", flash_3_operators)
    assert packages._flash_3_missing.__wrapped__() is None
    flags["FLASHATTENTION_DISABLE_BACKWARD"] = True
    assert packages._flash_3_missing.__wrapped__() == "flash_attn_interface was built without BACKWARD"
    flags.clear()
    monkeypatch.setattr(packages, "_flash_3", lambda: flash_3_operators(forward_defaults=False))
    assert "not known" in packages._flash_3_missing.__wrapped__()


# ---- our side of the calls is exact ---------------------------------------------------------------------------------


def scores_of(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    s = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if mask is not None:
        s = s + mask
    if is_causal:
        N, M = s.shape[-2:]
        s = s.masked_fill(~torch.ones(N, M, dtype=torch.bool, device=s.device).tril(M - N), -torch.inf)
    return s


def attend(q, k, v, mask, is_causal, scale):
    """Output and log-sum-exp; NaN for rows that see nothing, as the worst of vendors might report."""
    s = scores_of(q, k, mask, is_causal, scale)
    return s.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), s.logsumexp(-1)


def gradients(q, k, v, mask, is_causal, scale, o, lse, d_o):
    """The gradients of the part of a softmax that these keys are, given the whole one's output and log-sum-exp."""
    G = q.shape[1] // k.shape[1]
    p = (scores_of(q, k, mask, is_causal, scale) - lse[..., None]).exp()
    ds = p * (d_o @ v.repeat_interleave(G, 1).mT - (d_o * o).sum(-1, keepdim=True))
    dk, dv = (x.unflatten(1, (-1, G)).sum(2) for x in (scale * ds.mT @ q, p.mT @ d_o))
    return scale * ds @ k.repeat_interleave(G, 1), dk, dv


def assert_loadable(*tensors: Tensor, columns: int = 8) -> None:
    for x in tensors:
        assert x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and x.shape[-1] % columns == 0
        assert all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])


def transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


class StandIn:
    """The GPU's operators, with their conventions."""

    def _scaled_dot_product_cudnn_attention(
        self, q, k, v, bias, with_lse, dropout, is_causal, with_debug_mask, *, scale
    ):
        self.check_cudnn(q, k, v, bias, is_causal)
        assert with_lse and not with_debug_mask and dropout == 0
        o, lse = attend(q, k, v, bias, is_causal, scale)
        return torch.empty_like(q).copy_(o), lse[..., None], None, None, q.shape[2], k.shape[2], None, None, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, d_o, q, k, v, o, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, is_causal, *, scale
    ):
        self.check_cudnn(q, k, v, bias, is_causal)
        assert o.stride() == d_o.stride() == torch.empty_like(q).stride() and lse.shape == (*q.shape[:3], 1)
        assert (max_q, max_k, dropout) == (q.shape[2], k.shape[2], 0) and lse.is_contiguous()
        found = gradients(q, k, v, bias, is_causal, scale, o, lse.squeeze(-1), d_o)
        return tuple(torch.empty_like(x).copy_(d) for x, d in zip((q, k, v), found))

    def check_cudnn(self, q, k, v, bias, is_causal):
        assert_loadable(q, k, v)
        assert q.shape[-1] == v.shape[-1] and min(q.shape[2], k.shape[2]) > 1
        assert not is_causal or q.shape[2] == k.shape[2]
        if bias is not None:
            assert bias.shape[0] == len(q) and bias.shape[1] in (1, q.shape[1]) and 0 not in bias.stride()
            assert bias.shape[2:] == (q.shape[2], k.shape[2]) and bias.dtype == q.dtype
            assert all(s % 8 == 0 for s in bias.stride()[:-1])

    def _flash_attention_forward(self, q, k, v, cum_q, cum_k, max_q, max_k, dropout, is_causal, debug, *, scale):
        assert_loadable(q, k, v)
        assert q.shape[-1] == v.shape[-1] and (max_q, max_k, dropout) == (q.shape[1], k.shape[1], 0)
        assert cum_q is None and cum_k is None and not debug
        o, lse = attend(*transposed(q, k, v), None, is_causal, scale)
        return torch.empty_like(q).copy_(o.transpose(1, 2)), lse, None, None, None

    def _flash_attention_backward(
        self, d_o, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, dropout, is_causal, state, unused, *, scale
    ):
        assert_loadable(q, k, v, o, d_o)
        assert o.is_contiguous() and d_o.is_contiguous() and lse.is_contiguous()
        assert (max_q, max_k, dropout) == (q.shape[1], k.shape[1], 0) and state.dtype == torch.uint64
        o, d_o = transposed(o, d_o)
        found = gradients(*transposed(q, k, v), None, is_causal, scale, o, lse, d_o)
        return tuple(torch.empty_like(x).copy_(d) for x, d in zip((q, k, v), transposed(*found)))

    def _efficient_attention_forward(
        self, q, k, v, bias, cum_q, cum_k, max_q, max_k, dropout, mask_type, with_lse, *, scale
    ):
        self.check_efficient(q, k, v, bias, mask_type)
        assert cum_q is cum_k is max_q is max_k is None and dropout == 0 and with_lse
        o, lse = attend(*transposed(q, k, v), bias, mask_type == 2, scale)
        lse = torch.nn.functional.pad(lse, (0, -q.shape[1] % 32), value=torch.nan)
        return o.transpose(1, 2).contiguous(), lse, None, None, q.shape[1], k.shape[1]

    def _efficient_attention_backward(
        self, d_o, q, k, v, bias, o, cum_q, cum_k, max_q, max_k, lse, dropout, seed, offset, mask_type, d_bias, *, scale
    ):
        self.check_efficient(q, k, v, bias, mask_type)
        N = q.shape[1]
        assert o.is_contiguous() and d_o.is_contiguous() and not d_bias and (max_q, max_k) == (N, k.shape[1])
        assert lse.shape[-1] == N + -N % 32 and lse.is_contiguous() and (lse[..., N:] == torch.inf).all()
        o, d_o = transposed(o, d_o)
        found = gradients(*transposed(q, k, v), bias, mask_type == 2, scale, o, lse[..., :N], d_o)
        return *(x.contiguous() for x in transposed(*found)), None

    def check_efficient(self, q, k, v, bias, mask_type):
        assert_loadable(q, k, v)
        assert q.shape[2] == k.shape[2] == v.shape[2] and mask_type in (0, 2)
        if bias is not None:
            assert bias.shape == (len(q), q.shape[2], q.shape[1], k.shape[1]) and bias.dtype == q.dtype
            assert bias.stride(-1) == 1 and all(s % 8 == 0 for s in bias.stride()[:-1]) and bias.data_ptr() % 16 == 0

    def fwd(self, q, k, v, *, softmax_scale, is_causal):
        assert_loadable(q, k, v)
        o, lse = attend(*transposed(q, k, v), None, is_causal, softmax_scale)
        return o.transpose(1, 2).contiguous(), lse, None, None

    def bwd(self, d_o, q, k, v, o, lse, *, dq, dk, dv, softmax_scale, is_causal):
        assert_loadable(q, k, v, o, d_o)
        o, d_o = transposed(o, d_o)
        found = gradients(*transposed(q, k, v), None, is_causal, softmax_scale, o, lse, d_o)
        for room, d in zip((dq, dk, dv), transposed(*found)):
            room.copy_(d)

    def _flash_attn_fwd(self, q, k, v, *, softmax_scale, causal, return_lse):
        assert return_lse
        return self.fwd(q, k, v, softmax_scale=softmax_scale, is_causal=causal)[:2]

    def _flash_attn_bwd(self, q, k, v, o, d_o, lse, *, softmax_scale, causal):
        o, d_o = transposed(o, d_o)
        return transposed(*gradients(*transposed(q, k, v), None, causal, softmax_scale, o, lse, d_o))


@pytest.fixture
def stand_ins(monkeypatch):
    operators = StandIn()
    monkeypatch.setattr(cuda, "aten", operators)
    monkeypatch.setattr(packages, "_flash_3", lambda: operators)
    monkeypatch.setattr(packages, "_flash_4", lambda: operators)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x [B, H, N, D] lying otherwise in memory."""
    if layout == "by position":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":  # as one third of what a projection returns
        B, H, N, D = x.shape
        return x.new_zeros(B, N, 3, H, D).select(2, 1).copy_(x.transpose(1, 2)).transpose(1, 2)
    if layout == "unaligned":
        return x.new_zeros(x.numel() + 1).narrow(0, 1, x.numel()).view(x.shape).copy_(x)
    if layout == "by column":
        return x.mT.contiguous().mT
    if layout == "broadcast":
        return x[:1].expand(x.shape)
    return x


MASKS = {  # each as one of [B, Hq, N, M]
    "padding": (True, False, False),
    "by position": (False, False, True),
    "by head": (False, True, False),
    "whole": (True, True, True),
}


def real_call(
    B=2, Hq=4, Hkv=2, N=5, M=7, D=8, Dv=8, mask=None, is_bool=True, is_causal=False, layout="", dtype=torch.float64,
    device="cpu",
):  # fmt: skip
    """A call with data; with a mask, some query sees no key."""
    generator = torch.Generator().manual_seed(N * M + D)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    q, k, v = (laid_out(normal(*shape), layout) for shape in ((B, Hq, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv)))
    if mask is not None:
        shape = [n if whole else 1 for n, whole in zip((B, Hq, N), MASKS[mask])]
        visible = torch.rand(*shape, M, generator=generator) < 0.7
        visible[-1, -1, -1] = False
        values = torch.randn(visible.shape, generator=generator, dtype=torch.float64)
        mask = visible.to(device) if is_bool else values.masked_fill(~visible, -torch.inf).to(device, dtype)
    return call_of(q, k, v, mask, is_causal)


CASES = {
    "plain": {},
    "causal": {"N": 6, "M": 6, "is_causal": True},
    "bottom-right": {"N": 3, "is_causal": True},
    "more queries": {"N": 9, "M": 4, "is_causal": True},
    "no group": {"Hq": 2},
    "many queries": {"N": 37, "M": 40},
    "a whole block": {"N": 32},
    "one query": {"N": 1},
    "one query, one key": {"N": 1, "M": 1},
    "odd heads": {"D": 5, "Dv": 3},
    "wide values": {"D": 3, "Dv": 9},
    "by position": {"layout": "by position"},
    "packed": {"layout": "packed", "Hq": 2},
    "unaligned": {"layout": "unaligned"},
    "by column": {"layout": "by column"},
    "broadcast": {"layout": "broadcast"},
    "no samples": {"B": 0},
    "padding": {"mask": "padding"},
    "padding, one query": {"mask": "padding", "N": 1},
    "padding, many queries": {"mask": "padding", "N": 12, "M": 16},
    "by position mask": {"mask": "by position"},
    "by position mask, many queries": {"mask": "by position", "N": 12},
    "by head": {"mask": "by head", "N": 12},
    "whole": {"mask": "whole", "N": 12},
    "added": {"mask": "whole", "is_bool": False},
    "mask and causal": {"mask": "whole", "N": 7, "is_causal": True},
    "mask and bottom-right": {"mask": "padding", "N": 4, "is_causal": True},
    "mask and more queries": {"mask": "whole", "N": 11, "is_causal": True},
}


def does(vendor: Vendor, call: PrefixAttentionCall) -> bool:
    """Whether it is for a vendor on some GPU, but for dtype and device."""
    N, M, mask = call.query.shape[2], call.key.shape[2], cuda.mask_of(call)
    if vendor is CUDNN:
        return min(N, M) > 1 and not (call.is_causal and (N < M or mask is not None))
    return mask is None or vendor in TAKING_MASKS


def additive(call: PrefixAttentionCall) -> Tensor | None:
    mask = cuda.mask_of(call)
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.double() if mask.ndim == 4 else mask.double()[:, None, None]


def merged_with_more(o: Tensor, L: Tensor, seed: int = 3) -> None:
    """Made-up further keys merged in place into an output and its log-sum-exp; for some queries there are none."""
    generator = torch.Generator().manual_seed(seed)
    o_more, L_more = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(o.device) for x in (o, L))
    L_more[..., -1:] = -torch.inf
    total = torch.logaddexp(L.double(), L_more)
    finite = total.masked_fill(total.isneginf(), 0)
    w, w_more = ((x - finite).exp()[..., None] for x in (L.double(), L_more))
    o.copy_(o.double() * w + o_more * w_more)
    L.copy_(total)


def forward(call: PrefixAttentionCall, vendor: Vendor) -> tuple[Tensor, Tensor, Tensor]:
    """The context's output, log-sum-exp and rest."""
    return context.forward(call, vendor, keeps_rest=True)


def assert_right(vendor: Vendor, call: PrefixAttentionCall, tolerance: float, lse_tolerance: float) -> None:
    """Compares both passes, through `context`, with float64. A tolerance is a fraction of the largest value."""
    q, k, v = (x.double() for x in (call.query, call.key, call.value))
    options = (additive(call), call.is_causal, call.scale)
    o_exact, L_exact = attend(q, k, v, *options)
    o_exact = o_exact.nan_to_num(0.0)

    o, L, rest = forward(call, vendor)
    rooms = context.empty_outputs(call, vendor, keeps_rest=True)
    assert [x.stride() for x in (o, L, rest)] == [x.stride() for x in rooms] and o.dtype == q.to(o.dtype).dtype
    assert_close(o, o_exact, tolerance)
    assert (L.isneginf() == L_exact.isneginf()).all()
    assert_close(L.nan_to_num(neginf=0.0), L_exact.nan_to_num(neginf=0.0), lse_tolerance)

    merged_with_more(o, L)
    rest.zero_()
    d_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(o)
    L_exact = L.double().masked_fill(L.isneginf(), torch.inf)
    exact = gradients(q, k, v, *options, o.double(), L_exact, d_o.double())
    found = context.backward(call, vendor, o, L, rest, d_o)
    for x, x_exact, room in zip(found, exact, context.empty_gradients(call, vendor)):
        assert x.stride() == room.stride() and x.dtype == room.dtype
        assert_close(x, x_exact, tolerance)


def assert_close(x: Tensor, exact: Tensor, tolerance: float) -> None:
    assert x.shape == exact.shape and not x.isnan().any()
    if x.numel():
        error, largest = (x.double() - exact).abs().max().item(), exact.abs().max().item()
        assert error <= tolerance * max(largest, 1e-3), f"{error} of {largest}"


def pairs(who: list[Vendor], cases: Iterable[str]) -> list[Any]:
    """Each vendor with each case that it does."""
    return [
        pytest.param(vendor, case, id=f"{vendor.name}, {case}")
        for vendor in who
        for case in cases
        if does(vendor, real_call(**CASES[case]))
    ]


@pytest.mark.parametrize(("vendor", "case"), pairs(ON_GPU, CASES))
def test_both_passes_are_exact(stand_ins, vendor, case):
    assert_right(vendor, real_call(**CASES[case]), 1e-12, 1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if "layout" not in CASES[case]])
def test_the_cpus_own_is_exact(case):
    assert_right(cpu.CPU_FLASH, real_call(**CASES[case]), 1e-12, 1e-12)


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("N", [1, 5, 12])
def test_folding_is_attention(N, mask):
    call = real_call(N=N, mask=mask)
    x = Attention(call.query, call.key, call.value, additive(call), False, call.scale)
    y = folded(x)
    if mask in ("by position", "by head") and N > 8:
        assert y is x
        return
    assert y.query.shape == (2, 2, 2 * N, 8) and y.key is x.key
    o, L = attend(*y)
    o_exact, L_exact = attend(*x)
    torch.testing.assert_close(o.reshape(o_exact.shape), o_exact, equal_nan=True)
    torch.testing.assert_close(L.reshape(L_exact.shape), L_exact)


def test_what_cannot_be_folded_is_left_alone():
    for options in ({"Hq": 2}, {"N": 7, "is_causal": True}):
        call = real_call(**options)
        x = Attention(call.query, call.key, call.value, None, call.is_causal, call.scale)
        assert folded(x) is x


def test_a_cache_is_read_where_it_lies(stand_ins, monkeypatch):
    """Decoding copies and repeats no keys: they reach the kernel as they are."""
    call = real_call(N=1, M=32, mask="padding", layout="by position")
    seen = []
    kernel = StandIn._efficient_attention_forward

    def spy(self, q, k, v, *rest, **options):
        seen.extend((k.data_ptr(), v.data_ptr()))
        return kernel(self, q, k, v, *rest, **options)

    monkeypatch.setattr(StandIn, "_efficient_attention_forward", spy)
    forward(call, EFFICIENT)
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


FITTING = ["plain", "causal", "packed", "odd heads", "one query", "padding", "whole"]


@pytest.mark.parametrize(("vendor", "case"), pairs([CUDNN, FLASH_2, EFFICIENT], FITTING))
def test_calls_fit_pytorchs_operators(monkeypatch, vendor, case):
    call = real_call(**CASES[case], dtype=torch.bfloat16)
    monkeypatch.setattr(cuda, "aten", MetaKernels())
    monkeypatch.setattr(cuda, "starts_aligned", lambda x: x.storage_offset() * x.element_size() % 16 == 0)
    q, k, v, mask = (None if x is None else x.to("meta") for x in (call.query, call.key, call.value, additive(call)))
    x = Attention(q, k, v, mask, call.is_causal, call.scale)
    o, L = vendor.forward(x)
    assert o.shape == (*q.shape[:3], v.shape[-1]) and o.dtype == q.dtype
    assert L.shape == q.shape[:3] and L.dtype == torch.float32
    found = vendor.backward(x, o, L, torch.empty_like(o))
    assert [d.shape for d in found] == [y.shape for y in (q, k, v)]
