"""What tells base models apart: their weights, and neither their precision nor where the weights are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.integrations.transformers import without_head
from qtuning_fast.model.fingerprint import fingerprint

Batch = dict[str, Tensor]
SMALL = {"prompt_length": 3, "queue_size": 3, "shared_length": 2}


def small_config(**changes: Any) -> QTuningConfig:
    return QTuningConfig(**(SMALL | changes))


def test_another_base_model_is_refused(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any, learn: Any, attributes: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(model.detach())
    with torch.no_grad():
        other.encoder.layer[2].output.dense.weight.mul_(1.01)
    before = attributes(other)
    with pytest.raises(ValueError, match="another base model"):
        QTuningModel.from_pretrained(other, tmp_path)
    assert attributes(other) == before
    assert QTuningModel.from_pretrained(tiny_bert.bfloat16(), tmp_path).tasks == ["task-0"]  # only rounded: the same


@pytest.fixture(params=["BERT", "Llama"])
def plain(request: pytest.FixtureRequest, families: Any) -> Any:
    return families[request.param]


def mark(base: Any) -> str:
    return fingerprint(without_head(base))


def lora(family: Any, base: Any, name: str = "default", lora_alpha: int = 6) -> Any:
    """A copy of the base model in peft's wrapper, with LoRA at random in its queries and values."""
    peft = pytest.importorskip("peft")
    targets = {"BERT": ["query", "value"], "Llama": ["q_proj", "v_proj"]}[family.name]
    settings = peft.LoraConfig(target_modules=targets, r=2, lora_alpha=lora_alpha)
    wrapped = peft.get_peft_model(copy.deepcopy(base), settings, adapter_name=name)
    torch.manual_seed(3)
    for each, parameter in wrapped.named_parameters():
        if "lora_" in each:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


def test_lora_changes_the_fingerprint_only_where_it_changes_the_model(plain: Any) -> None:
    base = plain.base_model()
    wrapped, renamed = lora(plain, base), lora(plain, base, "other")
    with_lora = mark(wrapped.get_base_model())
    assert with_lora == mark(renamed.get_base_model()) != mark(base)
    assert mark(lora(plain, base, lora_alpha=5).get_base_model()) != with_lora
    with wrapped.disable_adapter():
        assert mark(wrapped.get_base_model()) == mark(base)
    wrapped.add_adapter("unused", wrapped.peft_config["default"])
    assert mark(wrapped.get_base_model()) == with_lora
    wrapped.merge_adapter(["default"])
    merged = mark(wrapped.get_base_model())
    assert merged == mark(renamed.merge_and_unload()) != with_lora


def test_weights_that_are_nowhere_have_no_fingerprint(plain: Any) -> None:
    with pytest.raises(ValueError, match="is on the meta device; load the model's weights first"):
        mark(plain.base_model().to("meta"))


def change_a_weight(base: Any) -> None:
    with torch.no_grad():
        base.encoder.layer[0].output.dense.weight.mul_(1.01)


def change_a_name(base: Any) -> None:
    base.encoder.layer[0].output.add_module("renamed", base.encoder.layer[0].output.dense)
    del base.encoder.layer[0].output.dense


def change_a_shape(base: Any) -> None:
    dense = base.encoder.layer[0].intermediate.dense  # the same numbers in the same order
    dense.weight = nn.Parameter(dense.weight.detach().view(dense.weight.shape[1], dense.weight.shape[0]))


def change_a_buffer(base: Any) -> None:
    base.register_buffer("scale", torch.ones(()))


@pytest.mark.parametrize("change", [change_a_weight, change_a_name, change_a_shape, change_a_buffer])
def test_what_a_model_computes_with_makes_it_another(change: Callable[[Any], None], tiny_bert: BertModel) -> None:
    other = copy.deepcopy(tiny_bert)
    assert fingerprint(other) == fingerprint(tiny_bert)
    change(other)
    assert fingerprint(other) != fingerprint(tiny_bert)


def test_what_a_model_does_not_compute_with_makes_no_difference(tiny_bert: BertModel) -> None:
    """Its precision, its mode, what trains, and a pooler that transformers made at random."""
    expected = fingerprint(tiny_bert)
    nn.init.normal_(tiny_bert.pooler.dense.weight)
    assert fingerprint(tiny_bert.train().requires_grad_(False)) == expected
    assert fingerprint(tiny_bert.bfloat16()) == expected


def test_a_tied_weight_counts_once(tiny_config: Callable[..., BertConfig]) -> None:
    tied = BertForMaskedLM(tiny_config())
    untied = copy.deepcopy(tied)
    untied.cls.predictions.decoder.weight = nn.Parameter(tied.cls.predictions.decoder.weight.detach().clone())
    assert fingerprint(tied) != fingerprint(untied)
    del untied.cls.predictions.decoder._parameters["weight"]
    assert fingerprint(tied) == fingerprint(untied)
