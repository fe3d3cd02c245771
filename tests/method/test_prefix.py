"""The prefix of a model's layers: its arguments, and how one is placed on a layer and taken off."""

from __future__ import annotations

import torch
from torch import nn

from qtuning_fast import prefix_attention
from qtuning_fast.method.prefix import Prefix, no_prefix, place, placed


def test_a_bank_is_the_same_for_all_layers() -> None:
    index, lengths = torch.tensor([1, 0]), torch.tensor([2, 3])
    layers = [{"n_shared": 1}, {"n_shared": 2}]
    assert Prefix(layers).arguments() == layers
    bank = {"prefix_index": index, "prefix_length": lengths}
    assert Prefix(layers, index=index, lengths=lengths).arguments() == [layer | bank for layer in layers]


def test_rows_stand_in_for_embeddings_and_shift_the_context() -> None:
    rows = [{"prefix_key": torch.zeros(2, 4, 3)}, {"prefix_key": torch.ones(2, 4, 3)}]
    one = Prefix([{"gate": None}] * 2, torch.zeros(4, 8)).with_rows(rows)
    assert one.embeddings is None and one.layers == [{"gate": None} | each for each in rows]
    assert one.position_shift is not None and one.position_shift.tolist() == [4] and one.largest_shift == 4
    lengths = torch.tensor([4, 2, 1])
    bank = Prefix([{}] * 2, torch.zeros(3, 4, 8), torch.tensor([2]), lengths).with_rows(rows)
    assert bank.position_shift is lengths and bank.largest_shift == 4


def test_no_prefix_is_plain_attention() -> None:
    query, key, value = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 6, 5), torch.randn(2, 2, 6, 7)
    output = prefix_attention(query, key, value, **no_prefix(key, value))
    plain = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(output, plain)


def test_what_is_placed_stands_until_it_is_taken_off() -> None:
    module = nn.Linear(1, 1)
    assert placed(module) is None
    prefix = {"n_shared": 1}
    place(module, prefix)
    assert placed(module) is prefix and not module.state_dict().keys() - {"weight", "bias"}
    for _ in range(2):  # taking off what is not there is no error
        place(module, None)
        assert placed(module) is None
