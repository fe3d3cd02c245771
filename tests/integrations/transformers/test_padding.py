"""Padding moved behind the tokens: every input that has a place for each token moves alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.integrations.transformers.padding import move_padding_behind, moved_back, padding_behind

MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_a_mask_with_its_zeros_last(dtype: torch.dtype) -> None:
    moved = padding_behind(MASK.to(dtype))
    assert moved.dtype == dtype and moved.tolist() == torch.tensor([[1, 1, 0, 0]] * 3).to(dtype).tolist()


def test_an_encoder_reads_the_tokens_first(tiny_bert: Any) -> None:
    seen: list[dict[str, Any]] = []
    handles = move_padding_behind(tiny_bert, tiny_bert)
    handles.append(tiny_bert.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True))
    ids = torch.tensor([[1, 2, 3, 4]]).expand(3, -1)
    embeds = tiny_bert.get_input_embeddings()(ids)
    with torch.no_grad():
        tiny_bert(ids, attention_mask=MASK, token_type_ids=ids % 2, position_ids=torch.arange(4)[None])
        tiny_bert(inputs_embeds=embeds, attention_mask=MASK)
        tiny_bert(ids)
    order = [[3, 4, 1, 2], [1, 2, 3, 4], [2, 4, 1, 3]]
    assert seen[0]["input_ids"].tolist() == order
    assert torch.equal(seen[0]["token_type_ids"], torch.tensor(order) % 2)
    assert torch.equal(seen[0]["position_ids"], torch.tensor(order) - 1)
    assert seen[0]["attention_mask"].tolist() == [[1, 1, 0, 0]] * 3
    assert torch.equal(seen[1]["inputs_embeds"], tiny_bert.get_input_embeddings()(torch.tensor(order)))
    assert "attention_mask" not in seen[2]
    for handle in handles:
        handle.remove()


def test_cross_attention_takes_the_mask_in_the_same_order(families: Any) -> None:
    model = families["T5"].base_model()
    inputs = {"input_ids": torch.full((3, 4), 7), "decoder_input_ids": torch.full((3, 2), 7), "attention_mask": MASK}
    inputs["input_ids"] = inputs["input_ids"] + torch.arange(4)
    with torch.no_grad():
        expected = model(**inputs)
        handles = move_padding_behind(model, model.get_encoder())
        moved = model(**inputs)
    for handle in handles:
        handle.remove()
    seen = MASK.bool()
    by_token, found = expected.encoder_last_hidden_state, moved_back(moved.encoder_last_hidden_state, MASK)
    torch.testing.assert_close(found[seen][:4], by_token[seen][:4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.logits[:2], expected.logits[:2], atol=1e-5, rtol=1e-5)


def test_only_where_the_place_of_padding_tells(family: Any) -> None:
    states, mask = torch.arange(2.0).view(1, 2, 1), torch.tensor([[0, 1]])
    for placement in ("prefix", "input"):
        injector = PrefixInjector(family.base_model(), placement)
        assert injector.in_order_of_input(states, mask) is states  # while the model uses its own attention
        injector.switch()
        follows = family.name == "BART" or (placement == "input" and family.kind in ("encoder", "encoder-decoder"))
        assert injector.in_order_of_input(states, mask).flatten().tolist() == ([1, 0] if follows else [0, 1])
        assert injector.in_order_of_input(states, None) is states
        injector.detach()
