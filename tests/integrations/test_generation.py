"""`generate` under prefixes: every cache, beams, left padding, assisted decoding, and mixed tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.integrations.transformers.caches import CACHE

SMALL = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "reparameterization": None}
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
PLACEMENTS = ["prefix", "input"]


def with_tasks(family: Any, tasks: int = 1, **changes: Any) -> QTuningModel:
    """A model with so many finished tasks, whose prefixes matter and differ in length."""
    config = QTuningConfig(**(SMALL | {"task_type": family.task_type} | changes))
    model = QTuningModel(family.base_model(), config)
    torch.manual_seed(1)
    for task in range(tasks):
        model.start_task(f"task-{task}")
        with torch.no_grad():
            for parameter in model.training_prefix.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.finish_task()
    return model.eval()


def questions(family: Any) -> dict[str, Tensor]:
    return {name: value for name, value in family.batch().items() if not name.startswith("decoder_")}


@torch.no_grad()
def without_cache(model: QTuningModel, family: Any, inputs: dict[str, Tensor], steps: int = 6) -> tuple[Tensor, Tensor]:
    """Greedy decoding, everything computed anew for every token: the tokens, and the last logits of each step."""
    model.set_task(model.active_task)
    ids, mask, scores = inputs["input_ids"], inputs["attention_mask"], []
    written = torch.full((len(ids), 1), getattr(model.base_model.config, "decoder_start_token_id", 0))
    for _ in range(steps):
        if family.kind == "decoder":
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate counts them
            last = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        else:
            last = model(**inputs, decoder_input_ids=written, use_cache=False).logits[:, -1]
            written = torch.cat([written, last.argmax(-1, keepdim=True)], dim=1)
        scores.append(last)
    return ids if family.kind == "decoder" else written, torch.stack(scores, dim=1)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_with_a_cache_as_without(writer: Any, placement: str, cache: str) -> None:
    model, inputs = with_tasks(writer, placement=placement), questions(writer)
    expected, scores = without_cache(model, writer, inputs)
    options = OPTIONS | ({"cache_implementation": "static", "disable_compile": True} if cache == "static" else {})
    output = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), scores, atol=1e-4, rtol=0)
    plain = model.base_model.config  # the cache holds the context alone
    if cache == "dynamic" and writer.kind == "decoder" and not getattr(plain, "sliding_window", None):
        assert output[CACHE].get_seq_length() == inputs["input_ids"].shape[1] + 5
    model.set_task(None)
    bare = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    assert not torch.allclose(bare.logits[0], output.logits[0], atol=1e-2)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_beams_find_what_they_find_without_a_cache(writer: Any, placement: str) -> None:
    model, inputs = with_tasks(writer, placement=placement), questions(writer)
    options = OPTIONS | {"num_beams": 3, "num_return_sequences": 2}
    found = model.generate(**inputs, **options)
    assert torch.equal(found, model.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_mixed_batch_writes_what_each_task_writes_alone(writer: Any, placement: str) -> None:
    model, inputs = with_tasks(writer, tasks=3, placement=placement), questions(writer)
    names = ["task-2", "task-0", "task-1"]
    assert len({adapter.prefix_rows for adapter in model.adapters.values()}) > 1
    options = OPTIONS | {"output_logits": True, "return_dict_in_generate": True}
    mixed = model.generate(**inputs, **options, task_names=names)
    beams = model.generate(**inputs, **OPTIONS, num_beams=2, task_names=names)
    for row, name in enumerate(names):
        model.set_task(name)
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = model.generate(**one, **options)
        assert torch.equal(mixed.sequences[row], alone.sequences[0])
        for there, here in zip(mixed.logits, alone.logits):
            torch.testing.assert_close(there[row], here[0], atol=1e-4, rtol=0)
        assert torch.equal(beams[row], model.generate(**one, **OPTIONS, num_beams=2)[0])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_padding_on_the_left_changes_nothing(decoder: Any, placement: str) -> None:
    model, inputs = with_tasks(decoder, placement=placement), questions(decoder)
    padded = model.generate(**inputs, **OPTIONS)[0, -6:]
    bare = model.generate(input_ids=inputs["input_ids"][:1, 3:], **OPTIONS)[0, -6:]
    assert torch.equal(padded, bare)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_assisted_decoding_writes_the_same(decoder: Any, placement: str) -> None:
    model = with_tasks(decoder, placement=placement)
    question = {"input_ids": questions(decoder)["input_ids"][1:2]}
    alone = model.generate(**question, **OPTIONS)
    if getattr(model.base_model.config, "sliding_window", None):
        pytest.skip("transformers cannot take tokens back out of a cache with a sliding window")
    assistant = decoder.base_model(seed=1)
    assert torch.equal(model.generate(**question, **OPTIONS, assistant_model=assistant), alone)
    lookup = model.generate(**question, **OPTIONS, prompt_lookup_num_tokens=2)
    assert torch.equal(lookup, alone)


def test_long_answers_slide_through_the_window(decoder: Any) -> None:
    model, inputs = with_tasks(decoder), questions(decoder)
    expected, _ = without_cache(model, decoder, inputs, steps=12)
    assert torch.equal(model.generate(**inputs, **(OPTIONS | {"max_new_tokens": 12})), expected)


def test_during_training_it_writes_under_the_live_prefix(writer: Any) -> None:
    model, inputs = with_tasks(writer), questions(writer)
    model.start_task("next")
    model.gradient_checkpointing_enable()
    model.train()

    def first_logits() -> Tensor:
        return model.generate(**inputs, **OPTIONS, output_logits=True, return_dict_in_generate=True).logits[0]

    before = first_logits()
    assert model.training
    with torch.no_grad():
        for parameter in model.training_prefix.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = first_logits()
    assert not torch.allclose(before, after, atol=1e-2)
    model.finish_task()
    torch.testing.assert_close(first_logits(), after, atol=1e-4, rtol=0)


def test_what_cannot_write_says_so(tiny_bert: Any) -> None:
    model = QTuningModel(tiny_bert, QTuningConfig())
    with pytest.raises(ValueError, match=r"BertModel.*cannot generate"):
        model.generate(torch.zeros(1, 3, dtype=torch.long))
