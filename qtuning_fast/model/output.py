"""What a model gives back, and how many samples it was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class QTuningOutput(ModelOutput):
    """Output of a forward pass under a task.

    Attributes:
        loss: cross entropy plus η times the retention loss; None without labels.
        logits: `[B, classes]`; with `task_names` of several tasks `[B, most classes]`, −inf beyond a task's own.
        retention_loss: `L_MR`; None where memory retention is not due.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    retention_loss: Tensor | None = None


_COUNTED = ("input_ids", "inputs", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds")


def batch_size(inputs: dict[str, Any]) -> int:
    """How many samples the inputs of a forward pass, by name, are of; a ValueError where nothing tells."""
    for name in _COUNTED:
        if isinstance(inputs.get(name), Tensor):
            return len(inputs[name])
    raise ValueError(f"the inputs hold none of {', '.join(_COUNTED)}, by which the samples of a batch are counted")


def twice(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs for a batch of twice the samples."""
    batch = batch_size(inputs)
    return {
        name: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim > 0 and len(x) == batch else x
        for name, x in inputs.items()
    }
