"""The frozen base model: what it computes, what is read off it, and that it is given back as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.method.pooling import first_token, last_token, mean_pool
from qtuning_fast.model.backbone import Backbone

Batch = dict[str, Tensor]
LABELS = torch.tensor([0, 1, 1, 0])
TinyConfig = Callable[..., BertConfig]
SMALL = {"prompt_length": 3, "queue_size": 3, "shared_length": 2}


def small_config(**changes: Any) -> QTuningConfig:
    return QTuningConfig(**(SMALL | changes))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_a_task_and_after_detach_the_base_model_is_what_it_was(
    batch: Batch, implementation: str, tiny_config: TinyConfig, learn: Any, logits: Any, attributes: Any
) -> None:
    base = BertForSequenceClassification(tiny_config())
    base.set_attn_implementation(implementation)
    base.bert.encoder.layer[1].eval()
    base.bert.embeddings.requires_grad_(False)
    state = copy.deepcopy(base.state_dict())
    before = attributes(base), [p.requires_grad for p in base.parameters()]
    with torch.no_grad():
        expected = copy.deepcopy(base).eval()(**batch).logits
    model = QTuningModel(base, small_config())
    assert base.config._attn_implementation == implementation
    assert torch.equal(model(**batch).logits, expected)
    learn(model, batch, 4)
    assert not torch.equal(logits(model, batch, "task-3"), expected)
    assert torch.equal(logits(model, batch, None), expected)
    model.set_task("task-1")
    assert model.detach() is base
    assert (attributes(base), [p.requires_grad for p in base.parameters()]) == before
    assert base.config._attn_implementation == implementation
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in state.items())
    with torch.no_grad():
        assert torch.equal(base.eval()(**batch).logits, expected)


def test_a_base_model_with_a_head_lends_its_encoder(
    tiny_bert: BertModel, batch: Batch, tiny_config: TinyConfig, learn: Any, logits: Any
) -> None:
    with_head = BertForSequenceClassification(tiny_config())
    with_head.bert.load_state_dict(tiny_bert.state_dict())
    answers = []
    for base in (tiny_bert, with_head):
        torch.manual_seed(0)
        model = QTuningModel(base, small_config())
        learn(model, batch, 2)
        answers.append(logits(model, batch, "task-1"))
    assert torch.equal(*answers)


def test_without_a_task_labels_and_options_go_to_the_base_model(batch: Batch, tiny_config: TinyConfig) -> None:
    model = QTuningModel(BertForSequenceClassification(tiny_config()), small_config())
    output = model(**batch, labels=LABELS, output_hidden_states=True)
    assert output.loss is not None and len(output.hidden_states) == 4


def test_a_detached_model_takes_no_task(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    model.detach()
    for call in (lambda: model.set_task("task-0"), lambda: model.start_task("new", 2)):
        with pytest.raises(RuntimeError, match="detach"):
            call()


def test_a_model_that_is_attached_to_is_refused_until_it_is_detached(
    tiny_bert: BertModel, batch: Batch, learn: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    with pytest.raises(ValueError, match="attached already"):
        QTuningModel(tiny_bert, small_config())
    assert model(**batch).logits.isfinite().all()
    QTuningModel(model.detach(), small_config()).detach()


def test_an_implementation_chosen_in_between_is_kept(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    tiny_bert.set_attn_implementation("eager")
    learn(model, batch, 1)
    assert model.detach().config._attn_implementation == "eager"


def test_features_are_those_of_the_token_that_has_read_everything(families: Any) -> None:
    """The mean in an encoder, the last token in a decoder, the class token of an image."""
    for name, pool in (("BERT", mean_pool), ("T5", mean_pool), ("Llama", last_token), ("ViT", first_token)):
        base, inputs = families[name].base_model(), families[name].batch()
        inputs.pop("decoder_input_ids", None)
        backbone = Backbone(base, "prefix")
        with torch.no_grad():
            hidden = backbone.encoder(**inputs).last_hidden_state
            expected = pool(hidden, inputs.get("attention_mask"))
            assert torch.equal(backbone.encode(inputs), expected), name
        assert expected.shape == (3, backbone.hidden_size)


@pytest.mark.parametrize("use_cache", [True, False])
def test_features_need_no_cache(use_cache: bool, families: Any) -> None:
    backbone, inputs = Backbone(families["Llama"].base_model(), "prefix"), families["Llama"].batch()
    with torch.no_grad():
        assert torch.equal(backbone.encode(inputs | {"use_cache": use_cache}), backbone.encode(inputs))


def test_what_only_a_decoder_takes_is_no_part_of_what_is_read(families: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, inputs = Backbone(families["T5"].base_model(), "prefix"), families["T5"].batch()
    given: list[str] = []
    monkeypatch.setattr(backbone, "encode", lambda inputs, *_: given.extend(inputs))
    backbone.read(inputs | {"logits_to_keep": 1})
    assert "decoder_input_ids" in inputs and given == ["input_ids", "attention_mask"]


def test_embeddings_in_front_of_the_input_are_of_the_vocabularys_size(families: Any) -> None:
    electra, vit = (Backbone(families[name].base_model(), "prefix") for name in ("ELECTRA", "ViT"))
    assert electra.vocabulary is not None and electra.vocabulary.num_embeddings == 40
    assert (electra.embedding_size, electra.hidden_size) == (16, 32)
    assert vit.vocabulary is None and vit.embedding_size == vit.hidden_size == 32


@pytest.mark.parametrize(
    ("inputs", "always", "named"),
    [
        ({"output_attentions": True}, True, "attention weights are never formed"),
        ({"return_dict": False}, False, "the output is always a dict"),
        ({"attention_mask": torch.ones(2, 1, 1, 5)}, False, r"shape \(2, 1, 1, 5\).*must be \[B, N\]"),
    ],
)
def test_inputs_that_a_prefix_does_not_go_with(
    inputs: dict[str, Any], always: bool, named: str, tiny_bert: BertModel
) -> None:
    backbone = Backbone(tiny_bert, "prefix")
    with pytest.raises(ValueError, match=named):
        backbone.check_inputs(inputs, under_a_task=True)
    if always:
        with pytest.raises(ValueError, match=named):
            backbone.check_inputs(inputs, under_a_task=False)
    else:
        backbone.check_inputs(inputs, under_a_task=False)


def test_a_model_without_words_to_write_does_not_generate(families: Any) -> None:
    Backbone(families["Llama"].base_model(), "prefix").check_generates()
    with pytest.raises(ValueError, match="BertModel has no language modelling head"):
        Backbone(families["BERT"].base_model(), "prefix").check_generates()


def test_layers_that_checkpoint_write_into_no_cache(families: Any) -> None:
    backbone, inputs = Backbone(families["Llama"].base_model(), "prefix"), families["Llama"].batch()
    assert backbone.compute_under_a_task(inputs, None).past_key_values is not None
    backbone.model.gradient_checkpointing_enable()
    backbone.freeze(training=True)
    assert backbone.compute_under_a_task(inputs, None).past_key_values is None
    backbone.freeze(training=False)
    assert backbone.compute_under_a_task(inputs, None).past_key_values is not None


def test_a_wrapper_of_pefts_is_taken_off_and_given_back(tiny_bert: BertModel) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_bert, peft.LoraConfig(target_modules=["query"], r=2))
    backbone = Backbone(wrapped, "prefix")
    assert backbone.model is tiny_bert
    backbone.check_attached()
    assert backbone.detach() is wrapped
    with pytest.raises(RuntimeError, match=r"detached by detach\(\)"):
        backbone.check_attached()
