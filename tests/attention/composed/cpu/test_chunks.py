"""How queries are cut into chunks, and the memory that chunks share."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import prefix_attention
from qtuning_fast.attention.composed.cpu import chunks
from qtuning_fast.attention.composed.cpu.chunks import scratch

LONG = {"dtype": torch.float32, "B": 2, "Hkv": 2, "G": 2, "N": 70, "M": 70, "P": 40, "D": 16, "Dv": 16}
TRAINED = {"rank_key": 1, "rank_value": 1, "gate_shape": "head"}


def test_no_scores_of_the_whole_batch_exist_at_any_time(make_call, monkeypatch):
    """Chunks share their memory, which does not grow with the batch."""
    monkeypatch.setattr(chunks, "SCORES", 1 << 12)
    sizes = {}
    for B in (2, 16):
        scratch._kept.clear()
        arguments = make_call(**LONG | TRAINED | {"B": B})
        prefix_attention(**arguments, backend="composed").sum().backward()
        sizes[B] = sum(x.numel() for x in scratch._kept.values())
    assert 0 < sizes[16] <= sizes[2]
    scratch._kept.clear()


def test_kept_memory_serves_every_mode(make_call, leaves):
    """What was first needed in inference mode is used in training, and the default device does not matter."""
    arguments = make_call(**LONG | TRAINED) | {"backend": "composed"}
    scratch._kept.clear()
    with torch.inference_mode():
        expected = prefix_attention(**arguments).clone()
    with torch.device("meta"):
        output = prefix_attention(**arguments)
        grads = torch.autograd.grad(output, list(leaves(arguments).values()), torch.ones(output.shape, device="cpu"))
    assert torch.equal(output, expected) and all(grad.isfinite().all() for grad in grads)


def test_kept_memory_is_bounded_for_short_prefixes_too(make_call):
    scratch._kept.clear()
    arguments = make_call(**LONG | {"B": 1, "Hkv": 1, "G": 1, "N": 20_000, "M": 2, "P": 1, "D": 64, "Dv": 64})
    prefix_attention(**arguments, backend="composed").sum().backward()
    assert max(x.numel() for x in scratch._kept.values()) <= chunks.SCORES
    scratch._kept.clear()


@pytest.mark.parametrize(
    "options", [{}, {"N": 3, "B": 9}, {"T": 3, "B": 7, "N": 2}, {"T": 2, "B": 5, "N": 150}], ids=str
)
def test_every_query_is_in_one_chunk_with_its_own_prefix(make_call, call_of, monkeypatch, options):
    monkeypatch.setattr(chunks, "SCORES", 1 << 12)
    call = call_of(make_call(**LONG | options))
    seen = torch.zeros(call.query.shape[0], call.query.shape[2], dtype=torch.int)
    for chunk in chunks.chunks(call):
        seen[chunk.samples, chunk.positions] += 1
        assert chunk.length == 40
        if call.prefix_index is not None:
            assert (call.prefix_index[chunk.samples] == chunk.prefix).all()
        assert seen[chunk.samples, chunk.positions].numel() <= chunks.largest_chunk(call)
    assert (seen == 1).all()


def test_samples_whose_prefix_is_empty_are_in_none(make_call, call_of):
    arguments = make_call(**LONG | {"T": 2, "B": 3, "N": 2})
    arguments |= {"prefix_index": torch.tensor([0, 1, 0]), "prefix_length": torch.tensor([0, 7])}
    [chunk] = chunks.chunks(call_of(arguments))
    assert (chunk.prefix, chunk.length, chunk.samples) == (1, 7, slice(1, 2))
    assert not [*chunks.chunks(call_of(make_call(**LONG | {"P": 0})))]


def test_a_part_is_stacked_and_taken_apart_again(make_call, call_of):
    call = call_of(make_call(**LONG))
    chunk = next(chunks.chunks(call))
    stacked = chunk.read(call.query)
    assert stacked.shape[0] == 2 and torch.equal(chunk.apart(stacked), chunk.part(call.query))
    by_head = chunk.by_head(torch.ones(stacked.shape[:2]))
    assert by_head.shape == (4,) and by_head.sum() == stacked.shape[0] * stacked.shape[1]
