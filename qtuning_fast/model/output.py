"""The output of a model, and the batch size of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
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
        task_index: with `task_names="infer"` the place of each sample's task among the model's tasks, `[B]` int64.
        is_known: the same: whether each sample seems to be of any known task, `[B]` bool. It is answered all the same.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    retention_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    task_index: Tensor | None = None
    is_known: Tensor | None = None


_NOT_READ = ("labels", "label_ids", "decoder_", "cache_position", "num_items_in_batch", "logits_to_keep")
_FLAGS = ("interpolate_pos_encoding",)  # they change how an input is read
_SHARED = ("attention_mask", "position_ids", "token_type_ids")  # perhaps `[1, N]`
_COUNTED = ("input_ids", "inputs", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds")


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Return the number of samples in a forward pass's inputs; raise a ValueError if no input tells it."""
    for name in _COUNTED:
        if isinstance(inputs.get(name), Tensor):
            return inputs[name].shape[0]
    raise ValueError(f"the inputs hold none of {', '.join(_COUNTED)}, so the batch size is unknown; give one of them")


def read_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a call's inputs that the base model reads samples from: tensors with an entry a sample.

    What has one entry for all samples is given to each. Labels, what a decoder is given and settings of `generate` are
    not among them.
    """
    batch = batch_size(inputs)
    read = {}
    for name, x in inputs.items():
        if name in _SHARED and isinstance(x, Tensor) and x.ndim == 2 and x.shape[0] == 1:
            x = x.expand(batch, -1)
        if name in _FLAGS or (_has_samples(x, batch) and not name.startswith(_NOT_READ)):
            read[name] = x
    return read


def twice(inputs: dict[str, Any]) -> dict[str, Any]:
    """Repeat the inputs for a batch of twice the samples."""
    batch = batch_size(inputs)
    return {name: torch.cat([x, x]) if _has_samples(x, batch) else x for name, x in inputs.items()}


def _has_samples(x: Any, batch: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == batch
