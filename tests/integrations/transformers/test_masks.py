"""Masks as transformers asks for them: windows are recognised, and what is handed on means what its own mask says."""

from __future__ import annotations

import copy
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from qtuning_fast.attention.reference import within_reach
from qtuning_fast.integrations.transformers import NAME
from qtuning_fast.integrations.transformers.masks import attention_mask, seen

KINDS = {
    "causal": (lambda size: causal_mask_function, False),
    "bidirectional": (lambda size: bidirectional_mask_function, False),
    "causal window": (sliding_window_causal_mask_function, True),
    "bidirectional window": (sliding_window_bidirectional_mask_function, True),
}


TINY_DENSE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_DENSE |= {"num_key_value_heads": 2, "intermediate_size": 48}
TINY = TINY_DENSE | {"num_experts": 2, "num_experts_per_tok": 1}
TINY |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


def asked(mask_function: Any, size: int | None, N: int, M: int, **options: Any) -> dict[str, Any]:
    known = {"batch_size": 2, "q_length": N, "kv_length": M, "q_offset": M - N, "kv_offset": 0, "device": "cpu"}
    return known | {"mask_function": mask_function, "local_size": size, "dtype": torch.float32} | options


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(KINDS)),
    size=st.integers(1, 9),
    N=st.integers(1, 12),
    cached=st.integers(0, 6),
    dropped=st.integers(0, 3),
    padded=st.booleans(),
)
def test_what_is_handed_on_means_what_transformers_mask_says(kind, size, N, cached, dropped, padded) -> None:
    """Also with keys in a cache, of which one with a window has dropped the first."""
    function, has_window = KINDS[kind]
    M = N + cached
    places = {"q_offset": dropped + cached, "kv_offset": dropped}
    if kind == "bidirectional":
        places = {"q_offset": cached, "kv_offset": 0}  # no cache drops keys of it
        dropped = 0
    mask = None
    if padded:
        mask = torch.ones(2, dropped + M, dtype=torch.long)
        mask[0, : dropped + cached + N // 2] = 0
    call = asked(function(size), size if has_window else None, N, M, attention_mask=mask, **places)
    expected = sdpa_mask(**call, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    found = attention_mask(**call)
    padding, full, reach, packed = seen(found, torch.empty(2, 1, M, 1))
    assert packed is None
    if full is not None:  # a cache that has dropped keys, but has no window
        assert dropped and not has_window and torch.equal(full, expected)
        return
    assert (reach is not None) == has_window
    causal = kind.startswith("causal")
    reached = within_reach(
        SimpleNamespace(query=torch.empty(2, 1, N, 1), key=torch.empty(2, 1, M, 1), keys_before=reach,
                        keys_after=0 if causal else reach)
    )  # fmt: skip
    visible = torch.ones(2, 1, N, M, dtype=torch.bool) if reached is None else reached.expand(2, 1, N, M)
    visible = visible if padding is None else visible & padding[:, None, None]
    assert torch.equal(visible, expected.expand(2, 1, N, M))


@pytest.mark.parametrize(
    "call",
    [
        asked(and_masks(sliding_window_overlay(3), bidirectional_mask_function), 3, 6, 6),
        asked(or_masks(sliding_window_causal_mask_function(3), bidirectional_mask_function), 3, 6, 6),
        asked(sliding_window_causal_mask_function(4), 3, 6, 6),  # another size than is said
        asked(sliding_window_causal_mask_function(3), None, 6, 6),
        asked(sliding_window_causal_mask_function(3), 3, 6, 9, q_offset=2),  # a static cache, not full yet
        asked(sliding_window_causal_mask_function(3), 3, 6, 6, attention_mask=torch.ones(2, 7, dtype=torch.bool)),
        asked(sliding_window_causal_mask_function(3), 3, 6, 6, q_offset=torch.tensor(0)),
        asked(causal_mask_function, None, 6, 9, q_offset=2),
    ],
    ids=["half causal", "more than a window", "other size", "no size", "static", "odd padding", "on device", "offset"],
)
def test_what_is_not_recognised_is_written_out(call: dict[str, Any]) -> None:
    M = call["kv_length"]
    found = attention_mask(**call)
    assert found is not None and found.shape[2:] == (6, M) and found.dtype == torch.bool
    assert seen(found, torch.empty(2, 1, M, 1)) == (None, found, None, None)


def test_a_window_travels_in_the_masks_shape() -> None:
    """So it is read without waiting for a device, and takes no memory."""
    key = torch.empty(2, 1, 6, 1)
    call = asked(sliding_window_causal_mask_function(3), 3, 6, 6)
    assert seen(attention_mask(**call), key) == (None, None, 2, None)
    padded = attention_mask(**call, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]] * 2))
    assert padded.untyped_storage().nbytes() == 2 * 6 * 2
    padding, full, reach, _ = seen(padded, key)
    assert full is None and reach == 2 and padding.tolist() == [[False, True, True, True, True, True]] * 2
    assert seen(padded.to("meta"), key.to("meta")).reach == 2
    assert seen(None, key) == (None, None, None, None)  # a layer without a window in a model that has some


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_other_masks_of_integers_are_refused(dtype: torch.dtype) -> None:
    """As they were: a mask of ones must not be taken for a window."""
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**TINY)).eval()
    model.set_attn_implementation(NAME)
    ids = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match="attn_mask must have a floating or bool dtype"):
        model(ids, attention_mask=torch.ones(2, 1, 5, 5, dtype=dtype))


PACKED_ROWS = {
    "causal": (LlamaConfig(**TINY_DENSE), create_causal_mask, None),
    "windows": (MistralConfig(**TINY_DENSE, sliding_window=3), create_sliding_window_causal_mask, 2),
}


@pytest.mark.parametrize("kind", PACKED_ROWS)
@pytest.mark.parametrize("lengths", [[[3, 1, 4], [5, 3]], [[2, 2, 2, 2]], [[1] * 8], [[7, 1]]], ids=str)
def test_packed_rows_are_recognised(kind: str, lengths: list[list[int]]) -> None:
    """Their mask means what transformers' own says, and is a view of the offsets."""
    config, mask_of, wanted_reach = PACKED_ROWS[kind]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    inputs = {"inputs_embeds": torch.empty(len(lengths), 8, 32), "attention_mask": None, "past_key_values": None}
    config._attn_implementation = "eager"
    expected = mask_of(config=config, **inputs, position_ids=positions) == 0
    config._attn_implementation = NAME
    mask = mask_of(config=config, **inputs, position_ids=positions)
    padding, full, reach, packed = seen(mask, torch.empty(len(lengths), 1, 8, 1))
    assert padding is full is None and packed is not None and reach == wanted_reach
    flat = [n for row in lengths for n in row]
    assert packed.offsets.tolist() == [0, *accumulate(flat)] and packed.longest == max(flat)
    assert mask.untyped_storage().nbytes() == 4 * (len(flat) + 1)
    copied = seen(mask.clone(memory_format=torch.contiguous_format), torch.empty(len(lengths), 1, 8, 1))
    assert copied.reach == reach and copied.packed.offsets.tolist() == packed.offsets.tolist()
    assert copied.packed.longest is None and packed.offsets.dtype == torch.int32
    for row, mine in enumerate(lengths):
        blocks = [torch.ones(n, n, dtype=torch.bool).tril() for n in mine]
        if reach is not None:
            blocks = [block.triu(-reach) for block in blocks]
        assert torch.equal(torch.block_diag(*blocks).bool(), expected[row, 0])


def test_packed_rows_under_further_masks_are_written_out() -> None:
    config = LlamaConfig(**TINY_DENSE)
    config._attn_implementation = NAME
    inputs = {"inputs_embeds": torch.empty(1, 6, 32), "attention_mask": None, "past_key_values": None}
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    mask = create_causal_mask(
        config=config, **inputs, position_ids=positions, and_mask_function=lambda b, h, q, k: k != 1
    )
    assert seen(mask, torch.empty(1, 1, 6, 1)).packed is None and mask.shape == (1, 1, 6, 6)
    ones = torch.ones(1, 1, 1, 6, dtype=torch.int32).expand(-1, -1, 6, -1)  # somebody else's
    assert seen(ones, torch.empty(1, 1, 6, 1)).packed is None


def test_rows_of_one_sequence_may_be_traced() -> None:
    """Traced, transformers takes every row for a packed one; where it begins cannot be read then."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY_DENSE)).eval().requires_grad_(False)
    model.set_attn_implementation(NAME)
    ids = torch.randint(3, 40, (2, 7))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        traced = torch.jit.trace(lambda ids: model(ids, use_cache=False).logits, ids)
        torch.testing.assert_close(traced(ids), expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(ids), use_cache=False).logits.shape == expected.shape


def test_layers_compiled_alone_take_packed_rows() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY_DENSE)).eval()
    model.set_attn_implementation(NAME)
    ids, positions = torch.randint(3, 40, (1, 7)), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        model.model.layers[0] = torch.compile(model.model.layers[0], fullgraph=True, backend="aot_eager")
        found = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected)


def test_one_key_may_be_padding_or_not() -> None:
    key = torch.empty(2, 1, 1, 1)
    call = asked(sliding_window_causal_mask_function(3), 3, 1, 1)
    padding, _, reach, _ = seen(attention_mask(**call, attention_mask=torch.tensor([[0], [1]])), key)
    assert padding.tolist() == [[False], [True]] and reach == 2
    padding, _, reach, _ = seen(attention_mask(**call), key)
    assert padding.tolist() == [[True], [True]] and reach == 2


def test_a_model_that_keeps_its_window_to_itself() -> None:
    """Its attention function is told of none."""
    config = Qwen2MoeConfig(**TINY, use_sliding_window=True, sliding_window=3, max_window_layers=2)
    torch.manual_seed(0)
    ours = Qwen2MoeForCausalLM(config).eval()
    eager = copy.deepcopy(ours)
    ours.set_attn_implementation(NAME)
    eager.set_attn_implementation("eager")
    ids = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, eager(ids).logits)
        torch.testing.assert_close(ours(ids[:, :1]).logits, eager(ids[:, :1]).logits)
        wide = copy.deepcopy(eager)
        wide.config.sliding_window = 64
        assert not torch.allclose(wide(ids).logits, eager(ids).logits, atol=1e-4)


def test_an_encoder_that_tells_its_attention_of_another_window() -> None:
    """T5Gemma's masks reach one key further than the number that it hands to its attention function."""
    if not hasattr(transformers, "T5GemmaConfig"):
        pytest.skip("this transformers does not have the family yet")
    stack = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "head_dim": 8, "sliding_window": 2, "query_pre_attn_scalar": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    ours = transformers.T5GemmaModel(transformers.T5GemmaConfig(encoder=stack, decoder=stack)).eval()
    eager = copy.deepcopy(ours)
    ours.set_attn_implementation(dict.fromkeys(("", "encoder", "decoder"), NAME))
    eager.set_attn_implementation(dict.fromkeys(("", "encoder", "decoder"), "eager"))
    ids = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (model(input_ids=ids, decoder_input_ids=ids[:, :5]) for model in (ours, eager))
    torch.testing.assert_close(found.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_layers_that_are_compiled_alone() -> None:
    """Each as one graph: nothing is read from the mask's numbers."""
    config = MistralConfig(**TINY_DENSE, sliding_window=3)
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    model.set_attn_implementation(NAME)
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        expected = [model(ids).logits, model(ids, attention_mask=mask).logits]
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
        found = [model(ids).logits, model(ids, attention_mask=mask).logits]
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][mask.bool()], expected[1][mask.bool()])
