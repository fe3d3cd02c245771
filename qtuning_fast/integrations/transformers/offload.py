"""Models whose weights accelerate has dispatched, or offloaded to the CPU or a disk.

Between forward passes an offloaded weight is a tensor on the meta device. accelerate's hook on its module, `_hf_hook`,
holds the weight itself and the device on which the module computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of a model's inputs."""
    if model.device.type == "meta":
        for module in model.modules():
            for hook in _hooks(module):
                if getattr(hook, "execution_device", None) is not None:
                    return torch.device(hook.execution_device)
    return model.device


def loaded(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a parameter or buffer of this name, loaded if it is offloaded.

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
