"""The fused kernels on a GPU: as exact as plain PyTorch, the same bits every time, and good guests of CUDA."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import explain_backend, prefix_attention
from qtuning_fast.attention.common import GATES

pytestmark = pytest.mark.gpu
BACKEND = "fused"

PRECISIONS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
}
BASE = {"B": 2, "Hkv": 2, "G": 2, "N": 65, "M": 63, "P": 17, "D": 64, "Dv": 64}
WHOLE = {"rank_key": 1, "rank_value": 1, "n_shared": 2, "gate_shape": "head", "prefix_dtype": torch.float32}
MASKS = ["padding bool", "padding float", "full bool", "full float", "shared float + padding bool"]
DROP_IN = {
    "window": {"window": (100, 60), "N": 400, "M": 400},
    "causal window": {"window": (127, 0), "is_causal": True, "N": 400, "M": 450},
    "packed": {"packed": ([300, 1, 128, 0, 77], [300, 40, 128, 9, 77]), "is_causal": True, "sink": True},
    "packed windows": {"packed": ([300, 90], [300, 90]), "window": (60, 60)},
    "packed tasks": {"packed": ([200, 130, 70], [200, 130, 70]), "T": 2, "lengths": True, "gate_shape": "task, head"},
    "narrow window": {"window": (3, 2), "N": 200, "M": 130},
    "decoding": {"window": (50, 0), "N": 1, "M": 300},
    "sinks": {"sink": True, "is_causal": True, "window": (127, 0), "N": 300, "M": 300},
    "sinks of tasks": {"sink": True, "B": 9, "T": 4, "lengths": True, "gate_shape": "task, head"},
    "capped": {"softcap": 30.0, "is_causal": True, "window": (200, 0), "N": 400, "M": 400},
    "capped under masks": {"softcap": 2.0, "mask": "shared float + padding bool", "bias": True},
}
REAL = {
    "minilm": {"B": 64, "Hkv": 12, "G": 1, "N": 128, "M": 128, "D": 32, "Dv": 32, "P": 60, "mask": "padding bool"},
    "bert-base": {"B": 32, "Hkv": 12, "G": 1, "N": 128, "M": 128, "D": 64, "Dv": 64, "P": 60},
    "bert-base-512": {"B": 4, "Hkv": 12, "G": 1, "N": 512, "M": 512, "D": 64, "Dv": 64, "P": 60},
    "vit-b16": {"B": 32, "Hkv": 12, "G": 1, "N": 197, "M": 197, "D": 64, "Dv": 64, "P": 20},
    "llama-8b": {"B": 1, "Hkv": 8, "G": 4, "N": 1024, "M": 1024, "D": 128, "Dv": 128, "P": 100, "is_causal": True},
    "mixed-tasks": {
        "B": 32,
        "T": 8,
        "lengths": True,
        "Hkv": 12,
        "G": 1,
        "N": 128,
        "M": 128,
        "D": 64,
        "Dv": 64,
        "P": 60,
    },
}

FOLDED = {
    "odd": {"N": 33, "M": 17, "P": 19, "D": 24, "Dv": 32},
    "causal": {"N": 130, "M": 200, "P": 100, "is_causal": True},
    "bank": {"B": 9, "T": 4, "lengths": True, "gate_shape": "task, head", "mask": "padding bool"},
    "decoding": {"B": 9, "N": 1, "M": 300, "P": 127},
    "decoding-tasks": {"B": 9, "T": 4, "N": 1, "P": 127, "gate_shape": "task, head"},
    "nothing-cached": {"N": 1, "M": 0},
}


@pytest.fixture(params=PRECISIONS)
def dtype(request):
    """The dtype; for float32 with matrix products set to IEEE arithmetic or to TF32."""
    chosen, precision = PRECISIONS[request.param]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    yield chosen
    torch.set_float32_matmul_precision(before)


def step(arguments, leaves, d_output=None):
    output, lse = prefix_attention(**arguments, return_lse=True)
    d_output = torch.ones_like(output) if d_output is None else d_output
    return [output, lse, *torch.autograd.grad(output, list(leaves(arguments).values()), d_output)]


@pytest.mark.parametrize("gate", [*GATES, None])
def test_every_gate(assert_accurate, gate, dtype):
    assert_accurate("fused", device="cuda", gate=gate, dtype=dtype, **BASE | WHOLE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(assert_accurate, mask, is_causal):
    assert_accurate(
        "fused", device="cuda", dtype=torch.bfloat16, mask=mask, is_causal=is_causal, bias=True, **BASE | WHOLE
    )


@pytest.mark.parametrize("options", DROP_IN.values(), ids=DROP_IN)
def test_windows_caps_and_sinks(assert_accurate, options, dtype):
    assert_accurate("fused", device="cuda", dtype=dtype, draws=6, **BASE | WHOLE | options)


@pytest.mark.parametrize("D", [16, 24, 32, 40, 64, 80, 96, 128, 192, 256])
def test_every_head_size(assert_accurate, D, dtype):
    assert_accurate("fused", device="cuda", dtype=dtype, is_causal=True, **BASE | WHOLE | {"D": D, "Dv": D})


@pytest.mark.parametrize("N", [0, 1, 15, 17, 64, 65, 128, 1000])
@pytest.mark.parametrize(("M", "P"), [(0, 65), (1, 127), (129, 1), (300, 64)])
def test_odd_sizes(assert_accurate, N, M, P):
    sizes = {"N": N, "M": M, "P": P, "Dv": 32, "n_shared": min(2, P), "is_causal": N % 2 == 0}
    assert_accurate("fused", device="cuda", dtype=torch.bfloat16, **BASE | WHOLE | sizes)


@pytest.mark.parametrize("gate_shape", ["float", "scalar", "head", "task", "task, head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_banks(assert_accurate, gate_shape, dtype):
    sizes = {"B": 9, "T": 4, "lengths": True, "mask": "padding bool", "gate_shape": gate_shape}
    assert_accurate("fused", device="cuda", dtype=dtype, **BASE | WHOLE | sizes)


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
@pytest.mark.parametrize("options", FOLDED.values(), ids=FOLDED)
def test_folded_prefixes(assert_accurate, gate, options):
    """Without weights no score is rounded, so the GPU's tanh is all that keeps the log-sum-exp from being exact."""
    own = {"dtype": torch.bfloat16, "gate": gate, "gate_shape": "head"}
    assert_accurate("fused", device="cuda", **BASE | own | options)


@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(assert_accurate, shape, dtype):
    assert_accurate("fused", device="cuda", draws=4, dtype=dtype, **WHOLE | {"n_shared": 10} | REAL[shape])


def test_auto_picks_it(on_gpu):
    arguments = on_gpu(dtype=torch.bfloat16, **BASE) | {"backend": "auto"}
    assert explain_backend(**arguments).backend == "fused"


@pytest.mark.parametrize("shape", ["bert-base", "llama-8b", "mixed-tasks"])
def test_the_same_bits_again(on_gpu, leaves, shape):
    arguments = on_gpu(dtype=torch.bfloat16, **WHOLE | REAL[shape])
    first = step(arguments, leaves)
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, step(arguments, leaves)))


def test_a_graph_replays_on_new_numbers(on_gpu, leaves):
    arguments = on_gpu(dtype=torch.bfloat16, T=3, lengths=True, mask="padding bool", **BASE | WHOLE | {"B": 8})
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(arguments, leaves)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(arguments, leaves)
    with torch.no_grad():
        arguments["query"].normal_()
        arguments["prefix_key"].normal_()
        arguments["prefix_index"].random_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(captured, step(arguments, leaves)))


def test_an_index_out_of_range_is_clamped(on_gpu):
    arguments = on_gpu(dtype=torch.bfloat16, T=3, **BASE)
    arguments["prefix_index"] = torch.tensor([-5, 1000], device="cuda")
    clamped = arguments | {"prefix_index": torch.tensor([0, 2], device="cuda")}
    assert torch.equal(prefix_attention(**arguments), prefix_attention(**clamped))


def test_two_streams(on_gpu, leaves):
    calls = [on_gpu(dtype=torch.bfloat16, seed=seed, **WHOLE | REAL["bert-base"]) for seed in (1, 2)]
    alone = [step(arguments, leaves) for arguments in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    together: list = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i] = step(calls[i], leaves)
    torch.cuda.synchronize()
    for expected, found in zip(alone, together):
        assert all(torch.equal(x, y) for x, y in zip(expected, found))


def test_a_compiled_step(on_gpu, leaves):
    arguments = on_gpu(dtype=torch.bfloat16, **BASE | WHOLE)
    compiled = torch.compile(lambda: prefix_attention(**arguments), fullgraph=True)
    output = compiled()
    assert torch.equal(output, prefix_attention(**arguments))
    inputs = list(leaves(arguments).values())
    expected = step(arguments, leaves)[2:]
    for grad, want in zip(torch.autograd.grad(output, inputs, torch.ones_like(output)), expected):
        assert torch.equal(grad, want)


def test_a_row_of_70000_tokens(on_gpu, leaves):
    N = 70_000
    arguments = on_gpu(dtype=torch.bfloat16, is_causal=True, **WHOLE | BASE | {"B": 1, "Hkv": 1, "N": N, "M": N})
    results = step(arguments, leaves)
    assert all(x.isfinite().all() for x in results)
    last = arguments | {"query": arguments["query"][:, :, -64:], "backend": "reference"}
    torch.testing.assert_close(results[0][:, :, -64:], prefix_attention(**last), rtol=2e-2, atol=2e-4)


def test_offsets_beyond_32_bits(on_gpu):
    rows, stride = 60_000, 40_000  # 2.4e9 elements
    arguments = on_gpu(dtype=torch.bfloat16, **BASE | {"B": 1, "Hkv": 1, "G": 1, "N": 64, "M": rows})
    expected = prefix_attention(**arguments)
    for name in ("key", "value"):
        room = torch.empty(rows, stride, dtype=torch.bfloat16, device="cuda")[:, :64]
        arguments[name] = room.copy_(arguments[name].detach()[0, 0])[None, None]
    assert torch.equal(prefix_attention(**arguments), expected)


def test_more_heads_than_a_grid_has_rows(on_gpu, leaves):
    sizes = {"B": 70_000, "Hkv": 1, "G": 1, "N": 1, "M": 2, "P": 3, "D": 16, "Dv": 16}
    arguments = on_gpu(dtype=torch.bfloat16, **sizes)
    output = step(arguments, leaves)[0]
    tail = arguments | {name: arguments[name][-5:] for name in ("query", "key", "value")}
    torch.testing.assert_close(output[-5:], prefix_attention(**tail | {"backend": "reference"}), rtol=2e-2, atol=2e-3)


def test_memory_grows_with_queries_not_with_scores(on_gpu, leaves):
    peaks = []
    for N in (4096, 8192, 16384):
        arguments = on_gpu(dtype=torch.bfloat16, is_causal=True, **WHOLE | BASE | {"B": 1, "N": N, "M": N})
        step(arguments, leaves)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(arguments, leaves)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[-1] < N * N  # bytes: far below one head's scores, which take 2 N² in 16 bits
    assert peaks[2] < 2.5 * peaks[1] < 6.25 * peaks[0]
