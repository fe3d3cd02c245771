"""Families beside those of the table, and what happens when something goes wrong halfway."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    PixtralVisionConfig,
    PixtralVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1, "reparameterization": None}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_an_error_while_a_task_is_set_leaves_the_one_before(families: Any, with_tasks: Any, placement: str) -> None:
    """The prefix of a prompt is made by a pass through the model, which can fail, and adapters are read from disk."""
    family = families["Llama"]
    config = QTuningConfig(**SMALL, placement=placement, task_type=family.task_type)
    model, inputs = with_tasks(QTuningModel(family.base_model(), config), "first", "second"), family.batch()
    expected = model(**inputs).logits

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    handle = model.backbone.injector.layers[1].module.register_forward_pre_hook(fail)
    model.adapters.add(model.adapters.entry("first").info, file=Missing())  # type: ignore[arg-type]
    for act in (lambda: model.set_task("first"), lambda: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(MemoryError):
            act()
    handle.remove()
    assert torch.equal(model(**inputs).logits, expected)
    model.set_task(None)
    base = model(**inputs).logits
    with pytest.raises(MemoryError):
        model.set_task("first")
    assert torch.equal(model(**inputs).logits, base)


class Missing:
    """An adapter's file that cannot be read."""

    def read(self, info: Any) -> None:
        raise MemoryError


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_a_copy_of_a_model_with_a_task_set_is_a_model_of_its_own(
    families: Any, with_tasks: Any, placement: str
) -> None:
    for name in ("BERT", "GPT-2"):
        family = families[name]
        config = QTuningConfig(**SMALL, placement=placement, task_type=family.task_type)
        model, inputs = with_tasks(QTuningModel(family.base_model(), config), "first", "second"), family.batch()
        second = model(**inputs).logits
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**inputs).logits, second)
        copied.set_task("first")
        model.set_task("first")
        first = model(**inputs).logits
        model.set_task("second")
        assert torch.equal(copied(**inputs).logits, first)
        model.start_task("third", 3)
        model(**inputs, labels=inputs["input_ids"] if name == "GPT-2" else torch.tensor([0, 1, 2]))
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


def test_image_models_without_a_class_token_give_the_mean_of_their_patches() -> None:
    base = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=16, patch_size=8)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    hidden = base(pixel_values=pixels).last_hidden_state
    model = QTuningModel(base, QTuningConfig(**SMALL, task_type="image-classification"))
    pooled = model.features({"pixel_values": pixels}, task=None)
    torch.testing.assert_close(pooled, torch.nn.functional.rms_norm(hidden.mean(1), (32,)))


def test_image_models_that_pack_a_batch_into_one_sequence_are_refused() -> None:
    base = PixtralVisionModel(PixtralVisionConfig(**SIZES, head_dim=8, image_size=16, patch_size=8))
    model = QTuningModel(base, QTuningConfig(**SMALL, task_type="image-classification"))
    with pytest.raises(NotImplementedError, match="one sequence"):
        model.features({"pixel_values": torch.randn(3, 3, 16, 16)}, task=None)
