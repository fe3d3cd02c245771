"""Windows, packed sequences, sinks, caps and masks beside padding: as exact as plain PyTorch, on every backend."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import prefix_attention

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BASE = {"B": 1, "Hkv": 1, "G": 2, "N": 17, "M": 15, "P": 5, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}
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


@pytest.mark.ways()
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


@pytest.mark.ways(of=("fused", "native", "composed"))
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


@pytest.mark.ways()
@pytest.mark.parametrize("options", SINKS.values(), ids=SINKS)
def test_sinks(assert_accurate, backend, dtype, options):
    assert_accurate(backend, **BASE | WHOLE | {"dtype": dtype} | options, sink=True)


@pytest.mark.ways()
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


@pytest.mark.ways(once=True)
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


@pytest.mark.ways()
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


@pytest.mark.ways()
def test_the_largest_sink_takes_all(make_call, gradients, backend, dtype):
    arguments = make_call(**BASE | {"dtype": dtype}) | {"backend": backend}
    arguments["sink"] = torch.full((2,), torch.finfo(F32).max).requires_grad_()
    output, lse = prefix_attention(**arguments, return_lse=True)
    assert (output == 0).all() and (lse > 2e38).all()
    assert all((x == 0).all() for x in gradients(arguments, torch.ones_like(output)).values())


@pytest.mark.ways(of=("fused",))
@pytest.mark.parametrize("softcap", [0.5, 3.0, 50.0, 1e30])
def test_capped_scores(assert_accurate, backend, dtype, softcap):
    assert_accurate(backend, **BASE | WHOLE, dtype=dtype, softcap=softcap, scale=2.0)


CAPPED = {
    "causal": {"is_causal": True, "window": (9, 0), "N": 40, "M": 40},
    "padded": {"mask": "padding bool", "gate": "gelu"},
    "biased": {"mask": "full float", "bias": True, "gate": None},
    "tasks": {"B": 4, "T": 3, "lengths": True, "gate_shape": "task, head", "sink": True},
}


@pytest.mark.ways(of=("fused",))
@pytest.mark.parametrize("options", CAPPED.values(), ids=CAPPED)
def test_capped_scores_beside_others(assert_accurate, backend, dtype, options):
    assert_accurate(backend, **BASE | WHOLE | {"dtype": dtype, "softcap": 2.0} | options)
