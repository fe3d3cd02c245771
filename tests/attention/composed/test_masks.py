"""What a vendor gets of masks: additive ones, as they are where they are so already."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.attention.composed.masks import NEAR, Masks, shift_of, under_causality

LOWEST = torch.finfo(torch.float32).min


def of(make_call, call_of, attn_mask, **options):
    sizes = {"B": 2, "Hkv": 1, "G": 2, "N": 3, "M": 4, "dtype": torch.float32}
    return Masks(call_of(make_call(**sizes | options) | {"attn_mask": attn_mask}))


@pytest.mark.parametrize(
    ("numbers", "hides", "moves", "same"),
    [
        ([0.0, 1.0, -3.0, NEAR], False, False, True),
        ([0.0, 1.0, -torch.inf, 2.0], True, False, True),
        ([0.0, 1.0, -1e9, 2.0], False, True, True),
        ([0.0, 1.0, -1e9, -torch.inf], True, True, True),
        ([0.0, 1.0, LOWEST, 2.0], True, False, False),
        ([0.0, 1e9, LOWEST, -torch.inf], True, True, False),
    ],
)
def test_what_is_known_of_numbers(make_call, call_of, numbers, hides, moves, same):
    mask = torch.tensor(numbers).expand(1, 1, 3, 4).clone()
    masks = of(make_call, call_of, mask)
    assert (masks.hide, masks.move) == ([hides], moves)
    assert (masks.additive[0] is mask) == same
    expected = mask.masked_fill(mask <= LOWEST, -torch.inf)
    assert torch.equal(masks.additive[0], expected)


def test_a_bool_mask_becomes_additive_and_padding_comes_first(make_call, call_of):
    mask = torch.tensor([True, False, True, True]).expand(1, 1, 3, 4)
    masks = of(make_call, call_of, mask, mask="full bool + padding bool")
    padding, additive = masks.additive
    assert padding.shape == (2, 1, 1, 4) and additive.shape == (1, 1, 1, 4) and not masks.move
    assert additive.flatten().tolist() == [0.0, -torch.inf, 0.0, 0.0] and masks.hide[1]


def test_masks_of_other_precisions_are_converted(make_call, call_of):
    lowest = torch.finfo(torch.float16).min
    masks = of(make_call, call_of, torch.tensor([0.5, lowest, 1.0, 2.0]).half().view(1, 1, 1, 4))
    assert masks.additive[0].dtype == torch.float32 and masks.additive[0].flatten().tolist() == [0.5, -torch.inf, 1, 2]


def test_where_numbers_cannot_be_looked_at_they_may_be_anything(make_call, call_of):
    on_meta = {
        name: x.to("meta") if isinstance(x, torch.Tensor) else x
        for name, x in make_call(mask="full float", dtype=torch.float32).items()
    }
    masks = Masks(call_of(on_meta))
    assert masks.move and masks.hide == [True]
    masks = Masks(call_of(on_meta | {"attn_mask": on_meta["attn_mask"] > 0}))
    assert not masks.move and masks.hide == [True]


def test_a_row_is_shifted_by_the_largest_number_that_it_sees():
    mask = torch.tensor([[1e9, 1e9 + 64], [-torch.inf, -torch.inf], [NEAR, 0.0], [-1e9, -torch.inf]])
    assert shift_of(mask).flatten().tolist() == [1e9 + 64, 0.0, 0.0, -1e9]
    shared = torch.tensor([0.0, 1e9, 2e9]).view(1, 1, 1, 3)
    assert shift_of(under_causality(shared, 3, 3)).flatten().tolist() == [0.0, 1e9, 2e9]
    assert under_causality(shared[..., :1], 3, 3).shape == (1, 1, 1, 1)
