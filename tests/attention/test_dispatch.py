"""Which backend a call gets."""

import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qtuning_fast import explain_backend, prefix_attention
from qtuning_fast.attention import backend_order, dispatch, native
from qtuning_fast.attention.backend_order import Rule
from qtuning_fast.attention.dispatch import Backend
from qtuning_fast.attention.reference import attend


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("QTUNING_FAST_BACKEND", raising=False)


def test_auto_says_what_it_picks_and_why_not_the_others(make_call):
    choice = explain_backend(**make_call(N=300, M=300))
    assert choice.backend == "composed" and choice.rejected.keys() == {"fused", "native", "reference"}
    text = str(choice)
    assert text.startswith("composed: native would be the fastest by the table: on cpu")
    assert "not fused: its Triton kernels" in text and "not native: its C++ kernels compute in float32" in text
    assert "context by PyTorch's flash attention for CPUs" in text and "not reference: composed comes first" in text


@pytest.mark.native
def test_on_a_cpu_auto_picks_the_native_kernels(make_call):
    choice = explain_backend(**make_call(N=300, M=300, dtype=torch.float32))
    assert choice.backend == "native" and choice.rejected["composed"] == "native comes first"


def test_where_the_native_kernels_do_not_compile_the_next_rule_decides(make_call, monkeypatch):
    monkeypatch.setattr(native, "_obstacle", lambda gate: "no C++ compiler is found")
    medium = explain_backend(**make_call(B=1, N=48, M=48, dtype=torch.float32))
    assert medium.backend == "reference" and medium.rejected["native"] == "no C++ compiler is found"
    large = explain_backend(**make_call(N=300, M=300, dtype=torch.float32))
    assert large.backend == "composed" and large.rejected["reference"] == "composed comes first"
    with pytest.raises(NotImplementedError, match=r"'native', requested by name.* no C.. .*composed, reference$"):
        prefix_attention(**make_call(dtype=torch.float32), backend="native")


def test_explaining_takes_the_arguments_of_the_call(make_call):
    assert inspect.signature(explain_backend).parameters == inspect.signature(prefix_attention).parameters
    with pytest.raises(ValueError, match="gate must be"):
        explain_backend(**make_call(gate="step"))


@pytest.mark.parametrize("attend_or_explain", [prefix_attention, explain_backend])
def test_what_a_backend_cannot_do_is_refused_by_name(make_call, attend_or_explain):
    with pytest.raises(NotImplementedError, match=r"'fused'.*float32.*: composed, reference"):
        attend_or_explain(**make_call(), backend="fused")


def test_a_cap_on_scores_is_left_to_the_next_that_can(make_call, monkeypatch):
    capped = make_call(softcap=30, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"'composed', .*: softcap: "):
        prefix_attention(**capped, backend="composed")
    monkeypatch.setattr(backend_order, "TABLE", (Rule("cpu", "composed"),))
    explained = explain_backend(**capped)
    assert explained.backend == "reference" and explained.reason.startswith("composed would be the fastest")
    assert explained.rejected["composed"].startswith("softcap: ")
    assert torch.equal(prefix_attention(**capped), prefix_attention(**capped, backend="reference"))


def test_fused_says_when_triton_is_missing_too(make_call, monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(NotImplementedError, match="triton is not installed"):
        prefix_attention(**make_call(), backend="fused")


def test_importing_the_package_does_not_import_triton():
    code = "import sys, torch; had = {*sys.modules}; import qtuning_fast; assert 'triton' not in {*sys.modules} - had"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_environment_stands_in_for_auto_only(make_call, monkeypatch):
    monkeypatch.setenv("QTUNING_FAST_BACKEND", "reference")
    assert "QTUNING_FAST_BACKEND" in explain_backend(**make_call()).reason
    monkeypatch.setenv("QTUNING_FAST_BACKEND", "fused")
    with pytest.raises(NotImplementedError, match="QTUNING_FAST_BACKEND"):
        prefix_attention(**make_call())
    assert explain_backend(**make_call(), backend="reference").reason == "requested by name"
    monkeypatch.setenv("QTUNING_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"QTUNING_FAST_BACKEND must be one of auto, fused.*'fastest'"):
        prefix_attention(**make_call())
    monkeypatch.setenv("QTUNING_FAST_BACKEND", "")
    assert "by the table" in explain_backend(**make_call()).reason


def test_auto_takes_the_next_when_the_fastest_cannot_do_the_call(make_call, monkeypatch):
    def no_causal(call):
        return "it knows no causality" if call.is_causal else None

    def all_zero(call):
        output, lse = attend(call)
        return output * 0, lse

    monkeypatch.setattr(backend_order, "TABLE", (Rule("cpu", "composed"),))
    monkeypatch.setitem(dispatch.BACKENDS, "composed", Backend("composed", no_causal, all_zero))
    explained = explain_backend(**make_call())
    assert explained.backend == "composed" and explained.rejected["reference"] == "composed comes first"
    assert (prefix_attention(**make_call()) == 0).all() and (prefix_attention(**make_call(is_causal=True)) != 0).all()
    causal = explain_backend(**make_call(is_causal=True))
    assert causal.rejected["composed"] == "it knows no causality" and causal.reason.startswith("composed would be")
    with pytest.raises(NotImplementedError, match="it knows no causality"):
        prefix_attention(**make_call(is_causal=True), backend="composed")
    by_name = explain_backend(**make_call(), backend="reference")
    assert by_name.rejected["composed"] == "reference was requested by name"


def test_on_a_gpu_the_composed_backend_needs_triton(monkeypatch):
    call = SimpleNamespace(query=SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch._why_not("composed", call) == "triton is not installed"
