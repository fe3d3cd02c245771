"""What stands for a PreTrainedModel: state dicts without frozen weights, and the base model's inputs by name."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.model.pretrained import PretrainedInterface, config_of_task

Batch = dict[str, Tensor]


@pytest.fixture
def model(tiny_bert: BertModel) -> QTuningModel:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=3, queue_size=3, shared_length=2))
    model.start_task("reviews", 3)
    return model


def test_a_state_dict_holds_what_is_ours(model: QTuningModel) -> None:
    state = model.state_dict()
    assert state.keys() == {f"learning.{name}" for name in model.learning.state_dict()}
    assert model.base_model.state_dict()  # has its own
    with torch.no_grad():
        for parameter in model.learning.parameters():
            parameter.zero_()
    ones = {name: value if name.endswith("extra_state") else torch.ones_like(value) for name, value in state.items()}
    model.load_state_dict(ones)
    assert all((parameter == 1).all() for parameter in model.learning.parameters())


def test_weights_that_train_in_the_base_model_are_in_it_too(model: QTuningModel) -> None:
    name = "encoder.layer.0.output.dense.weight"
    weight = model.base_model.get_parameter(name).requires_grad_(True)
    state = {each: value.clone() for each, value in model.state_dict().items()}
    assert [each for each in state if each.startswith("base_model.")] == [f"base_model.{name}"]
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    model.load_state_dict(state)
    assert torch.equal(weight, before)
    del state[f"base_model.{name}"]
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        model.load_state_dict(state)


def test_a_module_around_it_leaves_them_out_likewise(model: QTuningModel) -> None:
    around = nn.Sequential(nn.Linear(1, 1), model)
    state = around.state_dict()
    assert state.keys() == {"0.weight", "0.bias", *(f"1.{name}" for name in model.state_dict())}
    around.load_state_dict(state)


class Around(nn.Module):
    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model


def test_names_of_a_module_around_it_are_not_those_of_its_base_model(model: QTuningModel) -> None:
    weight = model.base_model.get_parameter("encoder.layer.0.output.dense.weight").requires_grad_(True)
    around = Around(model)
    state = around.state_dict()
    assert any(value.data_ptr() == weight.data_ptr() for value in state.values())
    around.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*base_model\.learning\.prefix"):
        around.load_state_dict({name: value for name, value in state.items() if ".prefix." not in name})
    beside = nn.ModuleList([Around(nn.Linear(1, 1)), model])
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.base_model\.weight"):
        beside.load_state_dict({f"1.{name}": value for name, value in model.state_dict().items()})


class Inner(nn.Module):
    def forward(self, input_ids: Tensor, boxes: Tensor, *args: Any, scale: float = 1.0, **kwargs: Any) -> None: ...


class Outer(PretrainedInterface):
    def forward(self, labels: Tensor | None = None, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return input_ids, labels, kwargs


def test_forward_takes_the_base_models_inputs_in_their_order_and_then_its_own() -> None:
    outer = Outer()
    outer.name_inputs(Inner())
    assert list(inspect.signature(outer.forward).parameters) == ["input_ids", "boxes", "scale", "labels", "kwargs"]
    assert outer(1, 2, labels=3) == (1, 3, {"boxes": 2})
    assert outer(1, labels=3, other=4) == (1, 3, {"other": 4})
    with pytest.raises(TypeError, match="2 inputs by position, but 3 were given"):
        outer(1, 2, 3)
    with pytest.raises(TypeError, match="got boxes by position and by name"):
        outer(1, 2, boxes=3)


class PassingOn(Outer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return "passed on", super().forward(*args, **kwargs)


class OfItsOwn(Outer):
    def forward(self, boxes: int, labels: Any = None, **kwargs: Any) -> Any:
        return super().forward(labels, boxes, **kwargs)


def test_a_subclass_gets_inputs_by_the_names_that_it_gives_them_or_by_those_of_the_base_model() -> None:
    passing, own = PassingOn(), OfItsOwn()
    for outer in (passing, own):
        outer.name_inputs(Inner())
    assert list(inspect.signature(passing.forward).parameters) == ["input_ids", "boxes", "scale", "labels", "kwargs"]
    assert passing(1, 2, labels=3) == ("passed on", (1, 3, {"boxes": 2}))
    assert own(1, 2) == (1, 2, {}) and list(inspect.signature(own.forward).parameters) == ["boxes", "labels", "kwargs"]


def test_forward_is_pickled_and_copied_with_its_model(model: QTuningModel, batch: Batch) -> None:
    model.eval()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert inspect.signature(again.forward) == inspect.signature(model.forward)
        with torch.no_grad():
            before = model(**batch).logits
            for parameter in again.learning.parameters():
                parameter.add_(1.0)
            assert torch.equal(model(**batch).logits, before)  # it is not the first model's
            assert not torch.equal(again(**batch).logits, before)


def test_a_tasks_config_is_the_base_models_with_other_classes() -> None:
    base = BertConfig(hidden_size=64)
    config = config_of_task(base, ("bad", "good", "fair"), "single_label_classification")
    assert type(config) is BertConfig and config.hidden_size == 64
    assert (config.num_labels, config.id2label[2], config.label2id["good"]) == (3, "fair", 1)
    assert base.num_labels == 2 and base.problem_type is None


def test_data_parallel_is_refused_by_name(model: QTuningModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.DataParallel calls `replicate` for each batch on several GPUs; here its copies to the devices are not made."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors] * 2)
    assert len(replicate.replicate(nn.Linear(1, 1), [0, 1])) == 2
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel.*torchrun"):
        replicate.replicate(model, [0, 1])
