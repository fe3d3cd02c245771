"""The composed backend: what it keeps, whom it asks, caches. How exact it is: test_accuracy.py."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from qtuning_fast import explain_backend, prefix_attention
from qtuning_fast.attention import composed
from qtuning_fast.attention.composed import context
from qtuning_fast.attention.composed.cpu import chunks
from qtuning_fast.attention.composed.cpu.chunks import scratch
from qtuning_fast.attention.composed.vendors import vendor_for

LONG = {"dtype": torch.float32, "B": 2, "Hkv": 2, "G": 2, "N": 70, "M": 70, "P": 40, "D": 16, "Dv": 16}
TRAINED = {"rank_key": 1, "rank_value": 1, "gate_shape": "head"}


@pytest.mark.parametrize("options", [{}, {"mask": "padding bool"}, {"mask": "full float"}, {"T": 2}])
def test_nothing_of_the_size_of_the_scores_is_kept_for_the_backward_pass(make_call, options):
    arguments = make_call(**LONG | TRAINED | options)
    given = {x.data_ptr() for x in flat(arguments.values())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output, lse = prefix_attention(**arguments, backend="composed", return_lse=True)
    own = [x for x in kept if x.data_ptr() not in given]
    assert sum(x.numel() for x in own) <= output.numel() + 2 * lse.numel()


def flat(values):
    for x in values:
        if isinstance(x, tuple):
            yield from flat(x)
        elif isinstance(x, torch.Tensor):
            yield x


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


def test_whose_attention_does_the_context_is_said(make_call):
    choice = explain_backend(**make_call(**LONG), backend="composed")
    assert choice.reason == "asked for by name; context by PyTorch's flash attention for CPUs"


def test_who_cannot_do_the_context_is_said(make_call):
    arguments = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in make_call(**LONG).items()}
    with pytest.raises(NotImplementedError, match=r"'composed'.*flash attention for CPUs: .*meta.*cuDNN.*: reference"):
        prefix_attention(**arguments, backend="composed")


@pytest.mark.parametrize(
    ("N", "M", "expected"),
    [
        (0, 5, []),
        (5, 0, []),
        (1, 5, [(1, 5, False)]),
        (5, 5, [(5, 5, True)]),
        (3, 5, [(3, 2, False), (3, 3, True)]),
        (5, 3, [(3, 3, True)]),
    ],
)
def test_causality_bottom_right_in_pieces_that_are_square(make_call, call_of, N, M, expected):
    call = call_of(make_call(N=N, M=M, is_causal=True))
    found = context.pieces(call, vendor_for(call))
    sizes = [(len(range(N)[p.queries]), len(range(M)[p.keys]), p.is_causal) for p in found]
    assert sizes == expected


def test_queries_that_see_no_context_attend_to_the_prefix_whatever_the_vendor_says(make_call, call_of, monkeypatch):
    """The vendor's log-sum-exp and output are made garbage there."""
    arguments = make_call(**LONG | {"mask": "padding bool"})
    arguments["attn_mask"][0] = False
    vendor = vendor_for(call_of(arguments))

    def garbage(x):
        output, lse = vendor.forward(x)
        output[0], lse[0] = torch.nan, torch.inf
        return output, lse

    expected, expected_lse = prefix_attention(**arguments, backend="reference", return_lse=True)
    monkeypatch.setattr(composed, "_vendor", lambda call: type(vendor)(**vars(vendor) | {"forward": garbage}))
    output, lse = prefix_attention(**arguments, backend="composed", return_lse=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), [arguments["query"], arguments["key"]]))


@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("steps", [[6, 1, 1, 2], [3, 8, 1]], ids=str)
def test_decoding_with_a_cache_is_attention_as_a_whole(make_call, static, tasks, steps):
    """A prompt, then few queries at a time; a static cache has room that is not written yet, hidden by a mask."""
    B, Hkv, capacity, total = 4, 2, 16, sum(steps)
    sizes = {"dtype": torch.float32, "B": B, "Hkv": Hkv, "G": 2, "P": 5, "D": 16, "Dv": 16, "T": tasks}
    arguments = make_call(**sizes, N=total, M=total, is_causal=True, gate_shape="head", rank_key=1)
    arguments = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    whole = prefix_attention(**arguments, backend="reference")

    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=Hkv, hidden_size=64)
    cache = StaticCache(config=config, max_cache_len=capacity) if static else DynamicCache()
    query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
    start, outputs = 0, []
    for n in steps:
        new = slice(start, start + n)
        keys, values = cache.update(key[:, :, new], value[:, :, new], 0)
        visible = torch.arange(keys.shape[2]) <= torch.arange(start, start + n)[:, None]
        seen = {"attn_mask": visible[None, None], "is_causal": False} if static else {}
        step = arguments | {"query": query[:, :, new], "key": keys, "value": values} | seen
        assert keys.shape[2] == (capacity if static else start + n)
        outputs.append(prefix_attention(**step, backend="composed"))
        start += n
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [[0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5]])
def test_samples_of_mixed_tasks_are_stacked_by_task(make_call, gradients, monkeypatch, samples):
    """In whatever order they come, each prefix is multiplied once."""
    arguments = make_call(**LONG | TRAINED | {"B": 6, "N": 2, "T": 2, "bias": True}) | {"backend": "composed"}
    arguments["prefix_index"] = torch.tensor([0, 0, 0, 1, 1, 1])[samples]
    products = []
    original = torch.Tensor.baddbmm_
    monkeypatch.setattr(torch.Tensor, "baddbmm_", lambda *a, **k: products.append(a) or original(*a, **k))
    output = prefix_attention(**arguments)
    assert len(products) == 2
    expected = prefix_attention(**arguments | {"backend": "reference"})
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    d_output = torch.ones_like(output)
    found, exact = gradients(arguments, d_output), gradients(arguments | {"backend": "reference"}, d_output)
    for name in exact:
        torch.testing.assert_close(found[name], exact[name], rtol=1e-4, atol=1e-4)


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


def test_a_mask_that_was_expanded_is_not_written_out(make_call, call_of):
    mask = torch.zeros(1, 1, 1, 70).expand(2, 4, 70, 70)
    call = call_of(make_call(**LONG) | {"attn_mask": mask})
    additive, _ = context._additive(call)
    assert additive.shape == (1, 1, 1, 70)
    output = prefix_attention(**make_call(**LONG) | {"attn_mask": mask}, backend="composed")
    assert torch.equal(
        output, prefix_attention(**make_call(**LONG) | {"attn_mask": mask[:1, :1, :1]}, backend="composed")
    )


def test_masks_of_moderate_size_reach_a_vendor_as_they_are(make_call, call_of):
    """What is taken off would be rounded, where a vendor adds masks in 16 bits."""
    mask = torch.tensor([5.03125, -3.015625, -torch.inf, 255.0]).expand(3, 4).clone()
    call = call_of(make_call(N=3, M=4, dtype=torch.bfloat16) | {"attn_mask": mask[None, None].bfloat16()})
    additive, shift = context._additive(call)
    assert torch.equal(additive, mask[None, None].bfloat16().float()) and not shift.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_exact_where_sums_are_long(assert_accurate, dtype):
    """PyTorch's flash attention for CPUs adds gradients up tile by tile."""
    sizes = {"B": 1, "Hkv": 1, "G": 1, "N": 600, "M": 600, "D": 32, "Dv": 32, "dtype": dtype}
    assert_accurate("composed", draws=6, **LONG | sizes)
