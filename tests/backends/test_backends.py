"""Which backend a call gets."""

import inspect
import subprocess
import sys

import pytest

from qtuning_fast import backends, explain_backend, prefix_attention
from qtuning_fast.backends import Backend
from qtuning_fast.reference import attend


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("QTUNING_FAST_BACKEND", raising=False)


def test_auto_says_what_it_picks_and_why_not_the_others(make_call):
    choice = explain_backend(**make_call())
    assert choice.backend == "reference" and choice.rejected.keys() == {"fused", "composed"}
    text = str(choice)
    assert text.startswith("reference: the first of ") and "not fused: its Triton kernels" in text


def test_explaining_takes_the_arguments_of_the_call(make_call):
    assert inspect.signature(explain_backend).parameters == inspect.signature(prefix_attention).parameters
    with pytest.raises(ValueError, match="gate must be"):
        explain_backend(**make_call(gate="step"))


@pytest.mark.parametrize("attend_or_explain", [prefix_attention, explain_backend])
@pytest.mark.parametrize(("name", "missing"), [("fused", "float32"), ("composed", "context and prefix parts")])
def test_what_a_backend_cannot_do_is_refused_by_name(make_call, attend_or_explain, name, missing):
    with pytest.raises(NotImplementedError, match=f"'{name}'.*{missing}.*: reference"):
        attend_or_explain(**make_call(), backend=name)


def test_fused_says_when_triton_is_missing_too(make_call, monkeypatch):
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(NotImplementedError, match="triton is not installed"):
        prefix_attention(**make_call(), backend="fused")


def test_importing_the_package_does_not_import_triton():
    code = "import sys, torch; had = {*sys.modules}; import qtuning_fast; assert 'triton' not in {*sys.modules} - had"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_environment_stands_in_for_auto_only(make_call, monkeypatch):
    monkeypatch.setenv("QTUNING_FAST_BACKEND", "reference")
    assert "QTUNING_FAST_BACKEND" in explain_backend(**make_call()).reason
    monkeypatch.setenv("QTUNING_FAST_BACKEND", "composed")
    with pytest.raises(NotImplementedError, match="QTUNING_FAST_BACKEND"):
        prefix_attention(**make_call())
    assert explain_backend(**make_call(), backend="reference").reason == "asked for by name"
    monkeypatch.setenv("QTUNING_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"QTUNING_FAST_BACKEND must be one of auto, fused.*'fastest'"):
        prefix_attention(**make_call())
    monkeypatch.setenv("QTUNING_FAST_BACKEND", "")
    assert explain_backend(**make_call()).backend == "reference"


def test_auto_takes_the_first_that_can_do_the_call(make_call, monkeypatch):
    def no_causal(call):
        return "it knows no causality" if call.is_causal else None

    def all_zero(call):
        output, lse = attend(call)
        return output * 0, lse

    monkeypatch.setitem(backends.BACKENDS, "composed", Backend("composed", no_causal, all_zero))
    choice = explain_backend(**make_call())
    assert choice.backend == "composed" and choice.rejected["reference"] == "composed comes first"
    assert (prefix_attention(**make_call()) == 0).all() and (prefix_attention(**make_call(is_causal=True)) != 0).all()
    assert explain_backend(**make_call(is_causal=True)).rejected["composed"] == "it knows no causality"
    with pytest.raises(NotImplementedError, match="it knows no causality"):
        prefix_attention(**make_call(is_causal=True), backend="composed")
    by_name = explain_backend(**make_call(), backend="reference")
    assert by_name.rejected["composed"] == "reference was asked for by name"
