"""What a model says of a sample does not depend on the padding of its batch: none, in front, behind, or both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel, answer_scores
from qtuning_fast.integrations.transformers.caches import CACHE

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1, "reparameterization": None}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PLACEMENTS = ["prefix", "input"]
LENGTHS, WIDTH = (7, 4, 5), 11
FRONTS = [(4, 7, 6), (0, 0, 0), (1, 3, 4)]  # tokens of padding in front of each sample; the rest is behind it


@pytest.fixture
def reader(family: Any) -> Any:
    """A family that reads text, which is padded."""
    if family.kind == "image":
        pytest.skip("images have no padding")
    return family


def learned(family: Any, *, finished: int = 2, **changes: Any) -> QTuningModel:
    """A model with finished tasks and one in training, every parameter of their prefixes somewhere at random."""
    model = QTuningModel(family.base_model(), QTuningConfig(**(SMALL | {"task_type": family.task_type} | changes)))
    torch.manual_seed(1)
    for number in range(finished + 1):
        model.start_task(f"task-{number}", 2 + number)
        with torch.no_grad():
            for parameter in model.training_prefix.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if number < finished:
            model.finish_task()
    return model.eval()


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 40, (length,), generator=generator) for length in LENGTHS]


def padded(family: Any, fronts: tuple[int, ...], *, extra: int = 0) -> dict[str, Tensor]:
    """The samples as a batch, with so much padding in front of each."""
    ids = torch.full((len(LENGTHS), WIDTH + extra), family.config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, (sample, front) in enumerate(zip(samples(), fronts)):
        ids[row, front : front + len(sample)] = sample
        mask[row, front : front + len(sample)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def for_decoder(family: Any, batch: int) -> dict[str, Tensor]:
    if family.kind != "encoder-decoder":
        return {}
    return {"decoder_input_ids": torch.randint(5, 40, (3, 4), generator=torch.Generator().manual_seed(1))[:batch]}


def as_embeddings(model: QTuningModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    words = model.base_model.get_input_embeddings()
    return {"inputs_embeds": words(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_logits_of_a_sample_are_those_that_it_has_alone(reader: Any, placement: str) -> None:
    model = learned(reader, placement=placement)
    decoded = for_decoder(reader, 3)
    alone = [
        model(input_ids=sample[None], **{name: x[row, None] for name, x in decoded.items()}).logits[0]
        for row, sample in enumerate(samples())
    ]
    for fronts in FRONTS:
        inputs = padded(reader, fronts)
        for given in (inputs, as_embeddings(model, inputs)):
            logits = model(**given, **decoded).logits
            for row, expected in enumerate(alone):
                found = logits[row]
                if reader.kind == "decoder":
                    found = found[fronts[row] : fronts[row] + LENGTHS[row]]
                # The logits of these T5s are up to 100, so 1e-5 is relative to them.
                torch.testing.assert_close(
                    found, expected, atol=1e-5 * float(expected.abs().max().clamp(min=1)), rtol=0
                )


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_features_and_heads_of_every_kind_of_model(reader: Any, placement: str) -> None:
    model = learned(reader, placement=placement, task_type="sequence-classification")
    alone = torch.cat([model(input_ids=sample[None]).logits for sample in samples()])
    features = torch.cat([model.features({"input_ids": sample[None]}, task="task-0") for sample in samples()])
    for fronts in FRONTS:
        inputs = padded(reader, fronts)
        for given in (inputs, as_embeddings(model, inputs), inputs | {"attention_mask": inputs["attention_mask"] > 0}):
            torch.testing.assert_close(model(**given).logits, alone, **CLOSE)
            torch.testing.assert_close(model.encode(given), model.encode(inputs), **CLOSE)
            torch.testing.assert_close(model.features(given, task="task-0"), features, **CLOSE)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_training_step_is_the_same(reader: Any, placement: str, checkpointing: bool) -> None:
    """Loss and gradients, memory retention included."""
    model = learned(reader, placement=placement).train()
    assert model.retains_memory
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    steps = []
    for fronts in FRONTS:
        inputs = padded(reader, fronts)
        if reader.kind == "decoder":
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        else:
            inputs["labels"] = for_decoder(reader, 3).get("decoder_input_ids", torch.tensor([0, 1, 2]))
        torch.manual_seed(5)
        loss = model(**inputs).loss
        loss.backward()
        steps.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
        model.zero_grad()
    (loss, gradients), *others = steps
    for other, found in others:
        torch.testing.assert_close(other, loss, **CLOSE)
        for name, gradient in gradients.items():
            error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1)
            assert error < 2e-5, f"{name}: {error}"


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_batches_of_several_tasks(reader: Any, placement: str) -> None:
    model, names = learned(reader, placement=placement), ["task-1", "task-0", "task-1"]
    outputs = []
    for fronts in FRONTS:
        logits = model(**padded(reader, fronts), **for_decoder(reader, 3), task_names=names).logits
        if reader.kind == "decoder":
            logits = torch.cat([logits[row, front : front + LENGTHS[row]] for row, front in enumerate(fronts)])
        outputs.append(logits)
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=5e-5, rtol=5e-5)  # as in test_mixed.py


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_a_cache_filled_behind_padding_goes_on_by_the_mask(decoder: Any, placement: str) -> None:
    model, inputs, fronts = learned(decoder, placement=placement), padded(decoder, FRONTS[0]), FRONTS[0]
    cache = model(**inputs, use_cache=True)[CACHE]
    longer = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    more = torch.tensor([[9, 11]] * 3)
    found = model(input_ids=more, attention_mask=longer, use_cache=True, **{CACHE: cache}).logits
    for row, sample in enumerate(samples()):
        assert fronts[row] + len(sample) == WIDTH
        expected = model(input_ids=torch.cat([sample, more[0]])[None]).logits[0, -2:]
        torch.testing.assert_close(found[row], expected, **CLOSE)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_generation_and_scores_of_answers(writer: Any, placement: str) -> None:
    model = learned(writer, placement=placement)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    written, scores = [], []
    sides = FRONTS[:1] if writer.kind == "decoder" else FRONTS
    for fronts, extra in [(fronts, 0) for fronts in sides] + [(tuple(3 + front for front in FRONTS[0]), 3)]:
        inputs = padded(writer, fronts, extra=extra)
        tokens = model.generate(**inputs, **options)
        written.append(tokens[:, inputs["input_ids"].shape[1] :] if writer.kind == "decoder" else tokens)
        scores.append(answer_scores(model, inputs, [[7, 9], [11]]))
    assert all(torch.equal(other, written[0]) for other in written[1:])
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ModernBERT", "T5", "BART"])
@torch.no_grad()
def test_padding_between_a_prompt_and_the_tokens_changes_no_distance(families: Any, name: str) -> None:
    """Deep enough that prompts which saw less of the input would tell the tokens so."""
    family = copy.deepcopy(families[name])
    for depth in ("num_hidden_layers", "num_layers", "encoder_layers"):
        if hasattr(family.config, depth):
            setattr(family.config, depth, 4)
    if name == "ModernBERT":
        family.config.layer_types = ["sliding_attention"] * 4
    model = learned(family, placement="input", task_type="sequence-classification")
    right, left = (model(**padded(family, fronts)).logits for fronts in (FRONTS[1], FRONTS[0]))
    torch.testing.assert_close(left, right, **CLOSE)


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("Llama", "prefix"),
        *(pytest.param(*each, marks=pytest.mark.thorough) for each in (("T5", "input"), ("BART", "prefix"))),
    ],
)
@torch.no_grad()
def test_it_compiles_into_one_graph(families: Any, name: str, placement: str) -> None:
    family = families[name]
    model = learned(family, placement=placement, task_type="sequence-classification")
    inputs = padded(family, FRONTS[2])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **CLOSE)
    torch._dynamo.reset()


@torch.no_grad()
def test_without_a_task_the_base_model_counts_as_it_did(decoder: Any) -> None:
    base, inputs = decoder.base_model(), padded(decoder, FRONTS[0])
    expected = base(**inputs).logits
    model = learned(decoder)
    model.set_task(None)
    assert torch.equal(model(**inputs).logits, expected)
