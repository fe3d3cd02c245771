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
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

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


# The papers' own starts.
_FROM_RANDOM = {"start_from": "random", "head_start": "random"}

# Nothing but what the task itself has learned.
_OWN_ALONE = {
    "queue_size": 1,
    "shared_length": 0,
    "reweighting": None,
    "gate": None,
    "retention_weight": 0.0,
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
    "probe": Method(
        _OWN_ALONE | {"prompt_length": 0, "reparameterization": None},
        {"steps": 0, "start_from": "random", "head_start": "probe"},
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
