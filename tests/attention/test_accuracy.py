"""Every backend is as exact as plain PyTorch in the same precision: one list of calls for all of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from qtuning_fast import prefix_attention
from qtuning_fast.attention import composed
from qtuning_fast.attention.common import GATES
from qtuning_fast.kernels.blocks import Blocks, instead
from qtuning_fast.kernels.target import INTERPRETED

thorough = pytest.mark.thorough
interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# Plain PyTorch on a CPU has no float16 of its own. Kernels in bfloat16 wait for `make test-all`, but for the tests of
# their own below.
PAIRS = [
    pytest.param("fused", F32, marks=interpreted, id="fused-float32"),
    pytest.param("fused", F16, marks=interpreted, id="fused-float16"),
    pytest.param("fused", BF16, marks=[interpreted, thorough], id="fused-bfloat16"),
    pytest.param("composed", F32, id="composed-float32"),
    pytest.param("composed", BF16, id="composed-bfloat16"),
    pytest.param("composed, kernels", F32, marks=interpreted, id="composed-kernels-float32"),
    pytest.param("composed, kernels", F16, marks=interpreted, id="composed-kernels-float16"),
    pytest.param("composed, kernels", BF16, marks=[interpreted, thorough], id="composed-kernels-bfloat16"),
]
every_way = pytest.mark.parametrize(("way", "dtype"), PAIRS)
# The same, but what is slow waits for `make test-all`: the interpreter, where the same kernels have run already.
AGAIN = {"fused-float16", "composed-kernels-float32", "composed-kernels-float16"}
every_way_once = pytest.mark.parametrize(
    ("way", "dtype"),
    [
        pytest.param(*pair.values, id=pair.id, marks=[*pair.marks, thorough] if pair.id in AGAIN else pair.marks)
        for pair in PAIRS
    ],
)
every_way_packed = pytest.mark.parametrize(
    ("way", "dtype"), [pair for pair in PAIRS if pair.values[0] != "composed, kernels"]
)
sixteen_bit = pytest.mark.parametrize(("way", "dtype"), [pair for pair in PAIRS if F32 not in pair.values])


@pytest.fixture
def backend(way, dtype, request, monkeypatch):
    """The name of a backend; the composed one computes its prefix part on the CPU, or with the Triton kernels."""
    if dtype == BF16 and way != "composed":
        request.getfixturevalue("bfloat16_as_on_nvidia")
    if "kernels" in way:
        from qtuning_fast.kernels import prefix_part

        monkeypatch.setattr(composed, "prefix_part_for", lambda call: prefix_part)
    return way.split(",")[0]


BASE = {"B": 1, "Hkv": 1, "G": 2, "N": 17, "M": 15, "P": 5, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}
MASKS = ["padding bool", "padding float", "full bool", "full float", "full float + padding bool"]
MASKS += ["shared float + padding bool"]


@every_way
@pytest.mark.parametrize("gate", [*GATES, None])
def test_every_gate(assert_accurate, backend, dtype, gate):
    assert_accurate(backend, **BASE | WHOLE, gate=gate, dtype=dtype)


@every_way
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(assert_accurate, backend, dtype, mask, is_causal):
    assert_accurate(backend, **BASE, dtype=dtype, mask=mask, is_causal=is_causal, bias=mask == "full float")


WINDOWS = {
    "both": {"window": (3, 2)},
    "itself": {"window": (0, 0)},
    "left": {"window": (5, None)},
    "right": {"window": (None, 4)},
    "causal": {"window": (7, 0), "is_causal": True, "N": 70, "M": 70},
    "wider": {"window": (400, 10**12)},
    "long": {"window": (9, 6), "N": 130, "M": 129, "B": 2, "G": 1},
    "cached": {"window": (20, 0), "N": 40, "M": 75, "mask": "padding bool"},
    "queries without keys": {"window": (3, 1), "N": 60, "M": 20, "mask": "padding float"},
    "decoding": {"window": (7, 0), "N": 1, "M": 40, "B": 3},
    "wide": {"window": (70, 0), "is_causal": True, "N": 200, "M": 210, "G": 1},
    "wide, both": {"window": (100, 70), "N": 200, "M": 200, "G": 1},
    "shared": {"window": (9, 3), "N": 70, "M": 70, "B": 3, "G": 1, "mask": "shared float + padding bool"},
    "masked": {"window": (11, 5), "N": 80, "M": 90, "G": 1, "mask": "full float + padding bool"},
}


@every_way
@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
def test_windows(assert_accurate, backend, dtype, options):
    assert_accurate(backend, **BASE | {"dtype": dtype, "gate_shape": "head"} | options)


PACKED = {
    "plain": {"packed": ([17, 1, 30, 0, 5], [15, 3, 0, 4, 33])},
    "one": {"packed": ([40], [37]), "is_causal": True},
    "causal": {"packed": ([70, 3, 16], [70, 9, 16]), "is_causal": True, "n_shared": 2, "rank_key": 1},
    "shorter contexts": {"packed": ([20, 33, 2], [3, 20, 1]), "is_causal": True, "gate_shape": "head"},
    "windows": {"packed": ([66, 40, 7], [70, 40, 0]), "window": (9, 5), "sink": True},
    "causal windows": {"packed": ([35, 150], [35, 160]), "is_causal": True, "window": (20, 0), "G": 1},
    "tasks": {"packed": ([9, 20, 4, 0, 6], [9, 20, 4, 2, 6]), "T": 3, "lengths": True, "gate_shape": "task, head"},
    "tasks in turns": {"packed": ([18, 5, 1], [7, 0, 20]), "T": 2, "rank_value": 2, "gate_shape": "task"},
    "biased": {"packed": ([12, 19, 3], [12, 19, 3]), "bias": True, "T": 2, "Hkv": 2},
    "decoding": {"packed": ([1, 1, 1, 1], [9, 1, 17, 4]), "is_causal": True, "G": 4},
    "empty": {"packed": ([0, 0], [0, 3])},
    "no prefix": {"packed": ([6, 20, 3], [4, 0, 5]), "P": 0},
}


@every_way_packed
@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_packed_sequences(assert_accurate, backend, dtype, options):
    assert_accurate(backend, **BASE | {"dtype": dtype} | options)


SINKS = {
    "plain": {},
    "windows": {"is_causal": True, "window": (4, 0), "N": 33, "M": 33},
    "additive mask": {"mask": "full float", "bias": True},
    "tasks": {"B": 4, "T": 3, "lengths": True, "gate_shape": "task, head", "prefix_dtype": F32},
    "nothing else": {"M": 0, "P": 0, "n_shared": 0},
    "decoding": {"N": 1, "B": 5, "M": 9},
}


@every_way
@pytest.mark.parametrize("options", SINKS.values(), ids=SINKS)
def test_sinks(assert_accurate, backend, dtype, options):
    assert_accurate(backend, **BASE | WHOLE | {"dtype": dtype} | options, sink=True)


@every_way
def test_a_sink_that_is_not_there(make_call, gradients, backend, dtype):
    """One of -inf changes nothing; of a query that sees nothing the log-sum-exp is -inf."""
    arguments = make_call(**BASE | {"dtype": dtype, "P": 0, "mask": "padding bool"}) | {"backend": backend}
    arguments["attn_mask"][:] = torch.arange(15) < 9
    arguments |= {"is_causal": True}
    expected, expected_lse = prefix_attention(**arguments, return_lse=True)
    arguments["sink"] = torch.full((2,), -torch.inf).requires_grad_()
    output, lse = prefix_attention(**arguments, return_lse=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert lse[:, :, :2].isneginf().all() and (gradients(arguments, torch.ones_like(output))["sink"] == 0).all()


@every_way_once
@pytest.mark.parametrize("sizes", [(16, 16), (6, 9), (9, 6), (1, 7), (5, 0)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_mask_that_samples_share_beside_their_padding(assert_accurate, backend, dtype, sizes, is_causal):
    shape = {"B": 3, "N": sizes[0], "M": sizes[1], "mask": "shared float + padding bool", "is_causal": is_causal}
    assert_accurate(backend, **BASE | shape, dtype=dtype)


def test_shared_numbers_far_from_0_under_causality(make_call, gradients):
    """More keys than queries, so that the context is in two pieces, whose shifts are the same."""
    arguments = make_call(**BASE | {"dtype": F32, "B": 2, "N": 4, "M": 8, "is_causal": True})
    arguments["padding_mask"] = torch.arange(8) < torch.tensor([[8], [6]])
    arguments["attn_mask"] = 1e4 * torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    exact = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()}
    output, lse = prefix_attention(**arguments, backend="composed", return_lse=True)
    expected, expected_lse = prefix_attention(**exact, backend="reference", return_lse=True)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("options", [{"window": (None, 4)}, {"window": (900, 0)}, {"window": (600, 600)}], ids=str)
def test_sums_over_many_pieces_are_not_rounded_for_each(assert_accurate, options):
    assert_accurate("composed", **BASE | {"N": 1500, "M": 1500, "G": 1, "dtype": BF16} | options, draws=2)


@every_way
def test_a_sink_of_any_strides_and_size(make_call, gradients, backend, dtype):
    arguments = make_call(**BASE | {"dtype": dtype, "G": 4, "P": 0})
    expected_at = arguments | {"backend": "reference"}
    for sink in (torch.randn(8)[::2], torch.tensor([2.0]).expand(4), torch.tensor([2e38, -3e38, 2e38, 1.0])):
        values = {"sink": sink.to(dtype if sink.abs().max() < 1e4 else F32).requires_grad_()}
        output, lse = prefix_attention(**arguments | values, backend=backend, return_lse=True)
        expected, expected_lse = prefix_attention(**expected_at | values, return_lse=True)
        tolerance = {F32: 1e-5, F16: 4e-3, BF16: 3e-2}[dtype]
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
        d_output = torch.ones_like(output)
        found = gradients(arguments | values | {"backend": backend}, d_output)["sink"]
        assert found.isfinite().all()
        torch.testing.assert_close(found, gradients(expected_at | values, d_output)["sink"], rtol=0.1, atol=0.1)


@every_way
def test_the_largest_sink_takes_all(make_call, gradients, backend, dtype):
    arguments = make_call(**BASE | {"dtype": dtype}) | {"backend": backend}
    arguments["sink"] = torch.full((2,), torch.finfo(F32).max).requires_grad_()
    output, lse = prefix_attention(**arguments, return_lse=True)
    assert (output == 0).all() and (lse > 2e38).all()
    assert all((x == 0).all() for x in gradients(arguments, torch.ones_like(output)).values())


by_kernels = pytest.mark.parametrize(("way", "dtype"), [pair for pair in PAIRS if pair.values[0] == "fused"])


@by_kernels
@pytest.mark.parametrize("softcap", [0.5, 3.0, 50.0, 1e30])
def test_capped_scores(assert_accurate, backend, dtype, softcap):
    assert_accurate(backend, **BASE | WHOLE, dtype=dtype, softcap=softcap, scale=2.0)


CAPPED = {
    "causal": {"is_causal": True, "window": (9, 0), "N": 40, "M": 40},
    "padded": {"mask": "padding bool", "gate": "gelu"},
    "biased": {"mask": "full float", "bias": True, "gate": None},
    "tasks": {"B": 4, "T": 3, "lengths": True, "gate_shape": "task, head", "sink": True},
}


@by_kernels
@pytest.mark.parametrize("options", CAPPED.values(), ids=CAPPED)
def test_capped_scores_beside_others(assert_accurate, backend, dtype, options):
    assert_accurate(backend, **BASE | WHOLE | {"dtype": dtype, "softcap": 2.0} | options)


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
@every_way_once
def test_odd_sizes(assert_accurate, backend, dtype, sizes):
    assert_accurate(backend, **BASE | WHOLE | {"n_shared": min(2, sizes["P"]), "dtype": dtype} | sizes)


@every_way_once
@pytest.mark.parametrize("gate_shape", ["float", "scalar", "head", "task", "task, head"])
def test_banks(assert_accurate, backend, dtype, gate_shape):
    sizes = {"B": 4, "T": 3, "G": 1, "N": 18, "M": 3, "P": 18, "lengths": True, "mask": "padding bool"}
    assert_accurate(backend, **BASE | WHOLE | sizes | {"gate_shape": gate_shape, "dtype": dtype}, prefix_dtype=F32)


@sixteen_bit
def test_master_weights_beside_a_16_bit_query(assert_accurate, backend, dtype):
    assert_accurate(backend, **BASE | WHOLE, dtype=dtype, prefix_dtype=F32)


@every_way_once
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
@every_way
@drawn(max_examples=12)
@given(options=call_options())
@example(options=FEW_SCORES)
def test_any_call(assert_accurate, backend, dtype, options):
    assert_accurate(backend, dtype=dtype, **options)


@every_way_once
@drawn(max_examples=3)
@given(options=call_options())
def test_a_few_calls(assert_accurate, backend, dtype, options):
    assert_accurate(backend, dtype=dtype, **options)


@every_way_packed
@drawn(max_examples=3)
@given(options=packed_options())
def test_a_few_packed_calls(assert_accurate, backend, dtype, options):
    assert_accurate(backend, dtype=dtype, **options)


@thorough
@every_way_packed
@drawn(max_examples=12)
@given(options=packed_options())
def test_any_packed_call(assert_accurate, backend, dtype, options):
    assert_accurate(backend, dtype=dtype, **options)


DECODE = {"B": 5, "N": 1, "G": 4, "M": 3, "Dv": 24}


@every_way_once
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


@every_way
def test_a_context_far_below_the_prefix_and_a_prefix_far_below_the_context(make_call, backend, dtype):
    arguments = make_call(**BASE | {"dtype": dtype, "B": 2, "P": 5, "M": 7})
    padding, bias = torch.zeros(2, 7), torch.zeros(1, 1, 17, 5)
    padding[0] = -1e9
    bias[:, :, :4] = -1e9
    arguments |= {"attn_mask": padding, "prefix_bias": bias}
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    (output, lse), (expected, expected_lse) = (
        prefix_attention(**x, return_lse=True, backend=b) for x, b in ((arguments, backend), (exact, "reference"))
    )
    grads, expected_grads = (
        torch.autograd.grad(o.sum(), [x[name] for name in ("query", "prefix_value")], retain_graph=True)
        for o, x in ((output[:, :, 4:], arguments), (expected[:, :, 4:], exact))
    )
    tolerance = {F32: 2e-5, F16: 4e-3, BF16: 3e-2}[dtype]
    for b, first in ((0, 4), (1, 0)):  # where both are so far out, float32 cannot tell the scores apart
        for x, want in ((output, expected), (grads[0], expected_grads[0])):
            torch.testing.assert_close(x[b, :, first:].double(), want[b, :, first:], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(grads[1].double(), expected_grads[1], rtol=tolerance, atol=5 * tolerance)


@every_way
@pytest.mark.parametrize("bias_dtype", [F16, BF16, F32])
def test_the_most_negative_number_of_a_bias_hides_prefix_rows(make_call, backend, dtype, bias_dtype):
    """And so does -inf; a query from which all is hidden gets 0."""
    arguments = make_call(**BASE | {"dtype": dtype, "M": 0})
    bias = torch.zeros(1, 1, 17, 5, dtype=bias_dtype)
    bias[..., 1] = torch.finfo(bias_dtype).min
    bias[..., 2] = -torch.inf
    bias[:, :, 3] = torch.finfo(bias_dtype).min
    arguments["prefix_bias"] = bias
    output, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    expected, expected_lse = prefix_attention(**arguments, return_lse=True, backend="reference")
    grad, expected_grad = (torch.autograd.grad(o.sum(), arguments["prefix_value"])[0] for o in (output, expected))
    assert (output[:, :, 3] == 0).all() and lse[:, :, 3].isneginf().all() and (grad[:, 1:3] == 0).all()
    tolerance = {F32: 1e-5, F16: 4e-3, BF16: 3e-2}[dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    by_tanh_approx = 2.0**-11 * arguments["gate_alpha"] if dtype == BF16 else 0.0
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4 + by_tanh_approx)
    torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=8 * tolerance)


@every_way
@pytest.mark.parametrize("size", [100.0, -100.0])
@pytest.mark.parametrize("far", [4e9, -4e9, 1e4, 0.0])
def test_scores_of_any_size_around_a_mask_of_any_size(make_call, backend, dtype, size, far):
    """The context's log-sum-exp is far + size: what is added to it after rounding may itself be large."""
    arguments = make_call(**BASE | {"dtype": dtype, "M": 4})
    arguments["query"], arguments["key"] = (torch.ones_like(arguments[name]) for name in ("query", "key"))
    arguments["key"] *= size / arguments["query"].shape[-1] ** 0.5
    arguments["attn_mask"] = torch.full((1, 4), far)
    output, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected, expected_lse = prefix_attention(**exact, return_lse=True, backend="reference")
    tolerance = (
        {F32: 1e-4, F16: 4e-3, BF16: 3e-2}[dtype] if far != 1e4 else 2e-2
    )  # 1e4 ± 1 has 10 bits behind the point
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=0.1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("far", [-1e4, -1e9, -1e30, -3e38, 3e38])
@every_way
def test_additive_masks_of_any_size(make_call, backend, dtype, far, is_causal):
    """Keys that are far below all others, in whole tiles, and queries that see nothing else."""
    arguments = make_call(**BASE | {"dtype": dtype, "P": 0, "M": 70, "G": 1}, is_causal=is_causal)
    mask = torch.zeros(1, 1, 17, 70)
    mask[..., : 50 if is_causal else 66] = far
    mask[:, :, 5] = far
    arguments["attn_mask"] = mask
    output, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    grads = torch.autograd.grad(output.sum(), [arguments[name] for name in ("query", "key", "value")])
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected, expected_lse = prefix_attention(**exact, return_lse=True, backend="reference")
    tolerance = {F32: 2e-5, F16: 4e-3, BF16: 3e-2}[dtype]
    seeing = [n for n in range(17) if n != 5]  # so far out float32 cannot tell apart the scores of query 5
    if backend == "composed" and far > 0:
        seeing = []  # nor any query's; the composed backend can, taking the mask's largest number off it
    torch.testing.assert_close(output[:, :, seeing].double(), expected[:, :, seeing], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)
    assert all(x.isfinite().all() for x in (output, lse, *grads))
    # What a query gives to the values adds up to what it was given: no weight is lost or made up.
    torch.testing.assert_close(grads[2].double().sum(), output.new_tensor(output.numel()).double(), rtol=5e-3, atol=0)
