import json

import pytest

from qtuning_fast import QTuningConfig


def test_goes_to_json_and_back() -> None:
    config = QTuningConfig(gate=None, layers=(0, 2), queue_size=3, reparameterization=None)
    assert QTuningConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["layers"] == [0, 2]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("prompt_length", 0, ValueError),
        ("prompt_length", 1.5, TypeError),
        ("prompt_length", True, TypeError),
        ("queue_size", 0, ValueError),
        ("shared_length", -1, ValueError),
        ("rank", "1", TypeError),
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


def test_refuses_unknown_fields() -> None:
    with pytest.raises(ValueError, match="colour"):
        QTuningConfig.from_dict({"colour": "red"})
