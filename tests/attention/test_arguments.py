"""What backends get of the arguments: defaults filled in, pairs split, bounds that are none left out."""

import pytest
import torch

from qtuning_fast import prefix_attention
from qtuning_fast.attention.api import call_of


def normalised(arguments):
    return call_of(**arguments)


def complaint(arguments, **wrong):
    with pytest.raises((ValueError, TypeError)) as refusal:
        prefix_attention(**arguments | wrong)
    return f"{refusal.typename}: {refusal.value}"


def test_a_window_is_a_pair_of_whole_numbers(make_call):
    call = make_call()
    assert complaint(call, window=128) == "TypeError: window must be None or a pair (left, right), got int 128"
    assert complaint(call, window=(-1, 0)) == "ValueError: window[0] must be None or at least 0, got -1"
    assert complaint(call, window=(0, 2.0)) == "TypeError: window[1] must be None or an integer, got float 2.0"
    got = normalised(make_call(window=[3, 10**400]))
    assert (got.window_left, got.window_right) == (3, 2**31 - 1)
    assert (got.keys_before, got.keys_after) == (None, None)  # of three queries and four keys, so far are all
    got = normalised(make_call(N=5, M=6, window=(4, 3)))
    assert (got.keys_before, got.keys_after) == (4, 3)
    got = normalised(make_call(N=5, M=6, window=(5, 4)))
    assert (got.keys_before, got.keys_after) == (None, None)
    assert normalised(make_call(window=(None, 4), is_causal=True)).keys_after == 0


def test_offsets_of_queries_serve_keys_too(make_call):
    arguments = make_call(packed=([2, 3, 0], [2, 3, 0]))
    both = normalised(arguments)
    arguments["cu_seqlens_key"] = arguments["cu_seqlens_query"]
    same = normalised(arguments)
    del arguments["cu_seqlens_key"]
    left_out = normalised(arguments)
    assert both.cu_seqlens_key is not None and same.cu_seqlens_key is left_out.cu_seqlens_key is None
    for call in (both, same, left_out):
        assert call.key_offsets.tolist() == [0, 2, 5, 5] and call.max_seqlen_query == call.max_seqlen_key == 3
    wide = normalised(arguments | {"window": (2, 1)})
    assert (wide.keys_before, wide.keys_after) == (None, 1)  # of the longest, not of all rows


def test_the_longest_sequence_is_read_off_or_a_bound(make_call):
    call = normalised(make_call(packed=([2, 3, 0], [4, 1, 1])))
    assert call.is_packed and (call.max_seqlen_query, call.max_seqlen_key) == (3, 4)
    given = make_call(packed=([2, 3, 0], [4, 1, 1])) | {"max_seqlen_query": 4, "max_seqlen_key": 10**6}
    assert (normalised(given).max_seqlen_query, normalised(given).max_seqlen_key) == (4, 6)
    elsewhere = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    unknown = normalised(elsewhere | {"max_seqlen_query": None})
    assert unknown.max_seqlen_query == 5  # all rows, where values cannot be read


def test_what_backends_get(make_call):
    padded, masked = normalised(make_call(D=4, mask="padding bool")), normalised(make_call(mask="full float", scale=2))
    assert padded.padding_mask is not None and padded.attn_mask is None and padded.scale == 0.5
    assert masked.padding_mask is None and masked.attn_mask is not None and masked.scale == 2.0
    both = normalised(make_call(mask="full float + padding bool"))
    assert both.padding_mask.dtype == torch.bool and both.attn_mask.ndim == 4


def test_a_cap_is_a_float_that_scores_can_hold(make_call):
    assert normalised(make_call()).softcap is None
    cap = normalised(make_call(softcap=30)).softcap
    assert cap == 30.0 and isinstance(cap, float)
    assert normalised(make_call(softcap=1e300)).softcap == 1e300
    for cap in (1e39, 1e-39):  # infinite, and without its digits, in float32
        assert "softcap must be" in complaint(make_call(dtype=torch.float16), softcap=cap)


def test_values_are_looked_at_on_the_cpu_only(make_call):
    on_meta = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in make_call(T=2, lengths=True).items()}
    assert normalised(on_meta).prefix_index.device.type == "meta"
