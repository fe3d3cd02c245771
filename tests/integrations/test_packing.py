"""Packed rows, as transformers' DataCollatorWithFlattening makes them: each sequence computes as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, FalconH1Config
from transformers.masking_utils import find_packed_sequence_indices

from qtuning_fast import QTuningConfig, QTuningModel, prefix_attention
from qtuning_fast.integrations.transformers import interface
from qtuning_fast.integrations.transformers.caches import CACHE

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1, "reparameterization": None}
PLACEMENTS = ["prefix", "input"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = (6, 4, 1, 5)


def learned(family: Any, **changes: Any) -> QTuningModel:
    """A model with finished tasks and one in training, every parameter of their prefixes somewhere at random."""
    model = QTuningModel(family.base_model(), QTuningConfig(**(SMALL | {"task_type": family.task_type} | changes)))
    torch.manual_seed(1)
    for name in ("first", "second", "third"):
        model.start_task(name, 3)
        with torch.no_grad():
            for parameter in model.training_prefix.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if name != "third":
            model.finish_task()
    return model


def samples() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 40, (length,), generator=generator).tolist() for length in LENGTHS]


def packed(**options: Any) -> dict[str, Any]:
    collator = DataCollatorWithFlattening(**options)
    return dict(collator([{"input_ids": ids, "labels": ids} for ids in samples()]))


def one_by_one(model: QTuningModel) -> Tensor:
    return torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in samples()], dim=1)


def keeps_apart(model: QTuningModel) -> bool:
    return model.backbone.injector.positions.keeps_packed_rows_apart


@pytest.fixture
def packing_decoder(decoder: Any) -> Any:
    """A family whose base model keeps the sequences of packed rows apart."""
    if decoder.name in ("OPT", "GPT-OSS"):
        pytest.skip("its base model does not keep them apart")
    return decoder


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_logits_and_gradients_are_those_of_the_sequences_alone(
    packing_decoder: Any, placement: str, checkpointing: bool
) -> None:
    model = learned(packing_decoder, placement=placement)
    parameters = {name: p for name, p in model.training_prefix.named_parameters() if p.requires_grad}
    cotangent = torch.randn(1, sum(LENGTHS), 40, generator=torch.Generator().manual_seed(3)) / 25

    def gradients(logits: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logits * cotangent).sum(), list(parameters.values()))

    expected = one_by_one(model.eval())
    wanted = gradients(expected)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for training in (True, False):
        model.train(training)
        for options in ({}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
            output = model(**packed(**options))
            torch.testing.assert_close(output.logits, expected, **CLOSE)
            for name, found, right in zip(parameters, gradients(output.logits), wanted):
                error = (found - right).abs().max() / right.abs().max().clamp(min=1)
                assert error < 1e-5, f"{name}: {error}"
            assert output.get(CACHE) is None
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**packed()).logits, expected, **CLOSE)
        batch = packed()
        embeds = model.base_model.get_input_embeddings()(batch.pop("input_ids"))
        torch.testing.assert_close(model(inputs_embeds=embeds, **batch).logits, expected, **CLOSE)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_no_mask_of_tokens_by_tokens_is_built(packing_decoder: Any, placement: str, monkeypatch: Any) -> None:
    """The operator gets offsets, those of two rows of four sequences."""
    calls = list[dict[str, Any]]()

    def watched(*args: Any, **arguments: Any) -> Any:
        calls.append(arguments)
        return prefix_attention(*args, **arguments)

    monkeypatch.setattr(interface, "prefix_attention", watched)
    model = learned(packing_decoder, placement=placement).eval()
    calls.clear()
    batch = {name: torch.cat([x, x]) for name, x in packed().items() if name != "labels"}
    model(**batch)
    assert calls and all(call.get("attn_mask") is None for call in calls)
    of_rows = [call["cu_seqlens_query"] for call in calls if "cu_seqlens_query" in call]
    assert of_rows and all(ends.tolist() == [0, 6, 10, 11, 16, 22, 26, 27, 32] for ends in of_rows)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_a_row_of_one_task_in_a_batch_of_several(packing_decoder: Any, placement: str) -> None:
    """`task_names` names one task a row, which all of its sequences have."""
    model = learned(packing_decoder, placement=placement).eval()
    batch = {name: torch.cat([x, x.flip(0)]) for name, x in packed().items() if name != "labels"}
    mixed = model(**batch, task_names=["second", "first"]).logits
    for row, name in enumerate(("second", "first")):
        model.set_task(name)
        torch.testing.assert_close(mixed[row : row + 1], one_by_one(model), atol=5e-5, rtol=5e-5)
    with pytest.raises(ValueError, match="task_names"):
        model(**batch, task_names=["second", "first", "second", "first"])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_base_model_that_lets_sequences_see_each_other_is_refused(families: Any, placement: str) -> None:
    for name in ("OPT", "BERT"):
        model = learned(families[name], placement=placement)
        batch = packed()
        assert not keeps_apart(model)
        labels = batch.pop("labels") if name == "OPT" else torch.tensor([1])
        batch.pop("labels", None)
        with pytest.raises(ValueError, match="position_ids start again within a row, as in packed rows"):
            model(**batch, labels=labels)
    ones = torch.ones_like(batch["input_ids"])  # one sequence, whose positions are as the user wants them
    assert model(**batch, attention_mask=ones).logits.shape == (1, 3 if name == "BERT" else 40)


def test_a_state_that_passes_between_sequences_is_found(families: Any) -> None:
    """Falcon-H1's attention keeps them apart, its state-space layers do not."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    state = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
    config = FalconH1Config(**sizes, **state, vocab_size=40, num_key_value_heads=2, pad_token_id=1)
    model = learned(replace(families["Llama"], config=config))
    with pytest.raises(ValueError, match="FalconH1Model does not keep apart"):
        model(**packed())


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_encoder_decoders_take_no_packed_rows(families: Any, name: str) -> None:
    model = learned(families[name])
    with pytest.raises(ValueError, match=f"packed rows, which {type(model.base_model).__name__} does not"):
        model(**packed())


def test_heads_take_one_sequence_a_row(families: Any) -> None:
    model = learned(families["Llama"], task_type="sequence-classification")
    batch = {name: x for name, x in packed().items() if name != "labels"}
    with pytest.raises(ValueError, match="one label"):
        model(**batch, labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="one feature vector"):
        model.features(batch, task="first")


def test_a_cache_is_made_of_plain_rows_alone(packing_decoder: Any) -> None:
    model = learned(packing_decoder).eval()
    batch = {name: x for name, x in packed().items() if name != "labels"}
    with pytest.raises(ValueError, match="only without a cache"):
        model(**batch, use_cache=True)
    plain = batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    assert model(**plain)[CACHE].get_seq_length() == sum(LENGTHS)
    with pytest.raises(ValueError, match="only without a cache"):
        model(**batch, **{CACHE: model(**plain)[CACHE]})


def test_boundaries_without_position_ids_are_refused(families: Any) -> None:
    model = learned(families["Llama"])
    batch = packed(return_position_ids=False, return_flash_attn_kwargs=True)
    with pytest.raises(ValueError, match="cu_seq_lens_q is given without position_ids"):
        model(**batch)


def test_more_tokens_in_a_row_than_a_table_has_positions(families: Any) -> None:
    """Learned positions start again with each sequence, so the row may be longer than their table."""
    for placement in PLACEMENTS:
        model = learned(families["GPT-2"], placement=placement).eval()
        sequences, length = 40, 30
        ids = torch.randint(5, 40, (1, sequences * length))
        assert ids.shape[1] > model.base_model.config.n_positions
        positions = torch.arange(length).repeat(sequences)[None]
        with torch.no_grad():
            found = model(input_ids=ids, position_ids=positions).logits[:, -length:]
            torch.testing.assert_close(found, model(input_ids=ids[:, -length:]).logits, **CLOSE)


@pytest.mark.thorough
def test_it_compiles_into_one_graph(families: Any) -> None:
    model = learned(families["Llama"]).eval()
    batch = packed()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, **CLOSE)
    torch._dynamo.reset()


def test_masks_of_four_dimensions_are_refused(families: Any) -> None:
    model = learned(families["Llama"])
    batch = packed()
    apart = find_packed_sequence_indices(batch["position_ids"])
    mask = (apart[:, :, None] == apart[:, None, :])[:, None].tril()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 16, 16\)"):
        model(**batch, attention_mask=mask)
