"""What a forward pass under a task returns beside logits and loss, and which token a head reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1}


def started(family: Any, **changes: Any) -> QTuningModel:
    torch.manual_seed(0)
    model = QTuningModel(family.base_model(), QTuningConfig(**(SMALL | {"task_type": family.task_type} | changes)))
    model.start_task("reviews", 3)
    return model


def test_a_classifier_returns_the_hidden_states_that_are_requested(families: Any) -> None:
    for name, placement in (("BERT", "prefix"), ("BERT", "input"), ("ViT", "input")):
        family = families[name]
        model = started(family, placement=placement)
        batch = family.batch(size=3) | {"labels": torch.tensor([0, 1, 2])}
        output = model.train()(**batch, output_hidden_states=True)
        model.set_task(None)
        own = model.base_model(**family.batch(size=3), output_hidden_states=True).hidden_states
        assert [each.shape for each in output.hidden_states] == [each.shape for each in own]
        assert not torch.allclose(output.hidden_states[-1], own[-1])
        model.set_task("reviews")
        assert model(**batch).hidden_states is None


@pytest.mark.parametrize("placement", ["prefix", "input"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT"])
def test_a_classifier_on_a_decoder_finds_the_last_token_without_a_mask(
    families: Any, name: str, placement: str
) -> None:
    settings = SMALL | {"task_type": "sequence-classification", "placement": placement}
    model = QTuningModel(families[name].base_model(), QTuningConfig(**settings))
    model.start_task("reviews", 3)
    ids = torch.randint(5, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    padded = F.pad(ids, (0, 4), value=1)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=padded).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        model.config.pad_token_id = None
        assert not torch.allclose(model(input_ids=padded).logits, model(input_ids=ids).logits, atol=1e-3)


def test_a_padding_token_that_is_set_under_one_task_holds_under_all(families: Any) -> None:
    base = families["Llama"].base_model()
    base.config.pad_token_id = None
    model = QTuningModel(base, QTuningConfig(**SMALL | {"task_type": "sequence-classification"}))
    for name in ("first", "second"):
        model.start_task(name, 3)
        model.finish_task()
    ids = torch.randint(5, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    padded = F.pad(ids, (0, 4), value=1)
    model.config.pad_token_id = 1
    with torch.no_grad():
        for names in (None, ["first", "second", "first"]):
            expected = model(input_ids=ids, task_names=names).logits
            torch.testing.assert_close(model(input_ids=padded, task_names=names).logits, expected)
        model.set_task("first")
        assert model.config.label2id == {"0": 0, "1": 1, "2": 2}
        torch.testing.assert_close(model(input_ids=padded).logits, model(input_ids=ids).logits)
    model.set_task(None)
    assert model.config is base.config and base.config.pad_token_id is None


def test_hidden_states_of_a_step_with_memory_retention_are_those_of_the_batch(families: Any) -> None:
    model = started(families["BERT"])
    for task in ("second", "third"):
        model.finish_task()
        model.start_task(task, 3)
    batch = families["BERT"].batch(size=3) | {"labels": torch.tensor([0, 1, 2])}
    retaining = model.train()(**batch, output_hidden_states=True)
    assert retaining.retention_loss is not None
    with torch.no_grad():
        plain = model.eval()(**batch, output_hidden_states=True)
    for mine, theirs in zip(retaining.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, atol=1e-5, rtol=1e-5)
