"""Methods by name: the settings that make a run Q-tuning, one of its peers, or the linear probe."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.method.config import QTuningConfig

# Settings that say "at most": a method that takes fewer does so whatever is given, so that peers can share a command.
_AT_MOST = frozenset({"steps"})


@dataclass(frozen=True)
class Method:
    """A method as the settings that make it.

    Attributes:
        config, training: the fields of `QTuningConfig` and of `TrainingOptions` that it sets.
        rule: how it infers the task of an input, if it says so.
        answers: which of a run's answers without a task's name are the method's (`unnamed_results`).
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    rule: str | None = None
    answers: str = "adapters"

    def settings(
        self, config: Mapping[str, Any] | None = None, training: Mapping[str, Any] | None = None
    ) -> tuple[QTuningConfig, TrainingOptions]:
        """Return all settings: those given here take precedence over the method's, and those over the defaults.

        The number of steps is the most that a method may take: the probe takes none.

        Raises:
            TypeError, ValueError: a setting is unknown or wrong.
        """
        config, training = dict(config or {}), dict(training or {})
        left = self.without(config.keys() | training.keys())
        return QTuningConfig(**{**config, **left.config}), TrainingOptions(**{**training, **left.training})

    def without(self, names: Set[str]) -> Method:
        """Return the method without what it says of some settings, but for the number of steps."""
        config, training = (
            {name: value for name, value in part.items() if name not in names - _AT_MOST}
            for part in (self.config, self.training)
        )
        return replace(self, config=config, training=training)

    def changed(self, config: QTuningConfig, training: TrainingOptions) -> dict[str, Any]:
        """Return what these settings have in place of the method's own, by name."""
        parts: list[tuple[Any, Mapping[str, Any]]] = [(config, self.config), (training, self.training)]
        return {
            name: getattr(settings, name)
            for settings, own in parts
            for name, value in own.items()
            if getattr(settings, name) != value
        }


# As the papers train: prompts and heads start at random and end as training leaves them.
_FROM_RANDOM = {"start_from": "random", "head_start": "random", "head_end": "trained"}

# Nothing but what the task itself has learned.
_OWN_ALONE = {
    "queue_size": 1,
    "shared_length": 0,
    "reweighting": None,
    "gate": None,
    "retention_weight": 0.0,
}

_PROBE = Method(
    _OWN_ALONE | {"prompt_length": 0, "reparameterization": None},
    {"steps": 0, "start_from": "random", "head_start": "probe", "head_end": "trained"},
)

_HIDE = _OWN_ALONE | {"reparameterization": None, "layers": (0, 1, 2, 3, 4), "prompt_init": "uniform"}

# Rates are those for batches of 128: 0.03 · 128 / 256, and a tenth for heads.
_HIDE_TRAINING = {
    "start_from": "previous",
    "head_start": "random",
    "head_end": "trained",
    "prompt_rate": 0.015,
    "head_rate": 0.0015,
    "batch_size": 128,
    "contrast": 0.1,
    "prompt_momentum": 0.01,
    "joint_head": "covariance",
}

Q_TUNING = "q-tuning"

METHODS = {
    # The defaults: Q-tuning (arXiv 2404.14607) with NoRGa's gate (arXiv 2405.14124).
    Q_TUNING: Method(),
    # Progressive Prompts (arXiv 2301.12314): every earlier prompt stays, frozen.
    "progressive-prompts": Method(
        {"eviction": None, "shared_length": 0, "reweighting": None, "gate": None, "retention_weight": 0.0},
        _FROM_RANDOM,
    ),
    # Prompt tuning (arXiv 2104.08691), or in each layer prefix tuning (arXiv 2101.00190): each task has its own prompt.
    "prompt-per-task": Method(_OWN_ALONE, _FROM_RANDOM),
    # Sequential prompt tuning: one prompt, which each task trains further.
    "one-prompt": Method(_OWN_ALONE, _FROM_RANDOM | {"start_from": "previous"}),
    # No prompts: the tuned linear probe of each task.
    "probe": _PROBE,
    # HiDe-Prompt (arXiv 2310.07234): a prompt per task in the first five layers, and one head over all classes.
    "hide": Method(_HIDE, _HIDE_TRAINING, answers="joint_head"),
    # NoRGa (arXiv 2405.14124): the same with a gate, trained with the first task, then frozen.
    "norga": Method(
        _HIDE | {"gate": "tanh", "gate_training": "first-task"},
        _HIDE_TRAINING | {"gate_rate": None},
        answers="joint_head",
    ),
    # Nearest class mean (SimpleCIL, arXiv 2303.07338), and random features with ridge regression (arXiv 2307.02251).
    "simple-cil": replace(_PROBE, rule="nearest-mean", answers="nearest_class_mean"),
    "ranpac": replace(_PROBE, rule="ranpac", answers="ranpac"),
    # An upper mark: a logistic regression on examples of all tasks at once.
    "probe-joint": replace(_PROBE, answers="joint_regression"),
}


def method_by_name(name: str) -> Method:
    """Return one of `METHODS`.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]
