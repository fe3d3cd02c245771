"""Under a task a stack's hidden states are those of its input, token by token, whoever calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 3, "queue_size": 2, "shared_length": 2}


def under_a_task(family: Any, placement: str) -> QTuningModel:
    torch.manual_seed(0)
    config = QTuningConfig(**SMALL, task_type=family.task_type, placement=placement)
    model = QTuningModel(family.base_model(), config)
    model.start_task("reviews", 3)
    model.finish_task()
    return model.eval()


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "DistilBERT", "ModernBERT", "ELECTRA", "ViT", "CLIP vision tower"])
def test_a_prompt_in_front_leaves_as_many_states_as_the_input_has_tokens(families: Any, name: str) -> None:
    model, inputs = under_a_task(families[name], "input"), families[name].batch()
    with torch.no_grad():
        output = model.base_model(**inputs, output_hidden_states=True)
        model.set_task(None)
        alone = model.base_model(**inputs, output_hidden_states=True)
    assert output.last_hidden_state.shape == alone.last_hidden_state.shape
    assert not torch.allclose(output.last_hidden_state, alone.last_hidden_state, atol=1e-3)
    assert [each.shape for each in output.hidden_states] == [each.shape for each in alone.hidden_states]


@pytest.mark.parametrize("placement", ["prefix", "input"])
@pytest.mark.parametrize("name", ["BERT", "DistilBERT", "ModernBERT"])
def test_each_state_is_at_the_place_of_its_token(families: Any, name: str, placement: str) -> None:
    model = under_a_task(families[name], placement)
    ids = torch.randint(5, 40, (2, 4), generator=torch.Generator().manual_seed(1))
    pads = torch.ones(2, 3, dtype=torch.long)
    mask = torch.cat([torch.zeros_like(pads), torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        alone = model.base_model(input_ids=ids).last_hidden_state
        padded = model.base_model(input_ids=torch.cat([pads, ids], dim=1), attention_mask=mask)
        as_tuple = model.base_model(torch.cat([pads, ids], dim=1), mask, return_dict=False)
    torch.testing.assert_close(padded.last_hidden_state[:, 3:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(as_tuple[0], padded.last_hidden_state)
