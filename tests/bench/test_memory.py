"""Memory is what a step takes at the most; what cannot fit is not tried."""

import pytest
import torch

from qtuning_fast.bench import measure, memory
from qtuning_fast.bench.memory import too_large
from qtuning_fast.bench.peers import PEERS, Peer
from qtuning_fast.bench.shapes import MINILM_CPU, SHAPES, TINY


def test_the_peak_of_a_step_counts_what_is_taken_and_given_back(monkeypatch):
    right = PEERS["eager"].attend

    def greedy(call):
        # 132 MiB: the kernel counts a thread's pages in portions, so that the last of them may be missing.
        return right(call) + torch.ones(33 << 20 if len(call.query) == MINILM_CPU.B else 1).sum() * 0

    modest = memory.peak(MINILM_CPU, "composed", "cpu", torch.float32)
    if modest is None:
        pytest.skip("no /proc/self/clear_refs")
    monkeypatch.setitem(PEERS, "eager", Peer("", greedy))
    assert memory.peak(MINILM_CPU, "eager", "cpu", torch.float32) > 128 << 20 > modest


def test_what_would_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (75 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1 << 30)
    long, bf16 = SHAPES["long"], torch.bfloat16
    assert too_large(long, "eager", "cuda", bf16) == "not tried: it takes about 198 GiB, 77 are free"
    assert not too_large(SHAPES["llama-8b"], "eager", "cuda", bf16) and not too_large(long, "fused", "cuda", bf16)
    monkeypatch.setattr(measure, "too_large", lambda *arguments: "not tried: too large")
    row = measure.measure(TINY, ["eager"], "cpu", turns=measure.REHEARSED)["rows"]["eager"]
    assert row["error"] == "not tried: too large" and row["step"]["eager"] is None and not row["errors"]


def test_a_process_knows_what_it_holds():
    held = memory.resident_bytes()
    assert held is None or held > 10 << 20
