"""Position ids as a model would give them itself, and the shift that makes room for a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from qtuning_fast.integrations.transformers import PrefixInjector, without_head
from qtuning_fast.integrations.transformers.caches import CACHE
from qtuning_fast.integrations.transformers.positions import (
    Positions,
    Shift,
    argument_names,
    by_name,
    give_positions,
    past_tokens,
    tokens_of,
)


def test_whether_position_ids_are_read_is_found_by_trying(family: Any) -> None:
    follows = family.kind == "image" or family.name in ("T5", "mT5", "BART")
    assert PrefixInjector(family.base_model()).positions.are_taken == (not follows)


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "OPT", "Llama"])
def test_own_positions_are_those_that_the_model_takes_itself(families: Any, name: str) -> None:
    family = families[name]
    stack = without_head(family.base_model())
    stack = stack if family.kind == "encoder" else stack.get_decoder()
    stack.set_attn_implementation("eager")
    inputs = family.batch()
    positions = Positions(stack)
    with torch.no_grad():
        by_itself = stack(**inputs).last_hidden_state
        given = stack(**inputs, position_ids=positions.own(inputs).expand(3, -1)).last_hidden_state
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(given[seen], by_itself[seen], rtol=1e-5, atol=1e-5)
    own = torch.arange(7).expand(3, -1) + 5
    assert positions.own(inputs | {"position_ids": own}) is own


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_padding_takes_no_position_on_either_side(families: Any, dtype: torch.dtype) -> None:
    ids = torch.full((3, 4), 7)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).to(dtype)
    seen = mask != 0
    for name, first in (("GPT-2", 0), ("Llama", 0), ("BERT", 0), ("RoBERTa", 2)):
        stack = without_head(families[name].base_model())
        positions = Positions(stack)
        embeds = stack.get_input_embeddings()(ids)
        for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds}):
            own = positions.own(inputs | {"attention_mask": mask})
            assert own[seen].tolist() == [first + i for i in (0, 1, 0, 1, 0, 1, 2, 3)]
            assert int(own.min()) >= first and int(own.max()) < first + 4
        by_ids = positions.own({"input_ids": ids.masked_fill(~seen, 1)})
        assert name != "RoBERTa" or torch.equal(by_ids[seen], own[seen])


def test_a_static_cache_counts_on_with_a_mask_of_any_length(families: Any) -> None:
    model = families["Llama"].base_model()
    positions, cache = Positions(model.model), StaticCache(model.config, max_cache_len=9)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    model(input_ids=torch.full((2, 4), 7), attention_mask=mask, use_cache=True, **{CACHE: cache})
    for room in (1, 5):
        longer = torch.cat([mask, torch.ones(2, room, dtype=torch.long)], dim=1)
        inputs = {"input_ids": torch.full((2, 1), 7), "attention_mask": longer, CACHE: cache}
        assert positions.own(inputs).tolist() == [[2], [4]]


def test_behind_a_cache_positions_go_on(families: Any) -> None:
    model = families["Llama"].base_model()
    positions = Positions(model.model)
    cache = model(input_ids=torch.full((1, 4), 7), use_cache=True)[CACHE]
    assert past_tokens({CACHE: cache}) == 4 and past_tokens({}) == 0
    assert positions.own({"input_ids": torch.full((1, 2), 7), CACHE: cache}).tolist() == [[4, 5]]


def test_the_shift_reaches_the_model_sample_by_sample(families: Any) -> None:
    """Rotary positions are relative, so a shift of all tokens alike changes nothing: learned ones tell it apart."""
    stack, inputs = without_head(families["GPT-2"].base_model()), {"input_ids": torch.full((2, 3), 7)}
    positions, shifts = Positions(stack), []
    handle = give_positions(stack, positions, lambda: shifts[-1] if shifts else None)
    plain = stack(**inputs).last_hidden_state
    shifts.append(Shift(torch.tensor([0, 5]), 5))
    moved = stack(**inputs).last_hidden_state
    assert torch.equal(moved[0], plain[0]) and not torch.allclose(moved[1], plain[1])
    handle.remove()
    expected = stack(**inputs, position_ids=torch.tensor([[0, 1, 2], [5, 6, 7]])).last_hidden_state
    torch.testing.assert_close(moved, expected)


def test_a_table_that_ends_is_room_that_ends(families: Any) -> None:
    positions = Positions(without_head(families["RoBERTa"].base_model()))
    assert positions.first == 2 and positions.room is not None
    positions.check_room(positions.room - 5, 5)
    with pytest.raises(ValueError, match=f"the prompt takes 6 positions, but RobertaModel has {positions.room}"):
        positions.check_room(positions.room - 5, 6)
    assert Positions(families["Llama"].base_model().model).room is None


def test_arguments_by_place_and_by_name_are_told_apart(tiny_bert: Any) -> None:
    names = argument_names(tiny_bert)
    ids, mask = torch.zeros(1, 2), torch.ones(1, 2)
    assert names[:2] == ("input_ids", "attention_mask")
    assert by_name(names, (ids,), {"attention_mask": mask}) == {"input_ids": ids, "attention_mask": mask}
    assert tokens_of({"input_ids": ids}) is ids and tokens_of({"inputs_embeds": mask}) is mask
