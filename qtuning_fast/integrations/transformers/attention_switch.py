"""The switch between a model's own attention and ours: its configs name the function that computes attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from qtuning_fast.integrations.transformers.interface import NAME
from qtuning_fast.integrations.transformers.layers import configs_of

# For the id of each config that names our attention: the config, its previous name, and the number of switches on.
_SWITCHED: dict[int, tuple[Any, str, int]] = {}


class AttentionSwitch:
    """Makes every config in a model name our attention, and restores the names that were there before.

    Models may share a config. It names our attention as long as the switch of one of them is on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._configs: list[Any] = []  # those that name our attention while the switch is on

    @property
    def is_on(self) -> bool:
        return len(self._configs) > 0  # PyTorch 2.11 cannot compile bool() of a list

    def on(self) -> None:
        """Switch to our attention, also where another one was chosen since the switch is on."""
        if not self._configs:
            self._configs = configs_of(self._model)
            for config in self._configs:
                _, before, users = _SWITCHED.get(id(config), (config, config._attn_implementation, 0))
                _SWITCHED[id(config)] = config, before, users + 1
        for config in self._configs:
            # The private name, because the public setter does more and would warn each time that a task is set.
            config._attn_implementation = NAME

    def off(self) -> None:
        """Switch back to the model's own attention."""
        for config in self._configs:
            _, before, users = _SWITCHED.pop(id(config))
            if users > 1:  # other models that share it still compute with their prefixes
                _SWITCHED[id(config)] = config, before, users - 1
            else:
                config._attn_implementation = before
        self._configs = []

    def check(self) -> None:
        """Raise a RuntimeError if another attention was chosen since the switch is on: it would see no prefix."""
        for config in self._configs:
            if config._attn_implementation != NAME:
                raise RuntimeError(
                    f"the base model's attention is {config._attn_implementation!r}, which was chosen while a task was "
                    "set and ignores prefixes; call set_task again, and choose attention while no task is set"
                )
