"""The arms of the study: each differs from the defaults in what its name says, and runs come in order."""

from collections import Counter
from typing import Any

import pytest

from qtuning_fast import QTuningConfig
from qtuning_fast.bench.learning.arms import (
    ARMS,
    FIRST,
    LINEAR,
    PARTS,
    STUDY_STREAMS,
    TRAINING,
    WITHOUT,
    runs_of,
    smaller,
)
from qtuning_fast.lifelong.options import TrainingOptions

RELATED = STUDY_STREAMS["related"]


def differences(arm: str) -> dict[str, Any]:
    config, training = ARMS[arm].settings(RELATED, 3)
    defaults: dict[str, Any] = vars(QTuningConfig(queue_size=RELATED.queue_size))
    defaults |= vars(TrainingOptions(**TRAINING, seed=3))
    return {name: value for name, value in (vars(config) | vars(training)).items() if value != defaults[name]}


def test_the_first_arm_is_the_defaults() -> None:
    assert differences("start") == {}
    assert differences("from-random") == {"start_from": "random", "head_start": "random"}
    assert differences("closed-form-head") == {"start_from": "random"}


@pytest.mark.parametrize("arm", list(WITHOUT))
def test_each_arm_leaves_out_what_it_says(arm: str) -> None:
    names = {
        "no queue": {"queue_size"},
        "no reweighting": {"reweighting"},
        "no gate": {"gate"},
        "no shared prompt": {"shared_length", "retention_weight"},
        "no retention": {"retention_weight"},
        "fifo": {"eviction"},
        "random eviction": {"eviction"},
        "no queue, no shared prompt": {"queue_size", "shared_length", "retention_weight"},
        "no reweighting, no gate": {"reweighting", "gate"},
    }
    assert set(differences(arm)) == names[arm]


def test_methods_keep_their_own_queue() -> None:
    assert differences("prompt-per-task")["queue_size"] == 1
    assert differences("progressive-prompts").keys() >= {"eviction", "start_from"}


def test_runs_come_once_each_and_draw_by_draw() -> None:
    runs = list(runs_of(list(PARTS)))
    assert max(Counter(run.name for run in runs).values()) == 1
    first = [run for run in runs if (run.stream, run.shots) == ("related", 16)][:12]
    assert [run.draw for run in first] == [0] * 6 + [1] * 6 and first[0].arm == first[6].arm == LINEAR
    assert all(run.arm == LINEAR or run.arm in ARMS for run in runs)
    first = [run for run in runs if run.draw < FIRST]
    assert runs[: len(first)] == first and {run.stream for run in first} == set(
        STUDY_STREAMS
    )  # five draws of all first


def test_a_rehearsal_has_the_first_tasks() -> None:
    assert [source.name for source in smaller(RELATED, 2).sources] == ["movies", "amazon"]
    assert [source.name for source in RELATED.sources] == ["movies", "amazon", "tweets", "nyt", "airlines"]
    assert RELATED.sources[4].classes == ("negative", "positive")
