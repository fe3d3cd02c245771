"""What fits a base model, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.method.adapter import TaskAdapter
from qtuning_fast.method.prompts import LayerShape
from qtuning_fast.model.compatibility import check_adapter, check_task_type, chosen_layers

Batch = dict[str, Tensor]
SMALL = {"prompt_length": 3, "queue_size": 3, "shared_length": 2}


def small_config(**changes: Any) -> QTuningConfig:
    return QTuningConfig(**(SMALL | changes))


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"layers": [3]}, ValueError, "layers.*layer 3.*0 to 2"),
        ({"task_type": "causal-lm"}, ValueError, "task_type='causal-lm' needs a decoder"),
        ({"task_type": "text-to-text"}, ValueError, "task_type='text-to-text' needs an encoder-decoder"),
        ({"task_type": "image-classification"}, ValueError, "needs a model that reads images"),
        ({"prompt_length": 40}, ValueError, "queue_size.*prompt_length"),
    ],
)
def test_configs_that_do_not_fit(
    tiny_bert: BertModel, changes: dict, error: type[Exception], named: str, attributes: Any
) -> None:
    before = attributes(tiny_bert)
    with pytest.raises(error, match=named):
        QTuningModel(tiny_bert, small_config(**changes))
    assert attributes(tiny_bert) == before and all(p.requires_grad for p in tiny_bert.parameters())


def test_only_the_chosen_layers_get_a_prefix(tiny_bert: BertModel, batch: Batch, train: Any) -> None:
    model = QTuningModel(tiny_bert, small_config(layers=[2, 0]))
    model.start_task("task", 2)
    held = [hasattr(layer.module, "qtuning_prefix") for layer in model.backbone.injector.layers]
    assert held == [True, False, True]
    train(model, batch)


def unfit(adapter: TaskAdapter) -> dict[str, Any]:
    short = tuple(key[..., :1] for key in adapter.keys)
    return {
        "keys.0 is": replace(adapter, keys=short),
        "values.2 is left out": replace(adapter, values=adapter.values[:2]),
        "keys.3 is": replace(adapter, keys=(*adapter.keys, adapter.keys[0])),
        "alphas.0 is": replace(adapter, alphas=tuple(torch.ones(3) for _ in adapter.alphas)),
        r"alphas.0 is \[\]; it must be left out": replace(adapter, gate=None, alphas=adapter.alphas[:2], taus=()),
        "head.weight is": replace(adapter, head_weight=torch.zeros(2, 5)),
        "head.bias is left out": replace(adapter, head_bias=None),
        "embeddings is": replace(adapter, embeddings=torch.zeros(3, 32)),
        "gate 'swish'": replace(adapter, gate="swish"),
        "labels": replace(adapter, label_names=("a",)),
        "name is empty": replace(adapter, name=""),
        "it must be a TaskAdapter": {"name": "dict"},
    }


def test_adapters_that_do_not_fit_are_refused(tiny_bert: BertModel, learned: Any) -> None:
    model = learned(tiny_bert, 1)
    adapter = replace(model.adapters["task-0"], name="new")
    for named, wrong in unfit(adapter).items():
        with pytest.raises((TypeError, ValueError), match=named):
            model.add_task(wrong)
    assert model.tasks == ["task-0"]
    model.add_task(adapter)


def test_adapters_that_could_not_be_computed_with_or_read_again_are_refused(tiny_bert: BertModel, learned: Any) -> None:
    model = learned(tiny_bert, 1)
    adapter = replace(model.adapters["task-0"], name="new")
    for shift in (-1, 1.5, True):
        with pytest.raises(ValueError, match="position_shift is"):
            model.add_task(replace(adapter, position_shift=shift))
    for keys in ([key.long() for key in adapter.keys], [key.tolist() for key in adapter.keys]):
        with pytest.raises(TypeError, match=r"keys\.0 is"):
            model.add_task(replace(adapter, keys=tuple(keys)))


def test_without_a_list_of_layers_those_of_the_chosen_stack_get_a_prefix(families: Any) -> None:
    one, two = (PrefixInjector(families[name].base_model()).layers for name in ("BERT", "BART"))
    stacks = [layer.stack for layer in two]
    assert stacks == ["encoder"] * 2 + ["decoder"] * 3
    for stack, expected in (("encoder", [0, 1]), ("decoder", [2, 3, 4]), ("both", [0, 1, 2, 3, 4])):
        assert chosen_layers(small_config(stack=stack), two) == expected
        assert chosen_layers(small_config(stack=stack), one) == [0, 1]  # the one stack, whatever it is called


def test_layers_are_counted_within_their_stack(families: Any) -> None:
    layers = PrefixInjector(families["BART"].base_model()).layers
    assert chosen_layers(small_config(stack="decoder", layers=[2, 0]), layers) == [2, 4]
    with pytest.raises(ValueError, match="layers names layer 2, but the model has layers 0 to 1"):
        chosen_layers(small_config(stack="encoder", layers=[2]), layers)


FITTING = {
    "BERT": {"sequence-classification"},
    "ViT": {"image-classification"},
    "T5": {"sequence-classification", "text-to-text"},
    "Llama": {"sequence-classification", "causal-lm"},
}


@pytest.mark.parametrize("name", FITTING)
def test_which_tasks_a_model_can_learn(name: str, families: Any) -> None:
    base, causal = families[name].base_model(), families[name].kind == "decoder"
    for task_type in ("sequence-classification", "image-classification", "text-to-text", "causal-lm"):
        if task_type in FITTING[name]:
            check_task_type(task_type, base, causal=causal)
        else:
            with pytest.raises(
                ValueError, match=rf"task_type='{task_type}' needs .*, which a {type(base).__name__} is not"
            ):
                check_task_type(task_type, base, causal=causal)


def test_embeddings_stand_in_for_keys_and_values() -> None:
    """One set of rows for all layers, and on each layer its gate."""
    shapes = [LayerShape(4, 4, 8, 8)] * 2
    gates = (torch.ones(()),) * 2
    in_front = TaskAdapter("new", (), (), (), "tanh", gates, gates, None, None, torch.ones(3, 32))
    check_adapter(in_front, shapes, embedding_size=32, hidden_size=None)
    with pytest.raises(ValueError, match=r"embeddings is \[3, 32\]; it must be \[3, 16\]"):
        check_adapter(in_front, shapes, embedding_size=16, hidden_size=None)
    with pytest.raises(ValueError, match=r"keys\.0 is left out"):
        check_adapter(in_front, shapes, embedding_size=None, hidden_size=None)
    with pytest.raises(ValueError, match="position_shift is 3"):
        check_adapter(replace(in_front, position_shift=3), shapes, embedding_size=32, hidden_size=None)


def test_numbers_that_are_none_fit_no_model(tiny_bert: BertModel) -> None:
    model = QTuningModel(tiny_bert, small_config())
    model.start_task("task", 2)
    adapter = model.finish_task()
    bias = torch.tensor([0.0, torch.inf])
    with pytest.raises(ValueError, match=r"adapter 'other': head\.bias holds values that are not finite"):
        model.add_task(replace(adapter, name="other", head_bias=bias))
    with pytest.raises(TypeError, match=r"head\.bias is torch\.complex64"):
        model.add_task(replace(adapter, name="other", head_bias=torch.zeros(2, dtype=torch.complex64)))
