"""A GPU that is not there: what it would take, and stand-ins for its operators."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qtuning_fast.attention.composed.vendors import cuda, packages

_spec = importlib.util.spec_from_file_location("vendor_calls", Path(__file__).with_name("calls.py"))
assert _spec is not None and _spec.loader is not None
_calls = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)  # where compilers look for its functions
_spec.loader.exec_module(_calls)


@pytest.fixture(scope="session")
def calls():
    """The module calls.py beside this one: this folder is no package."""
    return _calls


def pytest_generate_tests(metafunc):
    """Each of a file's VENDORS with each case that it does, of all or of the fitting ones."""
    for name, cases in (("case", _calls.CASES), ("fitting", _calls.FITTING)):
        if name in metafunc.fixturenames and hasattr(metafunc.module, "VENDORS"):
            metafunc.parametrize(("vendor", name), _calls.pairs(metafunc.module.VENDORS, cases))


@pytest.fixture
def machine(monkeypatch):
    """A GPU of some kind, and what is installed there. Calls made on it have no data."""

    def build(capability=(9, 0), cudnn=91900, flash_3=None, flash_4=None, other=None):
        for module in (cuda, packages):
            monkeypatch.setattr(module, "capability", lambda index: capability)
        monkeypatch.setattr(cuda, "cudnn_version", lambda: cudnn)
        monkeypatch.setattr(cuda, "other_flash_attention", lambda: other)
        monkeypatch.setattr(packages, "flash_3_missing", lambda windows: flash_3)
        monkeypatch.setattr(packages, "flash_4_missing", lambda: flash_4)

    build()
    monkeypatch.delenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", raising=False)
    with FakeTensorMode():
        yield build


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
        o, lse = _calls.attend(q, k, v, bias, is_causal, scale)
        return torch.empty_like(q).copy_(o), lse[..., None], None, None, q.shape[2], k.shape[2], None, None, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, d_o, q, k, v, o, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, is_causal, *, scale
    ):
        self.check_cudnn(q, k, v, bias, is_causal)
        assert o.stride() == d_o.stride() == torch.empty_like(q).stride() and lse.shape == (*q.shape[:3], 1)
        assert (max_q, max_k, dropout) == (q.shape[2], k.shape[2], 0) and lse.is_contiguous()
        found = _calls.gradients(q, k, v, bias, is_causal, scale, o, lse.squeeze(-1), d_o)
        return tuple(torch.empty_like(x).copy_(d) for x, d in zip((q, k, v), found))

    def check_cudnn(self, q, k, v, bias, is_causal):
        assert_loadable(q, k, v)
        assert q.shape[-1] == v.shape[-1] and min(q.shape[2], k.shape[2]) > 1
        assert not is_causal or q.shape[2] == k.shape[2]
        if bias is not None:
            assert bias.shape[0] == len(q) and bias.shape[1] in (1, q.shape[1]) and 0 not in bias.stride()
            assert bias.shape[2:] == (q.shape[2], k.shape[2]) and bias.dtype == q.dtype
            assert all(s % 8 == 0 for s in bias.stride()[:-1])

    def _flash_attention_forward(
        self, q, k, v, cum_q, cum_k, max_q, max_k, dropout, is_causal, debug, *, scale, window_size_left,
        window_size_right,
    ):  # fmt: skip
        assert_loadable(q, k, v)
        assert q.shape[-1] == v.shape[-1] and (max_q, max_k, dropout) == (q.shape[1], k.shape[1], 0)
        assert cum_q is None and cum_k is None and not debug
        window = self.window(q, k, is_causal, window_size_left, window_size_right)
        o, lse = _calls.attend(*transposed(q, k, v), window, is_causal, scale)
        return torch.empty_like(q).copy_(o.transpose(1, 2)), lse, None, None, None

    def _flash_attention_backward(
        self, d_o, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, dropout, is_causal, state, unused, *, scale,
        window_size_left, window_size_right,
    ):  # fmt: skip
        assert_loadable(q, k, v, o, d_o)
        assert o.is_contiguous() and d_o.is_contiguous() and lse.is_contiguous()
        assert (max_q, max_k, dropout) == (q.shape[1], k.shape[1], 0) and state.dtype == torch.uint64
        o, d_o = transposed(o, d_o)
        window = self.window(q, k, is_causal, window_size_left, window_size_right)
        found = _calls.gradients(*transposed(q, k, v), window, is_causal, scale, o, lse, d_o)
        return tuple(torch.empty_like(x).copy_(d) for x, d in zip((q, k, v), transposed(*found)))

    def window(self, q, k, is_causal, left, right):
        """The additive mask of a window around the bottom-right diagonal; None without one."""
        N, M = q.shape[1], k.shape[1]
        if left is None and right is None:
            return None
        assert not is_causal and N <= M
        reached = torch.ones(N, M, dtype=torch.bool)
        reached = reached if right is None else reached.tril(M - N + right)
        return _calls.of_window(reached if left is None else reached.triu(M - N - left))

    def _efficient_attention_forward(
        self, q, k, v, bias, cum_q, cum_k, max_q, max_k, dropout, mask_type, with_lse, *, scale
    ):
        self.check_efficient(q, k, v, bias, mask_type)
        assert cum_q is cum_k is max_q is max_k is None and dropout == 0 and with_lse
        o, lse = _calls.attend(*transposed(q, k, v), bias, mask_type == 2, scale)
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
        found = _calls.gradients(*transposed(q, k, v), bias, mask_type == 2, scale, o, lse[..., :N], d_o)
        return *(x.contiguous() for x in transposed(*found)), None

    def check_efficient(self, q, k, v, bias, mask_type):
        assert_loadable(q, k, v)
        assert q.shape[2] == k.shape[2] == v.shape[2] and mask_type in (0, 2)
        if bias is not None:
            assert bias.shape == (len(q), q.shape[2], q.shape[1], k.shape[1]) and bias.dtype == q.dtype
            assert bias.stride(-1) == 1 and all(s % 8 == 0 for s in bias.stride()[:-1]) and bias.data_ptr() % 16 == 0

    def fwd(self, q, k, v, *, softmax_scale, is_causal, window_size_left=-1, window_size_right=-1):
        assert_loadable(q, k, v)
        window = self.window_of_3(q, k, is_causal, window_size_left, window_size_right)
        o, lse = _calls.attend(*transposed(q, k, v), window, is_causal, softmax_scale)
        return o.transpose(1, 2).contiguous(), lse, None, None

    def bwd(
        self, d_o, q, k, v, o, lse, *, dq, dk, dv, softmax_scale, is_causal, window_size_left, window_size_right
    ):  # fmt: skip
        assert_loadable(q, k, v, o, d_o)
        o, d_o = transposed(o, d_o)
        window = self.window_of_3(q, k, is_causal, window_size_left, window_size_right)
        found = _calls.gradients(*transposed(q, k, v), window, is_causal, softmax_scale, o, lse, d_o)
        for room, d in zip((dq, dk, dv), transposed(*found)):
            room.copy_(d)

    def window_of_3(self, q, k, is_causal, left, right):
        return self.window(q, k, is_causal, *(None if side == -1 else side for side in (left, right)))

    def _flash_attn_fwd(self, q, k, v, *, softmax_scale, causal, return_lse):
        assert return_lse
        return self.fwd(q, k, v, softmax_scale=softmax_scale, is_causal=causal)[:2]

    def _flash_attn_bwd(self, q, k, v, o, d_o, lse, *, softmax_scale, causal):
        o, d_o = transposed(o, d_o)
        return transposed(*_calls.gradients(*transposed(q, k, v), None, causal, softmax_scale, o, lse, d_o))


@pytest.fixture
def stand_ins(monkeypatch):
    operators = StandIn()
    monkeypatch.setattr(cuda, "aten", operators)
    monkeypatch.setattr(packages, "_flash_3", lambda: operators)
    monkeypatch.setattr(packages, "_flash_4", lambda: operators)
    return operators
