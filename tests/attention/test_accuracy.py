"""Every backend is as exact as plain PyTorch in the same precision: one list of calls for all of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from qtuning_fast import prefix_attention
from qtuning_fast.attention.common import GATES
from qtuning_fast.kernels.blocks import Blocks, instead
from qtuning_fast.kernels.target import INTERPRETED

thorough = pytest.mark.thorough
interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BF16, F32 = torch.bfloat16, torch.float32
BASE = {"B": 1, "Hkv": 1, "G": 2, "N": 17, "M": 15, "P": 5, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}
MASKS = ["padding bool", "padding float", "full bool", "full float", "full float + padding bool"]
MASKS += ["shared float + padding bool"]


@pytest.mark.ways()
@pytest.mark.parametrize("gate", [*GATES, None])
def test_every_gate(assert_accurate, backend, dtype, gate):
    assert_accurate(backend, **BASE | WHOLE, gate=gate, dtype=dtype)


@pytest.mark.ways()
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(assert_accurate, backend, dtype, mask, is_causal):
    assert_accurate(backend, **BASE, dtype=dtype, mask=mask, is_causal=is_causal, bias=mask == "full float")


@pytest.mark.parametrize(
    "sizes",
    [
        {"N": 65, "M": 129, "P": 17},
        {"N": 129, "M": 65, "P": 3, "is_causal": True},
        {"N": 63, "M": 127, "P": 1, "is_causal": True},
        {"N": 64, "M": 64, "P": 64, "mask": "padding bool"},
        {"N": 1, "M": 128, "P": 129},
        pytest.param({"N": 16, "M": 1, "P": 127}, marks=thorough),
        pytest.param({"N": 130, "M": 0, "P": 65}, marks=thorough),
        {"N": 33, "M": 63, "P": 0},
        {"N": 2, "M": 2, "P": 16, "G": 8},
        {"N": 15, "M": 16, "P": 15, "Hkv": 2, "G": 3, "B": 2},
        {"N": 16, "M": 17, "P": 15, "D": 80, "Dv": 24},
        {"N": 5, "M": 17, "P": 4, "D": 24, "Dv": 32},
        {"N": 5, "M": 17, "P": 4, "D": 200, "Dv": 256},
        {"N": 5, "M": 17, "P": 4, "D": 3, "Dv": 1},
    ],
    ids=lambda sizes: "-".join(f"{name}{size}" for name, size in sizes.items()),
)
@pytest.mark.ways(once=True)
def test_odd_sizes(assert_accurate, backend, dtype, sizes):
    assert_accurate(backend, **BASE | WHOLE | {"n_shared": min(2, sizes["P"]), "dtype": dtype} | sizes)


@pytest.mark.ways(once=True)
@pytest.mark.parametrize("gate_shape", ["float", "scalar", "head", "task", "task, head"])
def test_banks(assert_accurate, backend, dtype, gate_shape):
    sizes = {"B": 4, "T": 3, "G": 1, "N": 18, "M": 3, "P": 18, "lengths": True, "mask": "padding bool"}
    assert_accurate(backend, **BASE | WHOLE | sizes | {"gate_shape": gate_shape, "dtype": dtype}, prefix_dtype=F32)


@pytest.mark.ways(sixteen_bit=True)
def test_master_weights_beside_a_16_bit_query(assert_accurate, backend, dtype):
    assert_accurate(backend, **BASE | WHOLE, dtype=dtype, prefix_dtype=F32)


@pytest.mark.ways(once=True)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(assert_accurate, backend, dtype, scale):
    assert_accurate(backend, **BASE | WHOLE, dtype=dtype, scale=scale)


@st.composite
def call_options(draw):
    """Sizes at the borders of blocks, two of them large at most: the interpreter is slow."""
    small, border = st.sampled_from([0, 1, 2, 15, 16, 17]), st.sampled_from([63, 64, 65, 127, 128, 129])
    large = draw(st.sets(st.sampled_from("NMP"), max_size=2))
    sizes = {name: draw(border if name in large else small) for name in "NMP"}
    G, Hkv, B = draw(st.sampled_from([(1, 1, 1), (3, 1, 1), (8, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 4)]))
    T = draw(st.sampled_from([None, None, 1, 2, 3]))
    shapes = ["float", "scalar", "head"] + ([] if T is None else ["task", "task, head"])
    return sizes | {
        "B": B,
        "G": G,
        "Hkv": Hkv,
        "D": draw(st.sampled_from([16, 24, 32, 80])),
        "Dv": draw(st.sampled_from([16, 24, 32, 80])),
        "T": T,
        "lengths": T is not None and draw(st.booleans()),
        "n_shared": draw(st.integers(0, sizes["P"])),
        "rank_key": draw(st.sampled_from([None, 1, 3])),
        "rank_value": draw(st.sampled_from([None, 1, 3])),
        "gate": draw(st.sampled_from([*GATES, None])),
        "gate_shape": draw(st.sampled_from(shapes)),
        "mask": draw(st.sampled_from([None, *MASKS])),
        "bias": draw(st.booleans()),
        "is_causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(*[st.sampled_from([None, 0, 1, 15, 16, 31, 70])] * 2)),
        "sink": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }


@st.composite
def packed_options(draw):
    """The same of packed sequences."""
    lengths = st.sampled_from([0, 1, 2, 15, 16, 17, 33, 64, 65])
    both = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=4))
    options = draw(call_options())
    return options | {"packed": tuple(map(list, zip(*both))), "mask": None}


drawn = partial(
    settings,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking would take an hour
    suppress_health_check=list(HealthCheck),
)


# Its log-sum-exp is of few scores, so that what a product loses stays.
FEW_SCORES = {"N": 2, "M": 64, "P": 64, "B": 1, "G": 2, "Hkv": 2, "D": 32, "Dv": 24, "n_shared": 9, "gate": "softplus"}
FEW_SCORES |= {"gate_shape": "head", "mask": "full bool", "is_causal": True, "seed": 7}


@thorough
@pytest.mark.ways()
@drawn(max_examples=12)
@given(options=call_options())
@example(options=FEW_SCORES)
def test_any_call(assert_accurate, backend, dtype, options):
    assert_accurate(backend, dtype=dtype, **options)


@pytest.mark.ways(once=True)
@drawn(max_examples=3)
@given(options=call_options())
def test_a_few_calls(assert_accurate, backend, dtype, options):
    assert_accurate(backend, dtype=dtype, **options)


@pytest.mark.ways(of=("fused", "native", "composed"))
@drawn(max_examples=3)
@given(options=packed_options())
def test_a_few_packed_calls(assert_accurate, backend, dtype, options):
    assert_accurate(backend, dtype=dtype, **options)


@thorough
@pytest.mark.ways(of=("fused", "native", "composed"))
@drawn(max_examples=12)
@given(options=packed_options())
def test_any_packed_call(assert_accurate, backend, dtype, options):
    assert_accurate(backend, dtype=dtype, **options)


DECODE = {"B": 5, "N": 1, "G": 4, "M": 3, "Dv": 24}


@pytest.mark.ways(once=True)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "Hkv": 2}, {"T": 7, "lengths": True}, {"T": 3, "P": 18, "bias": True}, {"M": 0}],
    ids=["plain", "bias", "tasks", "tasks-bias", "nothing-cached"],
)
def test_decoding(assert_accurate, backend, dtype, options):
    """One query a sample, of many samples with one prefix or with tasks in no order."""
    gate_shape = "task, head" if "T" in options else "head"
    assert_accurate(backend, **BASE | WHOLE | DECODE | options | {"gate_shape": gate_shape, "dtype": dtype})


by_kernels_in_bfloat16 = pytest.mark.parametrize(("way", "dtype"), [("fused", BF16), ("composed, kernels", BF16)])


@interpreted
@pytest.mark.parametrize(
    "options",
    [
        {"gate": "softplus", "mask": "padding bool"},
        {"gate": "gelu", "mask": "full float", "bias": True, "is_causal": True},
        {"gate": None, "N": 33, "M": 65, "P": 18, "D": 80, "Dv": 24},
        {"gate": "tanh", "B": 4, "T": 3, "lengths": True, "gate_shape": "task, head", "prefix_dtype": F32},
    ],
    ids=["padding", "causal", "odd", "bank"],
)
@by_kernels_in_bfloat16
def test_a_few_in_bfloat16(assert_accurate, backend, dtype, options):
    assert_accurate(backend, **BASE | WHOLE | {"dtype": dtype} | options)


FOLDED = {
    "odd": {"N": 33, "M": 17, "P": 19, "D": 24, "Dv": 32},
    "causal": {"N": 18, "M": 35, "P": 33, "is_causal": True},
    "bank": {"B": 4, "T": 3, "lengths": True, "gate_shape": "task, head", "mask": "padding bool"},
    "decoding": {"B": 3, "N": 1, "P": 18, "is_causal": True},
    "decoding-tasks": {"B": 4, "N": 1, "T": 3, "lengths": True, "gate_shape": "task, head"},
    "nothing-cached": {"B": 2, "N": 1, "M": 0},
}


@interpreted
@pytest.mark.parametrize(
    "tanh_approx_in_interpreter",
    ["too large", pytest.param("too small", marks=thorough), pytest.param("varied", marks=thorough)],
    indirect=True,
)
@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
@pytest.mark.parametrize("options", FOLDED.values(), ids=FOLDED)
@by_kernels_in_bfloat16
def test_folded_prefixes(tanh_approx_in_interpreter, assert_accurate, backend, dtype, gate, options):
    """Without weights no score is rounded, so the GPU's tanh is all that keeps the log-sum-exp from being exact."""
    assert_accurate(backend, **BASE | {"gate_shape": "head", "gate": gate, "dtype": dtype} | options)


@interpreted
@pytest.mark.parametrize(("gate", "loss"), [("tanh", 2.0**-11), ("sigmoid", 2.0**-12), ("softplus", 0.0)])
@pytest.mark.parametrize("tanh_approx_in_interpreter", ["too large"], indirect=True)
@by_kernels_in_bfloat16
def test_what_the_gpus_tanh_takes_from_the_log_sum_exp(
    tanh_approx_in_interpreter, make_call, backend, dtype, gate, loss
):
    """As much as is allowed for, where the prefix is all and tanh is 1."""
    arguments = make_call(**BASE | {"dtype": dtype, "gate": gate, "M": 0})
    arguments |= {"query": torch.ones_like(arguments["query"]), "gate_alpha": 3.0}
    arguments["prefix_key"] = 3 + arguments["prefix_key"].abs()
    _, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    _, exact = prefix_attention(**arguments, return_lse=True, backend="reference")
    torch.testing.assert_close(lse - exact, torch.full_like(lse, 3.0 * loss), rtol=1e-2, atol=1e-5)


SMALL_BLOCKS = {"forward": "fused", "queries": "fused", "keys": "fused"}
SMALL_BLOCKS |= {"merge": "composed, kernels", "prefix-queries": "composed, kernels"}


@interpreted
@pytest.mark.parametrize(("direction", "way", "dtype"), [(name, way, F32) for name, way in SMALL_BLOCKS.items()])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"is_causal": True, "G": 2}, id="causal", marks=thorough),
        pytest.param({"mask": "padding bool"}, id="padded"),
        pytest.param({"T": 2, "B": 3, "lengths": True}, id="bank", marks=thorough),
        pytest.param({"window": (20, 0), "is_causal": True, "N": 90, "M": 97}, id="causal window"),
        pytest.param({"window": (40, 33), "N": 130, "M": 120}, id="window"),
    ],
)
def test_many_small_blocks(assert_accurate, backend, dtype, direction, options):
    sizes = {"N": 37, "M": 41, "P": 35, "G": 1, "rank_key": 1, "n_shared": 20, "gate_shape": "head"}
    with instead(Blocks("interpreter", 4, 256, direction, queries=16, keys=32, prefix=16, warps=1, stages=1)):
        assert_accurate(backend, dtype=dtype, **BASE | sizes | options)


def test_in_float64_the_composed_backend_is_the_reference(make_call, gradients):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(options=call_options())
    def check(options):
        arguments = make_call(dtype=torch.float64, **options)
        outputs, found = [], []
        for backend in ("reference", "composed"):
            own = arguments | {"backend": backend}
            output, lse = prefix_attention(**own, return_lse=True)
            generator = torch.Generator().manual_seed(0)
            d_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            outputs.append((output, lse))
            found.append(gradients(own, d_output))
        for x, y in zip(*outputs):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
        for name, x in found[0].items():
            torch.testing.assert_close(found[1][name], x, rtol=1e-10, atol=1e-10, msg=name)

    check()
