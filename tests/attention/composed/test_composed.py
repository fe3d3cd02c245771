"""The composed backend: what it keeps, whom it asks, caches. How exact it is: test_accuracy.py."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from qtuning_fast import explain_backend, prefix_attention

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


def test_whose_attention_does_the_context_is_said(make_call):
    choice = explain_backend(**make_call(**LONG), backend="composed")
    assert choice.reason == "requested by name; context by PyTorch's flash attention for CPUs"


def test_who_cannot_do_the_context_is_said(make_call):
    arguments = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in make_call(**LONG).items()}
    with pytest.raises(NotImplementedError, match=r"'composed'.*flash attention for CPUs: .*meta.*cuDNN.*: reference"):
        prefix_attention(**arguments, backend="composed")


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_exact_where_sums_are_long(assert_accurate, dtype):
    """PyTorch's flash attention for CPUs adds gradients up tile by tile."""
    sizes = {"B": 1, "Hkv": 1, "G": 1, "N": 600, "M": 600, "D": 32, "Dv": 32, "dtype": dtype}
    assert_accurate("composed", draws=6, **LONG | sizes)
