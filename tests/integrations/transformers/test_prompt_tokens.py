"""A prompt's rows in front of the input: what each sample sees of a bank, and the hooks that put them there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtuning_fast.integrations.transformers.positions import Positions
from qtuning_fast.integrations.transformers.prompt_tokens import Prompt, put_in_front

CPU = torch.device("cpu")
BANK = torch.arange(2 * 3 * 4.0).view(2, 3, 4)


def test_one_prompt_serves_every_sample() -> None:
    prompt = Prompt(BANK[0])
    rows = prompt.rows(torch.zeros(5, 7, 4, dtype=torch.float64))
    assert rows.dtype == torch.float64 and torch.equal(rows, BANK[0].double().expand(5, -1, -1))
    assert prompt.tokens == 3 and prompt.absent(5, CPU) is None and prompt.mask(5, CPU) is None


def test_a_bank_without_lengths_gives_each_sample_its_own() -> None:
    prompt = Prompt(BANK, index=torch.tensor([1, 0, 1]))
    assert torch.equal(prompt.rows(torch.zeros(3, 7, 4)), BANK[[1, 0, 1]]) and prompt.mask(3, CPU) is None
    beams = prompt.rows(torch.zeros(6, 7, 4))  # each sample twice
    assert torch.equal(beams, BANK[[1, 1, 0, 0, 1, 1]])
    with pytest.raises(ValueError, match="the batch has 4 samples, but tasks were named for 3"):
        prompt.rows(torch.zeros(4, 7, 4))


def test_shorter_prompts_stand_next_to_the_context() -> None:
    prompt = Prompt(BANK, index=torch.tensor([0, 1]), lengths=torch.tensor([3, 1]))
    absent = prompt.absent(2, CPU)
    assert absent is not None and absent.tolist() == [0, 2]
    assert prompt.mask(2, CPU).tolist() == [[True, True, True], [False, False, True]]  # type: ignore[union-attr]
    rows = prompt.rows(torch.zeros(2, 7, 4))
    assert torch.equal(rows[0], BANK[0]) and torch.equal(rows[1, 2], BANK[1, 0])


@pytest.mark.parametrize("name", ["BERT", "RoBERTa"])
def test_a_model_sees_the_rows_as_tokens_only_while_a_prompt_is_placed(families: Any, name: str) -> None:
    family = families[name]
    model, inputs = family.base_model(), family.batch()
    placed: list[Prompt] = []
    handles = put_in_front(model, model, Positions(model), lambda: placed[0] if placed else None)
    alone = model(**inputs).last_hidden_state
    words = model.get_input_embeddings()
    placed.append(Prompt(words.weight[[9, 8]].detach()))
    behind = model(**inputs).last_hidden_state
    tokens = torch.cat([torch.tensor([[9, 8]]).expand(3, -1), inputs["input_ids"]], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (2, 0), value=1)
    expected = model_without(handles, model, placed)(input_ids=tokens, attention_mask=mask).last_hidden_state
    seen = mask.bool()
    torch.testing.assert_close(behind[seen], expected[seen], rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**inputs).last_hidden_state, alone)


def model_without(handles: list[Any], model: Any, placed: list[Prompt]) -> Any:
    """The model, from here on without the hooks."""
    for handle in handles:
        handle.remove()
    placed.clear()
    return model


def test_masks_of_other_shapes_are_refused(families: Any) -> None:
    model = families["BERT"].base_model()
    put_in_front(model, model, Positions(model), lambda: Prompt(torch.zeros(2, 32)))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 3, 3\)"):
        model(input_ids=torch.full((1, 3), 7), attention_mask=torch.ones(1, 1, 3, 3))


def test_an_image_model_without_embeddings_is_refused(families: Any) -> None:
    model = families["ViT"].base_model()
    model.patches = model._modules.pop("embeddings")
    with pytest.raises(NotImplementedError, match="ViTModel has no module `embeddings`"):
        put_in_front(model, model, None, lambda: None)  # type: ignore[arg-type]
