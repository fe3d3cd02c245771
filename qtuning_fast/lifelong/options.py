"""How each task of a stream is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TrainingOptions:
    """The budget and the rates of one task; every task of a run gets the same.

    AdamW without weight decay, gradients clipped at norm 1, a tenth of the steps warm up, then a cosine decay.

    Args:
        steps: optimiser steps at most.
        batch_size: examples a step.
        eval_batch_size: examples a batch when evaluating.
        max_length: tokens a text is cut or padded to, so that all steps cost the same.
        prompt_rate: of the prompts, the shared prompt and the reweighting.
        head_rate, gate_rate: of the head; of the gate's alpha and tau.
        network_rate: of the reparametrisation MLP and the discriminator.
        eval_every: steps between looks at the validation split; a checkpoint is written at each.
        patience: looks without a gain before a task stops early; 0 never stops early. The best look is what is kept.
        seed: of everything random in the run.

    Raises:
        TypeError, ValueError: a field is not what it must be; the message names it.
    """

    steps: int = 100
    batch_size: int = 16
    eval_batch_size: int = 64
    max_length: int = 64
    prompt_rate: float = 3e-3
    head_rate: float = 1e-2
    gate_rate: float = 1e-3
    network_rate: float = 1e-3
    eval_every: int = 20
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int,) if field.type == "int" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise TypeError(
                    f"{field.name} is {value!r}; it must be {'an integer' if len(kinds) == 1 else 'a number'}"
                )
            least = 0 if field.name in ("patience", "seed") else 1
            if len(kinds) == 1 and value < least:
                raise ValueError(f"{field.name} is {value}; it must be at least {least}")
            if len(kinds) == 2 and not 0 <= value < float("inf"):
                raise ValueError(f"{field.name} is {value}; it must be finite and not negative")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)
