"""Checks that a task type, chosen layers and adapters from elsewhere fit a base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qtuning_fast.attention.checks import FLOATING
from qtuning_fast.attention.common import GATES
from qtuning_fast.integrations.transformers import AttentionLayer, main_input
from qtuning_fast.method.adapter import AdapterInfo, TaskAdapter, checked_labels
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.method.prompts import LayerShape


def chosen_layers(config: QTuningConfig, layers: Sequence[AttentionLayer]) -> list[int]:
    """Return the indices of the layers that get a prefix.

    Raises:
        ValueError: the config names a layer that the model lacks.
    """
    stacks = {layer.stack for layer in layers}
    there = [i for i, layer in enumerate(layers) if len(stacks) == 1 or config.stack in (layer.stack, "both")]
    if config.layers is None:
        return there
    if max(config.layers) >= len(there):
        raise ValueError(f"layers names layer {max(config.layers)}, but the model has layers 0 to {len(there) - 1}")
    return [there[index] for index in sorted(config.layers)]


def check_task_type(task_type: str, base_model: PreTrainedModel, *, causal: bool) -> None:
    """Raise a ValueError if the model is not of the kind that the task type needs."""
    reads = "images" if main_input(base_model) == "pixel_values" else "text"
    two_stacks, writes = base_model.config.is_encoder_decoder, base_model.can_generate()
    needs = {
        "sequence-classification": ("a model that reads text", reads == "text"),
        "image-classification": ("a model that reads images", reads == "images"),
        "text-to-text": ("an encoder-decoder with a language modelling head", two_stacks and writes),
        "causal-lm": ("a decoder with a language modelling head", causal and not two_stacks and writes),
    }
    needed, fits = needs[task_type]
    if not fits:
        raise ValueError(f"task_type={task_type!r} needs {needed}, which a {type(base_model).__name__} is not")


def check_adapter(
    adapter: TaskAdapter, shapes: Sequence[LayerShape], *, embedding_size: int | None, hidden_size: int | None
) -> None:
    """Raise a TypeError or ValueError if an adapter does not fit a model.

    Args:
        shapes: sizes of the layers that get a prefix.
        embedding_size: E, if prefixes are embeddings in front of the input.
        hidden_size: size of the features that heads take; None without heads.
    """
    if not isinstance(adapter, TaskAdapter):
        raise TypeError(f"adapter is a {type(adapter).__name__}; it must be a TaskAdapter")
    labels = adapter.label_names or None
    checked_labels(adapter.name, None, labels, required=False, problem_type=adapter.problem_type)
    check_tensors(adapter, shapes, embedding_size=embedding_size, hidden_size=hidden_size)


def check_tensors(
    adapter: TaskAdapter, shapes: Sequence[LayerShape], *, embedding_size: int | None, hidden_size: int | None
) -> None:
    """Raise a TypeError or ValueError if what an adapter computes with does not fit a model; see `check_adapter`."""
    if adapter.gate not in (None, *GATES):
        raise ValueError(
            f"adapter {adapter.name!r} has the gate {adapter.gate!r}; it must be None or one of {[*GATES]}"
        )
    shift = adapter.position_shift
    if isinstance(shift, bool) or not isinstance(shift, int) or shift < 0 or (shift and adapter.embeddings is not None):
        raise ValueError(
            f"adapter {adapter.name!r}: position_shift is {shift!r}; it must be an integer, 0 or more, and 0 with "
            "embeddings, which take positions of their own"
        )
    tensors = adapter.tensors()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"adapter {adapter.name!r}: {name} is {kind}; it must be a floating tensor")
        if not tensor.isfinite().all():
            raise ValueError(f"adapter {adapter.name!r}: {name} holds values that are not finite; train the task again")
    wanted = _shapes(adapter, shapes, embedding_size, hidden_size)
    for name in [*wanted, *tensors]:
        found = list(tensors[name].shape) if name in tensors else None
        fitting = wanted.get(name, [None])
        if found not in fitting:
            raise ValueError(
                f"adapter {adapter.name!r} does not fit this model: {name} is {_said(found)}; it must be "
                + " or ".join(map(_said, fitting))
            )


def check_stored(info: AdapterInfo, adapter: TaskAdapter, **sizes: Any) -> None:
    """Raise what `check_tensors` raises; it is what a registry calls for an adapter that was read from a file."""
    check_tensors(adapter, **sizes)


def _said(shape: list[int] | None) -> str:
    return "left out" if shape is None else str(shape)


def _shapes(
    adapter: TaskAdapter, shapes: Sequence[LayerShape], embedding_size: int | None, hidden_size: int | None
) -> dict[str, list[list[int] | None]]:
    """Return the allowed shapes of each tensor; None among them: it may be absent."""
    wanted: dict[str, list[list[int] | None]] = {}
    rows = adapter.prefix_rows if adapter.keys or adapter.embeddings is not None else 0
    for layer, shape in enumerate(shapes):
        if embedding_size is None:
            wanted[f"keys.{layer}"] = [[shape.num_kv_heads, rows, shape.key_size]]
            wanted[f"values.{layer}"] = [[shape.num_kv_heads, rows, shape.value_size]]
        if adapter.gate is not None:
            wanted[f"alphas.{layer}"] = wanted[f"taus.{layer}"] = [[], [shape.num_heads]]
    if embedding_size is not None:
        wanted["embeddings"] = [[rows, embedding_size]]
    if hidden_size is not None and (adapter.label_names or adapter.head_weight is not None):  # else only a prompt
        classes = len(adapter.label_names)
        wanted |= {"head.weight": [[classes, hidden_size]], "head.bias": [[classes]]}
    return wanted
