"""Where tasks of a run start: by which examples, and what is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.probe import LinearProbe
from qtuning_fast.lifelong.task_start import START_EXAMPLES, START_EXAMPLES_A_CLASS, check_start, start_task
from qtuning_fast.lifelong.tasks import Examples, Task
from qtuning_fast.method.closed_form import LinearHead

FROM_RANDOM: dict[str, Any] = {"start_from": "random", "head_start": "random"}


def a_task(name: str, classes: int = 2) -> Task:
    some = Examples(["text"] * classes, list(range(classes)))
    return Task(name, [str(label) for label in range(classes)], some, some, some, source="toy")


def encoded(labels: Iterable[int]) -> EncodedExamples:
    numbers = torch.tensor(list(labels))
    ids = 1 + (torch.arange(6) * 7 + numbers[:, None] * 3 + torch.arange(len(numbers))[:, None]) % 38
    return EncodedExamples({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": numbers})


@pytest.fixture
def model(tiny_bert: BertModel) -> QTuningModel:
    torch.manual_seed(0)
    return QTuningModel(tiny_bert, QTuningConfig(prompt_length=2, shared_length=1, queue_size=3))


def start(model: QTuningModel, name: str, probe: LinearProbe | None = None, **options: Any) -> Mapping[str, Any]:
    train, validation = encoded([0, 1] * 6), encoded([0, 1] * 4)
    found = start_task(model, a_task(name), TrainingOptions(**options), train, validation, probe)
    assert found["start_seconds"] > 0
    model.finish_task()
    return found["start"]["chosen"]


def test_options_say_from_what_a_task_starts(model: QTuningModel) -> None:
    assert start(model, "first")["head"] == "closed-form"
    assert start(model, "second", **FROM_RANDOM) == {
        "rows": "random",
        "donor": None,
        "head": "random",
        "mixed_with": (),
        "loss": None,
    }
    found = start(model, "third", start_from="first", head_start="random")
    assert (found["rows"], found["donor"]) == ("prompt", "first")
    assert start(model, "fourth", start_from="seventh")["rows"] == "random"  # which is yet to come


def test_a_head_that_starts_as_the_probe_is_recorded_as_such(model: QTuningModel) -> None:
    probe = LinearProbe(LinearHead(torch.randn(2, model.hidden_size).double(), torch.randn(2).double()), 1.0)
    found = start(model, "first", probe, head_start="probe")
    assert found["head"] == "probe" and found["rows"] == "random"
    weight = model.adapters["first"].head_weight
    assert weight is not None
    torch.testing.assert_close(weight, probe.head.weight.float())


@pytest.mark.parametrize(("classes", "each"), [(2, 200), (64, 12)])
def test_of_many_examples_all_classes_have_a_share(
    model: QTuningModel, classes: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {}

    def noted(*_: Any, examples: Any, validation: Any, **__: Any) -> Any:
        seen["train"] = [batch["labels"] for batch in examples]
        return type("Started", (), {"to_dict": dict})()

    monkeypatch.setattr(model, "start_task", noted)
    train = encoded(sorted(list(range(classes)) * each))  # class after class
    start_task(model, a_task("many", classes), TrainingOptions(), train, encoded(range(classes)), None)
    counts = torch.bincount(torch.cat(seen["train"]), minlength=classes)
    wanted = max(START_EXAMPLES_A_CLASS, START_EXAMPLES // classes)
    assert (counts == min(wanted, each)).all()


def test_settings_that_lead_nowhere_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start_from is 'films'; it must be .* or one of the tasks: books"):
        check_start(QTuningConfig(), TrainingOptions(start_from="films"), ["books"])
    check_start(QTuningConfig(), TrainingOptions(start_from="films"), ["books", "films"])
    check_start(QTuningConfig(task_type="causal-lm"), TrainingOptions(), ["books"])
