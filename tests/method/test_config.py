import json

import pytest

from qtuning_fast import QTuningConfig

IN_0_1_0 = {
    *("prompt_length", "queue_size", "shared_length", "rank", "gate", "gate_per", "gate_training", "placement"),
    *("layers", "stack", "reparameterization", "eviction", "retention_weight", "task_type"),
}


def test_goes_to_json_and_back() -> None:
    config = QTuningConfig(gate=None, layers=(0, 2), queue_size=3, reparameterization=None)
    assert QTuningConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["layers"] == [0, 2]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("prompt_length", -1, ValueError),
        ("prompt_length", 1.5, TypeError),
        ("prompt_length", True, TypeError),
        ("queue_size", 0, ValueError),
        ("shared_length", -1, ValueError),
        ("rank", "1", TypeError),
        ("reweighting", "full", ValueError),
        ("gate", "swish", ValueError),
        ("gate_per", "model", ValueError),
        ("gate_training", "never", ValueError),
        ("placement", "suffix", ValueError),
        ("layers", [], ValueError),
        ("layers", [0, 0], ValueError),
        ("layers", [-1], ValueError),
        ("layers", ["0"], TypeError),
        ("layers", "012", TypeError),
        ("layers", 3, TypeError),
        ("reparameterization", "lstm", ValueError),
        ("eviction", "lru", ValueError),
        ("retention_weight", -0.1, ValueError),
        ("retention_weight", float("nan"), ValueError),
        ("retention_weight", float("inf"), ValueError),
        ("retention_weight", "1", TypeError),
        ("task_type", "regression", ValueError),
    ],
)
def test_refuses(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        QTuningConfig(**{field: value})  # type: ignore[arg-type]


def test_a_file_of_an_earlier_version_means_what_it_meant_then() -> None:
    written = QTuningConfig().to_dict()
    assert written.keys() == IN_0_1_0  # so that version reads it
    assert QTuningConfig.from_dict(written) == QTuningConfig()
    config = QTuningConfig(reweighting=None, eviction=None)
    assert config.to_dict().items() >= {"reweighting": None, "eviction": None}.items()
    assert QTuningConfig.from_dict(config.to_dict()) == config


def test_rows_grow_until_the_queue_is_full_or_without_end() -> None:
    config = QTuningConfig(prompt_length=4, shared_length=3, queue_size=2)
    assert [config.most_rows(tasks) for tasks in (1, 2, 3)] == [7, 11, 11] and config.longest_prompt == 11
    config = QTuningConfig(prompt_length=4, shared_length=3, queue_size=2, eviction=None)
    assert [config.most_rows(tasks) for tasks in (1, 2, 3)] == [7, 11, 15]
    with pytest.raises(ValueError, match="eviction is None"):
        _ = config.longest_prompt


def test_refuses_unknown_fields() -> None:
    with pytest.raises(ValueError, match="colour"):
        QTuningConfig.from_dict({"colour": "red"})
    with pytest.raises(TypeError, match="is a list; it must be a dict"):
        QTuningConfig.from_json("[]")
