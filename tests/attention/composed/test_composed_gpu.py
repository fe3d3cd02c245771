"""The composed backend on a GPU, whoever does the context: as exact as plain PyTorch, deterministic when asked to be,
under CUDA graphs, and with memory that does not grow with the samples that share a prefix."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import explain_backend, prefix_attention
from qtuning_fast.attention.common import GATES

pytestmark = pytest.mark.gpu
BACKEND = "composed"

BASE = {"B": 2, "Hkv": 2, "G": 2, "N": 65, "M": 63, "P": 17, "D": 64, "Dv": 64}
WHOLE = {"rank_key": 1, "rank_value": 1, "n_shared": 2, "gate_shape": "head", "prefix_dtype": torch.float32}
MASKS = ["padding bool", "padding float", "full bool", "full float"]
REAL = {
    "bert-base": {"B": 32, "Hkv": 12, "G": 1, "N": 128, "M": 128, "P": 60},
    "bert-base-512": {"B": 4, "Hkv": 12, "G": 1, "N": 512, "M": 512, "P": 60, "mask": "padding bool"},
    "llama-8b": {"B": 1, "Hkv": 8, "G": 4, "N": 1024, "M": 1024, "D": 128, "Dv": 128, "P": 100, "is_causal": True},
    "chunked-prefill": {
        "B": 2,
        "Hkv": 8,
        "G": 4,
        "N": 256,
        "M": 1024,
        "D": 128,
        "Dv": 128,
        "P": 512,
        "is_causal": True,
    },
    "mixed-tasks": {"B": 32, "T": 8, "lengths": True, "Hkv": 12, "G": 1, "N": 128, "M": 128, "P": 60},
    "decode": {"B": 64, "Hkv": 8, "G": 4, "N": 1, "M": 300, "D": 128, "Dv": 128, "P": 512},
    "decode-tasks": {"B": 64, "T": 16, "Hkv": 8, "G": 4, "N": 1, "M": 300, "D": 128, "Dv": 128, "P": 512},
    "speculative": {"B": 8, "T": 4, "Hkv": 8, "G": 4, "N": 5, "M": 300, "P": 100, "is_causal": True},
}

FOLDED = {
    "odd": {"N": 33, "M": 17, "P": 19, "D": 24, "Dv": 32},
    "causal": {"N": 130, "M": 200, "P": 100, "is_causal": True},
    "bank": {"B": 9, "T": 4, "lengths": True, "gate_shape": "task, head", "mask": "padding bool"},
    "decoding": {"B": 9, "N": 1, "M": 300, "P": 127},
    "decoding-tasks": {"B": 9, "T": 4, "N": 1, "P": 127, "gate_shape": "task, head"},
    "nothing-cached": {"N": 1, "M": 0},
}


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def step(arguments, leaves):
    output, lse = prefix_attention(**arguments, return_lse=True)
    return [output, lse, *torch.autograd.grad(output, list(leaves(arguments).values()), torch.ones_like(output))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [*GATES, None])
def test_every_gate(assert_accurate, gate, dtype):
    assert_accurate("composed", device="cuda", gate=gate, dtype=dtype, **BASE | WHOLE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(assert_accurate, mask, is_causal):
    options = {"mask": mask, "is_causal": is_causal, "bias": True, "dtype": torch.bfloat16}
    assert_accurate("composed", device="cuda", **BASE | WHOLE | options)


@pytest.mark.parametrize("D", [16, 20, 32, 80, 96, 128, 256])
def test_every_head_size(assert_accurate, D):
    options = {"dtype": torch.bfloat16, "is_causal": True, "D": D, "Dv": min(D, 64)}
    assert_accurate("composed", device="cuda", **BASE | WHOLE | options)


@pytest.mark.parametrize("N", [0, 1, 17, 64, 1000])
@pytest.mark.parametrize(("M", "P"), [(0, 65), (1, 127), (129, 0), (300, 64)])
def test_odd_sizes(assert_accurate, N, M, P):
    sizes = {"N": N, "M": M, "P": P, "Dv": 32, "n_shared": min(2, P), "is_causal": N % 2 == 0}
    assert_accurate("composed", device="cuda", dtype=torch.bfloat16, **BASE | WHOLE | sizes)


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
@pytest.mark.parametrize("options", FOLDED.values(), ids=FOLDED)
def test_folded_prefixes(assert_accurate, gate, options):
    """Without weights no score is rounded, so the GPU's tanh is all that keeps the log-sum-exp from being exact."""
    own = {"dtype": torch.bfloat16, "gate": gate, "gate_shape": "head"}
    assert_accurate("composed", device="cuda", **BASE | own | options)


@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(assert_accurate, shape):
    options = {"draws": 4, "dtype": torch.bfloat16, "n_shared": 10}
    assert_accurate("composed", device="cuda", **BASE | WHOLE | options | REAL[shape])


def test_auto_picks_it_for_long_contexts_and_for_decoding(on_gpu):
    for sizes in ({"N": 4096, "M": 4096}, {"N": 1, "M": 100}):
        choice = explain_backend(**on_gpu(**BASE | sizes) | {"backend": "auto"})
        print(choice)
        assert choice.backend == "composed" and "context by" in choice.reason


@pytest.mark.parametrize("shape", ["bert-base", "llama-8b", "mixed-tasks", "decode-tasks"])
def test_the_same_bits_again_when_asked_to(on_gpu, leaves, deterministic, shape):
    arguments = on_gpu(**BASE | WHOLE | REAL[shape])
    first = step(arguments, leaves)
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, step(arguments, leaves)))


@pytest.mark.parametrize("shape", ["decode", "decode-tasks", "speculative"])
def test_a_decoding_step_under_a_graph(on_gpu, shape):
    with torch.no_grad():
        arguments = on_gpu(**BASE | WHOLE | REAL[shape])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            prefix_attention(**arguments)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = prefix_attention(**arguments)
        for name in ("query", "key", "prefix_key"):
            arguments[name].normal_()
        if "T" in REAL[shape]:
            arguments["prefix_index"].random_(REAL[shape]["T"])
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, prefix_attention(**arguments), rtol=2e-2, atol=1e-3)


def test_memory_does_not_grow_with_the_samples_that_share_a_prefix(on_gpu):
    """Beyond what the batch's own queries take: its output, and copies of it."""
    extra = []
    with torch.no_grad():
        for B in (8, 64):
            arguments = on_gpu(
                **BASE | WHOLE | {"B": B, "Hkv": 8, "G": 4, "N": 1, "M": 64, "P": 2048, "D": 128, "Dv": 128}
            )
            output = prefix_attention(**arguments)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            prefix_attention(**arguments)
            extra.append(torch.cuda.max_memory_allocated() - before - 8 * output.nbytes)
    one_expanded = 2 * 8 * 2048 * 128 * 2
    assert all(x < one_expanded for x in extra)


def test_memory_grows_with_queries_not_with_scores(on_gpu, leaves):
    peaks = []
    for N in (4096, 8192, 16384):
        arguments = on_gpu(is_causal=True, **WHOLE | BASE | {"B": 1, "N": N, "M": N})
        step(arguments, leaves)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(arguments, leaves)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[-1] < N * N
    assert peaks[2] < 2.5 * peaks[1] < 6.25 * peaks[0]


def test_a_compiled_step(on_gpu, leaves, deterministic):
    arguments = on_gpu(**BASE | WHOLE)
    output = torch.compile(lambda: prefix_attention(**arguments), fullgraph=True)()
    assert torch.equal(output, prefix_attention(**arguments))
    inputs = list(leaves(arguments).values())
    expected = step(arguments, leaves)[2:]
    for grad, want in zip(torch.autograd.grad(output, inputs, torch.ones_like(output)), expected):
        assert torch.equal(grad, want)
