"""What kernels take of tensors: pointers and strides, copies where they cannot read in place, and named tuples."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.kernels import arguments
from qtuning_fast.kernels.arguments import LARGEST_TILE

BASE = {"dtype": torch.float32, "B": 3, "Hkv": 2, "G": 2, "N": 5, "M": 7, "P": 4, "D": 24, "Dv": 16}


def test_rows_are_read_where_they_lie():
    x = torch.zeros(2, 9, 3, 8).transpose(1, 2)[:, :, 1:]
    found = arguments.rows(x)
    assert found.pointer is x and (found.outer, found.head, found.row) == x.stride()[:3]
    assert (found.D.value, found.BLOCK_D.value) == (8, 16)
    without_outer = arguments.rows(x[0])
    assert without_outer.outer == 0 and (without_outer.head, without_outer.row) == x.stride()[1:3]


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 8, 4).mT,  # columns apart
        torch.zeros(1).expand(2, 3, 4, 8),
        torch.zeros(1).as_strided((2, 1, 1, 8), (0, 0, 0, 0)),
        torch.empty(1, device="meta").as_strided((1, 1, 2, 8), (0, 0, 1 << 23, 1)),  # rows out of reach
    ],
    ids=["columns", "expanded", "one row", "far"],
)
def test_what_kernels_cannot_read_is_copied_and_never_written(x):
    assert not arguments.in_reach(x)
    found = arguments.rows(x)
    assert found.pointer is not x and found.pointer.is_contiguous() and found.pointer.shape == x.shape
    with pytest.raises(AssertionError, match="strides"):
        arguments.written_rows(x)


def test_one_column_and_one_row_may_have_any_stride():
    assert arguments.in_reach(torch.empty(1, device="meta").as_strided((1, 1, 1, 8), (0, 0, 1 << 23, 1)))
    assert arguments.in_reach(torch.zeros(2, 3, 8, 4)[..., :1].transpose(2, 3)[..., :1])


def test_room_for_a_gradient_lies_like_its_input_where_that_can_be_written():
    x = torch.zeros(2, 9, 3, 8).transpose(1, 2)
    assert arguments.empty_rows_like(x).stride() == x.stride()
    assert arguments.empty_rows_like(x.mT).is_contiguous()
    assert arguments.contiguous_like(x).is_contiguous()


@pytest.mark.parametrize(("D", "block"), [(1, 16), (16, 16), (17, 32), (24, 32), (128, 128), (129, 256)])
def test_the_power_of_two_that_holds_a_head_size(D, block):
    assert arguments.block_of(D) == block


def test_constants_are_the_same_objects_and_tell_one_from_true():
    assert arguments.constant(16) is arguments.constant(16)
    assert arguments.constant(True) is not arguments.constant(1) and arguments.constant(True).value is True


def test_scratch_is_marked():
    room = arguments.scratch(torch.zeros(3), (2, 5), torch.float64)
    assert (room.shape, room.dtype) == ((2, 5), torch.float64) and arguments.is_scratch(room)
    assert not arguments.is_scratch(torch.zeros(3))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((3, 4, 5, 7), (140, 35, 7, 1)),
        ((1, 4, 1, 7), (0, 7, 0, 1)),
        ((3, 1, 5, 1), (5, 0, 1, 0)),
        ((1, 1, 1, 1), (0, 0, 0, 0)),
    ],
)
def test_a_mask_has_stride_0_where_it_broadcasts(checked, shape, strides):
    call = checked(**BASE)
    object.__setattr__(call, "attn_mask", torch.ones(shape, dtype=torch.bool))
    found = arguments.masks(call)
    assert found.full[1:] == strides and found.full.pointer.dtype == torch.uint8
    assert found.padding.pointer is None and found.bias.pointer is None


def test_a_padding_mask_is_one_of_samples_and_keys(checked):
    found = arguments.masks(checked(**BASE, mask="padding float")).padding
    assert found[1:] == (7, 0, 0, 1) and found.pointer.dtype == torch.float32


@pytest.mark.parametrize(
    ("gate_shape", "T", "strides"),
    [("scalar", None, (0, 0)), ("head", None, (0, 1)), ("task", 3, (1, 0)), ("task, head", 3, (4, 1))],
)
def test_alpha_and_tau_are_found_by_prefix_and_head(checked, gate_shape, T, strides):
    call = checked(**BASE | {"gate_shape": gate_shape, "T": T})
    alpha = arguments.gate(call).alpha
    assert alpha.pointer is call.gate_alpha and (alpha.prefix, alpha.head) == strides


def test_numbers_for_the_gate_have_no_pointer(checked):
    found = arguments.gate(checked(**BASE))
    assert found.alpha == (None, 0, 0, 0.7) and found.tau == (None, 0, 0, 1.3)
    assert found.name.value == "tanh"


def test_without_a_gate_its_name_is_none(checked):
    assert arguments.gate(checked(**BASE | {"gate": None})).name.value == "none"


@pytest.mark.parametrize("T", [None, 3])
def test_weights_by_prefix_row_and_rank(checked, T):
    call = checked(**BASE | {"T": T, "rank_key": 2})
    U, V = call.reweight_key
    found = arguments.stored(call.prefix_key, call.reweight_key).weights
    assert found.U is U and found.V is V and found.rank.value == 2
    assert (found.U_prefix, found.V_prefix) == ((0, 0) if T is None else (U.stride(0), V.stride(0)))
    assert (found.U_row, found.V_rank, found.V_head) == (U.stride(-2), *V.stride()[-3:-1])
    assert arguments.stored(call.prefix_value, None).weights.U is None


def test_samples_stand_in_the_order_of_their_prefixes(checked):
    call = checked(**BASE | {"T": 3, "B": 4})
    call.prefix_index.copy_(torch.tensor([2, 0, 2, 1]))
    assert arguments.samples_by_prefix(call).tolist() == [1, 3, 0, 2]
    call.prefix_index.copy_(torch.tensor([9, 0, 2, -1]))  # clamped, as kernels clamp it
    assert arguments.samples_by_prefix(call).tolist() == [1, 3, 0, 2]


def test_samples_stay_as_they_are_without_a_bank_or_with_many_queries(checked):
    assert arguments.samples_by_prefix(checked(**BASE)) is None
    assert arguments.samples_by_prefix(checked(**BASE | {"T": 3, "N": LARGEST_TILE // 2})) is None


def test_sizes_and_prefix(checked):
    call = checked(**BASE | {"T": 3, "lengths": True})
    assert arguments.sizes(call) == (3, 5, 7, 4, 2, None, None, None, None, 0, 0)
    prefix = arguments.prefix(call)
    assert (prefix.n_prefixes, prefix.n_rows) == (3, 4) and prefix.length is call.prefix_length
    plain = arguments.prefix(checked(**BASE))
    assert (plain.n_prefixes, plain.index, plain.length) == (1, None, None)
    assert arguments.cdiv(7, 3) == 3 and arguments.cdiv(6, 3) == 2 and arguments.cdiv(0, 3) == 0


def test_how_far_a_query_sees(checked):
    """A bound that is none is left out; causality is known when a kernel is compiled."""
    sizes = arguments.sizes(checked(**BASE | {"window": (3, 2**40)}))
    assert (sizes.before, sizes.after) == (3, None)
    causal = arguments.sizes(checked(**BASE | {"window": (None, 9), "is_causal": True}))
    assert causal.before is None and causal.after is arguments.constant(0)


def test_packed_sequences_are_counted_by_number_and_by_the_longest(checked):
    call = checked(**BASE | {"packed": ([5, 0, 2], [4, 4, 9]), "T": 2})
    assert call.counts == (3, 5, 9)
    sizes = arguments.sizes(call)
    assert sizes[:3] == (3, 5, 9) and (sizes.queries, sizes.keys) == (7, 17)
    assert sizes.query_offsets is call.cu_seqlens_query and sizes.key_offsets is call.cu_seqlens_key
    same = arguments.sizes(checked(**BASE | {"packed": ([5, 2], [5, 2])}))
    assert same.query_offsets is not None and same.key_offsets is not None
    rows = arguments.rows(call.query)
    assert rows.outer == rows.row  # the outer index is then the first row of a sequence
    assert checked(**BASE).counts == (3, 5, 7)


def test_the_prefixs_kernels_see_no_mask_of_the_context(checked):
    call = checked(**BASE | {"mask": "padding bool", "bias": True})
    whole, prefix = arguments.attention(call), arguments.attention_to_prefix(call)
    assert whole["masks"].padding.pointer is not None and prefix["masks"].padding.pointer is None
    assert prefix["masks"].bias.pointer is not None and prefix.keys() == whole.keys() - {"key", "value"}
