"""The output of a model, and the batch size of its inputs."""

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
        loss: the loss of the task's problem type plus η times the retention loss; None without labels.
        logits: `[B, classes]`, or the numbers that regression predicts; with `task_names` of several tasks
            `[B, most classes]`, −inf beyond a task's classes.
        retention_loss: `L_MR`; None if memory retention does not apply.
        hidden_states: those of the input, `[B, N, hidden]`, of the embeddings and of each layer, if they are requested.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    retention_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


_COUNTED = ("input_ids", "inputs", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds")


def batch_size(inputs: dict[str, Any]) -> int:
    """Return the number of samples in a forward pass's inputs; raise a ValueError if no input tells it."""
    for name in _COUNTED:
        if isinstance(inputs.get(name), Tensor):
            return inputs[name].shape[0]
    raise ValueError(f"the inputs hold none of {', '.join(_COUNTED)}, so the batch size is unknown; give one of them")


def twice(inputs: dict[str, Any]) -> dict[str, Any]:
    """Repeat the inputs for a batch of twice the samples."""
    batch = batch_size(inputs)
    return {
        name: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == batch else x
        for name, x in inputs.items()
    }
