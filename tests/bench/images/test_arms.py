"""The arms are what the declaration says of them."""

from __future__ import annotations

from qtuning_fast.attention.common import GATES
from qtuning_fast.bench.images.arms import ARMS, GATE_ARMS, STREAM, rule_of
from qtuning_fast.lifelong.streams import STREAMS
from qtuning_fast.method.config import QTuningConfig


def test_the_published_arms_differ_in_the_gate_alone() -> None:
    norga, hide = (ARMS[name].settings(STREAMS[STREAM], 3) for name in ("norga", "hide"))
    assert norga[0] != hide[0] and norga[1].to_dict() | {"gate_rate": 0} == hide[1].to_dict() | {"gate_rate": 0}
    differ = {name for name, value in norga[0].to_dict().items() if hide[0].to_dict()[name] != value}
    assert differ == {"gate", "gate_training"}
    assert norga[0].layers == (0, 1, 2, 3, 4) and norga[0].prompt_init == "uniform" and norga[0].prompt_length == 20
    training = norga[1]
    assert (training.prompt_rate, training.head_rate, training.rates("image-classification")["gate"]) == (
        0.0075,
        0.00075,
        0.0075,
    )
    assert (training.contrast, training.joint_head, training.start_from) == (0.1, "covariance", "previous")
    assert training.seed == 3 and training.steps == 50


def test_the_default_is_the_librarys() -> None:
    config, training = ARMS["default"].settings(STREAMS[STREAM], 0)
    assert config == QTuningConfig(task_type="image-classification", queue_size=5)
    assert training.steps == 50 and training.prompt_rate is None


def test_the_others_take_no_steps() -> None:
    for name in ("ranpac", "simple-cil"):
        config, training = ARMS[name].settings(STREAMS[STREAM], 0)
        assert config.prompt_length == 0 and training.steps == 0
    assert (rule_of(ARMS["ranpac"]), rule_of(ARMS["simple-cil"])) == ("ranpac", "nearest-mean")
    assert len(GATE_ARMS) == len(GATES) - 1 and STREAMS[STREAM].task_type == "image-classification"
