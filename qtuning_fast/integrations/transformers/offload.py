"""Models whose weights are not where they compute: dispatched or offloaded by accelerate, to the CPU or to a disk.

Between forward passes such a weight is a tensor on the meta device; accelerate's hook on its module, `_hf_hook`, knows
where the module computes and holds the weight itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """The device on which a model takes its inputs."""
    if model.device.type == "meta":
        for module in model.modules():
            for hook in _hooks(module):
                if getattr(hook, "execution_device", None) is not None:
                    return torch.device(hook.execution_device)
    return model.device


def loaded(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer of this name, or where it is offloaded what it holds.

    Raises:
        ValueError: it is on the meta device and nowhere else.
    """
    if not tensor.is_meta:
        return tensor
    path, _, leaf = name.rpartition(".")
    for hook in _hooks(model.get_submodule(path)):
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            return weights[leaf]
    raise ValueError(f"{type(model).__name__}: {name} is on the meta device; load the model's weights first")


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
