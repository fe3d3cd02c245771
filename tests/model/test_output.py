"""What a model gives back, and how the samples of a batch are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.model.output import QTuningOutput, batch_size, twice

Batch = dict[str, Tensor]
LABELS = torch.tensor([0, 1, 1, 0])
SMALL = {"prompt_length": 3, "queue_size": 3, "shared_length": 2}


def small_config(**changes: Any) -> QTuningConfig:
    return QTuningConfig(**(SMALL | changes))


def test_inputs_that_are_not_of_the_batch_stay_as_they_are(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.train()
    one_for_all = torch.arange(10)[None]
    assert model(**batch, labels=LABELS, position_ids=one_for_all).retention_loss is not None


def test_an_output_has_its_parts_by_name_by_key_and_in_order() -> None:
    output = QTuningOutput(loss=torch.tensor(1.0), logits=torch.zeros(2, 3))
    assert output.loss is output["loss"] is output[0] and output.to_tuple() == (output.loss, output.logits)
    assert output.retention_loss is None and "retention_loss" not in output  # what is None is left out


@pytest.mark.parametrize(
    "name", ["input_ids", "inputs", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds"]
)
def test_samples_are_counted_by_what_the_model_reads(name: str) -> None:
    assert batch_size({"attention_mask": torch.ones(7, 2), "input_ids": None, name: torch.zeros(5, 2)}) == 5


def test_what_is_read_comes_before_what_is_written() -> None:
    """The inputs of an encoder are one a sample, whatever its decoder is given."""
    assert batch_size({"decoder_input_ids": torch.zeros(6, 1), "input_ids": torch.zeros(2, 3)}) == 2


def test_inputs_that_tell_no_number_of_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the inputs hold none of input_ids, inputs, .*decoder_inputs_embeds"):
        batch_size({"attention_mask": torch.ones(7, 2), "input_ids": [[1, 2]]})


def test_a_batch_of_twice_the_samples_repeats_what_is_one_a_sample() -> None:
    inputs = {
        "input_ids": torch.arange(6).view(3, 2),
        "position_ids": torch.arange(2)[None],
        "scale": torch.tensor(3.0),
    }
    given = inputs | {"use_cache": False, "token_type_ids": torch.ones(3, 2)}
    found = twice(given)
    assert found.keys() == given.keys() and batch_size(found) == 6
    assert found["input_ids"].tolist() == [[0, 1], [2, 3], [4, 5]] * 2 and found["token_type_ids"].shape == (6, 2)
    assert all(found[name] is given[name] for name in ("position_ids", "scale", "use_cache"))
