"""Packed sequences as calls of their own, and offsets that cannot be trusted."""

import torch

from qtuning_fast import prefix_attention
from qtuning_fast.attention.packed import sequences, spans


def test_each_sequence_is_a_call_of_views(make_call, call_of):
    call = call_of(make_call(packed=([2, 0, 3], [1, 4, 0]), T=2, bias=True))
    assert [(span.queries, span.keys) for span in spans(call)] == [
        (slice(0, 2), slice(0, 1)),
        (slice(2, 2), slice(1, 5)),
        (slice(2, 5), slice(5, 5)),
    ]
    alone = list(sequences(call))
    assert [each.query.shape[2] for each in alone] == [2, 0, 3] and [each.key.shape[2] for each in alone] == [1, 4, 0]
    for s, each in enumerate(alone):
        assert not each.is_packed and each.max_seqlen_query is None
        assert torch.equal(each.prefix_index, call.prefix_index[s, None])
        assert torch.equal(each.prefix_bias, call.prefix_bias[s, None])
    assert alone[2].query.data_ptr() == call.query[:, :, 2:].data_ptr()


def test_a_bias_may_be_shared(make_call, call_of):
    arguments = make_call(packed=([2, 3], [1, 4]))
    shared = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    assert all(each.prefix_bias is shared for each in sequences(call_of(arguments | {"prefix_bias": shared})))


def test_offsets_that_nobody_checks(make_call, monkeypatch):
    """As on an accelerator: clamped, and a query of no sequence sees nothing."""
    arguments = make_call(N=6, M=5, B=1) | {"backend": "reference"}
    monkeypatch.setattr("qtuning_fast.attention.arguments._check_offsets", lambda *args: None)
    offsets = {f"cu_seqlens_{side}": torch.tensor([1, 3, 2, 4], dtype=torch.int32) for side in ("query", "key")}
    output, lse = prefix_attention(**arguments, **offsets, return_lse=True)
    outside = torch.tensor([True, False, False, False, True, True])
    assert (output[:, :, outside] == 0).all() and lse[:, :, outside].isneginf().all()
    assert lse[:, :, ~outside].isfinite().all()
    beyond = {name: x + 90 for name, x in offsets.items()}
    assert (prefix_attention(**arguments, **beyond) == 0).all()
