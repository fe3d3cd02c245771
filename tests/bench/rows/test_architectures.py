"""Models have the sizes of what they stand for, and batches are what their families read."""

import pytest
import torch

from qtuning_fast.bench.rows.architectures import FIRST_WORD, MODELS, TINY, base_model, random_batch


@pytest.mark.parametrize("model", TINY, ids=lambda model: model.name)
def test_a_model_reads_its_batch(model):
    batch = random_batch(model, "cpu")
    assert batch["input_ids"].shape == (model.batch, model.tokens) and batch["input_ids"].min() >= FIRST_WORD
    assert torch.equal(random_batch(model, "cpu")["input_ids"], batch["input_ids"])  # the same for every row
    assert base_model(model, "cpu")(**batch).loss.isfinite()


def test_tokens_a_step_count_what_is_written_too():
    assert MODELS["t5-base"].tokens_a_step == 16 * (512 + 128) and MODELS["bert-base"].tokens_a_step == 32 * 128
