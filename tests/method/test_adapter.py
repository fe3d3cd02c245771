"""What is kept of a finished task: tensors by name, what is known without them, and the labels of a new task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qtuning_fast.method.adapter import AdapterInfo, TaskAdapter, checked_labels
from qtuning_fast.method.labels import REGRESSION, SINGLE

ROWS = tuple(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(layer)) for layer in range(3))
GATES = tuple(torch.full((4,), 0.5 + layer) for layer in range(3))
BESIDE = TaskAdapter("reviews", ("bad", "good"), ROWS, ROWS, "tanh", GATES, GATES, torch.ones(2, 8), torch.zeros(2))
IN_FRONT = TaskAdapter("reviews", (), (), (), None, (), (), None, None, torch.ones(6, 8), position_shift=6)


def test_what_is_known_without_the_tensors() -> None:
    rows, gates, head = 2 * 3 * 2 * 5 * 3, 2 * 3 * 4, 2 * 8 + 2
    info = AdapterInfo("reviews", ("bad", "good"), "tanh", "head", 0, 5, 2, 4 * (rows + gates + head))
    assert BESIDE.info == info
    assert IN_FRONT.info == AdapterInfo("reviews", (), None, None, 6, 6, 0, 4 * 6 * 8)
    per_layer = replace(BESIDE, alphas=(torch.ones(()),) * 3, taus=(torch.ones(()),) * 3)
    assert per_layer.info.gate_per == "layer"


@pytest.mark.parametrize("adapter", [BESIDE, IN_FRONT], ids=["beside the context", "in front of the input"])
def test_tensors_and_what_is_known_make_the_adapter_again(adapter: TaskAdapter) -> None:
    again = TaskAdapter.from_tensors(adapter.tensors(), adapter.info)
    assert again.info == adapter.info and again.tensors().keys() == adapter.tensors().keys()
    assert all(x is adapter.tensors()[name] for name, x in again.tensors().items())


def test_a_prefix_has_rows_and_gate_on_each_layer() -> None:
    prefix = BESIDE.prefix(torch.device("cpu"), num_layers=3)
    assert prefix.embeddings is None and prefix.position_shift is None and prefix.largest_shift == 0
    for layer, arguments in enumerate(prefix.arguments()):
        assert arguments.keys() == {"prefix_key", "prefix_value", "gate", "gate_alpha", "gate_tau"}
        assert torch.equal(arguments["prefix_key"], ROWS[layer]) and torch.equal(arguments["gate_tau"], GATES[layer])


def test_embeddings_stand_beside_layers_without_rows() -> None:
    prefix = IN_FRONT.prefix(torch.device("cpu"), num_layers=2)
    assert prefix.arguments() == [{"gate": None}] * 2
    assert prefix.embeddings is not None and prefix.embeddings.shape == (6, 8)
    assert prefix.position_shift is not None and prefix.position_shift.tolist() == [6] and prefix.largest_shift == 6


def test_logits_are_the_heads() -> None:
    features = torch.randn(3, 8)
    torch.testing.assert_close(BESIDE.logits(features), features.sum(1, keepdim=True).expand(-1, 2))
    with pytest.raises(RuntimeError, match="'reviews' has no head"):
        IN_FRONT.logits(features)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("reviews", 3, None), ("0", "1", "2")),
        (("reviews", None, ["bad", "good"]), ("bad", "good")),
        (("reviews", 2, ["bad", "good"]), ("bad", "good")),
    ],
)
def test_labels_are_named_or_counted(given: tuple[Any, ...], expected: tuple[str, ...]) -> None:
    assert checked_labels(*given, required=True) == expected


def test_labels_may_be_missing_where_none_are_required() -> None:
    assert checked_labels("reviews", None, None, required=False) == ()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((3, 2, None), TypeError, "name is 3"),
        (("", 2, None), ValueError, "name is empty"),
        (("reviews", None, None), TypeError, "num_labels is None"),
        (("reviews", True, None), TypeError, "num_labels is True"),
        (("reviews", 3, ["bad", "good"]), ValueError, "num_labels is 3, but label_names has 2"),
        (("reviews", 1, None), ValueError, "needs two"),
        (("reviews", None, ["good", "good"]), ValueError, "all different"),
    ],
)
def test_labels_that_are_no_use_are_refused(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        checked_labels(*given, required=True)


def test_regression_has_one_output_unless_more_are_named() -> None:
    given = {"required": True, "problem_type": REGRESSION}
    assert checked_labels("stars", None, None, **given) == ("0",)
    assert checked_labels("stars", 2, None, **given) == ("0", "1")
    assert checked_labels("stars", None, ["stars"], **given) == ("stars",)
    with pytest.raises(ValueError, match="it needs one, all different"):
        checked_labels("stars", 0, None, **given)
    with pytest.raises(ValueError, match=r'it needs two.*problem_type="regression"'):
        checked_labels("stars", 1, None, required=True)


def test_the_problem_type_is_kept() -> None:
    adapter = replace(BESIDE, problem_type=REGRESSION)
    assert BESIDE.info.problem_type == SINGLE and adapter.info.problem_type == REGRESSION
    assert TaskAdapter.from_tensors(adapter.tensors(), adapter.info).problem_type == REGRESSION
