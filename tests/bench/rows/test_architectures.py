"""Models have the sizes of what they stand for, and batches are what their families read."""

import pytest
import torch

from qtuning_fast.bench.rows.architectures import FIRST_WORD, MODELS, TINY, base_model, random_batch


@pytest.mark.parametrize("model", TINY, ids=lambda model: model.name)
def test_a_model_reads_its_batch(model):
    batch = random_batch(model, "cpu")
    [read] = batch.keys() - {"labels"}
    if read == "pixel_values":
        assert model.tokens == (batch[read].shape[-1] // model.config().patch_size) ** 2 + 1
    else:
        assert batch[read].shape == (model.batch, model.tokens) and batch[read].min() >= FIRST_WORD
    assert torch.equal(random_batch(model, "cpu")[read], batch[read])  # the same for every row
    assert base_model(model, "cpu")(**batch).loss.isfinite()


@pytest.mark.parametrize("name", ["vit-b16", "vit-cpu"])
def test_images_have_as_many_tokens_as_said(name):
    config = MODELS[name].config()
    assert MODELS[name].tokens == (config.image_size // config.patch_size) ** 2 + 1


def test_tokens_a_step_count_what_is_written_too():
    assert MODELS["t5-base"].tokens_a_step == 16 * (512 + 128) and MODELS["bert-base"].tokens_a_step == 32 * 128
