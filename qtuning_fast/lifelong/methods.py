"""Methods by name: the settings that make a run Q-tuning, one of its peers, or the linear probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.method.config import QTuningConfig


@dataclass(frozen=True)
class Method:
    """A method as what it sets.

    Attributes:
        about: what it does, in one line.
        config, training: the fields of `QTuningConfig` and of `TrainingOptions` that it sets; others keep their
            defaults.
    """

    about: str
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def applied(
        self, config: QTuningConfig, training: TrainingOptions, *, given: frozenset[str] = frozenset()
    ) -> tuple[QTuningConfig, TrainingOptions]:
        """Return the settings with those of the method, except for the fields that are `given`."""
        return replace(config, **_without(self.config, given)), replace(training, **_without(self.training, given))


_ONE_PROMPT_AT_A_TIME = {
    "queue_size": 1,
    "shared_length": 0,
    "reweighting": None,
    "gate": None,
    "retention_weight": 0.0,
}

Q_TUNING = "q-tuning"

METHODS = {
    Q_TUNING: Method("Q-tuning (arXiv 2404.14607) with NoRGa's gate (arXiv 2405.14124): the defaults"),
    "progressive-prompts": Method(
        "Progressive Prompts (arXiv 2301.12314): every earlier prompt stays in front of the input, frozen",
        {"eviction": None, "shared_length": 0, "reweighting": None, "gate": None, "retention_weight": 0.0},
    ),
    "prompt-per-task": Method(
        "prompt tuning (arXiv 2104.08691; arXiv 2101.00190 in each layer): a prompt of its own for each task",
        _ONE_PROMPT_AT_A_TIME,
    ),
    "one-prompt": Method(
        "sequential prompt tuning: one prompt, which each task trains further",
        _ONE_PROMPT_AT_A_TIME | {"start_from": "last"},
    ),
    "probe": Method(
        "no prompts: the tuned linear probe of each task",
        _ONE_PROMPT_AT_A_TIME | {"prompt_length": 0, "reparameterization": None},
        {"steps": 0, "head_start": "probe"},
    ),
}


def method_by_name(name: str) -> Method:
    """Return one of `METHODS`.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]


def _without(settings: Mapping[str, Any], given: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in given}
