"""What tells one base model from another: a hash of samples of its weights, however they are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers import loaded
from qtuning_fast.model.distributed import full_tensor

_SAMPLES = 64  # values of each tensor that go into the fingerprint


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """A hash that tells base models apart: names, shapes and evenly spaced samples of every weight.

    The samples are rounded to bfloat16, so a model loaded in float32 and in bfloat16 is the same; a quantised one
    computes something else and is another. So is one with an adapter of peft's in use, such as LoRA, whatever the
    adapter is called; adapters that are off do not count, and a merged one counts as the weights it was merged into.
    The pooler is left out: features do not pass through it, and transformers makes a random one where a checkpoint has
    none.

    Raises:
        ValueError: a weight is on the meta device and nowhere else.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_weights(model), key=lambda each: each[0]):
        if not name.startswith("pooler."):
            digest.update(json.dumps([name, list(tensor.shape), _sample(tensor)]).encode())
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that decides what the model computes, by the name it has without peft's wrappers.

    Parameters, and what else is saved with them: quantised layers keep their weights in buffers or in packed objects.
    """
    named: dict[str, Any] = dict(model.named_parameters())
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # of tied weights
    named |= {name: value for name, value in model.state_dict().items() if name not in aliases}
    for name, value in named.items():
        plain = _plain_name(model, name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        for number, tensor in enumerate(tensors if plain is not None else ()):
            yield f"{plain}.{number}" if number else str(plain), loaded(model, name, tensor)
    for name, module in model.named_modules():
        for number, adapter in enumerate(_adapters_in_use(module) or ()):
            if adapter in getattr(module, "scaling", {}):
                plain = _plain_name(model, name)
                yield f"{plain}.scaling.{number}", torch.tensor(float(module.scaling[adapter]))


def _plain_name(model: nn.Module, name: str) -> str | None:
    """A weight's name without peft's wrappers and adapter names; None for what is not in use."""
    module: Any = model
    kept: list[str] = []
    parts = iter(name.split("."))
    for part in parts:
        in_use = _adapters_in_use(module)
        if in_use is None:
            kept.append(part)
        elif part == "original_module" and in_use:
            return None
        elif part not in ("base_layer", "original_module"):  # a container with one entry an adapter
            module, container, part = getattr(module, part), part, next(parts, "")
            if part not in in_use:
                return None
            kept += [] if container == "modules_to_save" else [container, str(in_use.index(part))]
        module = getattr(module, part, None)
    return ".".join(kept)


def _adapters_in_use(module: Any) -> list[str] | None:
    """The adapters that change what a layer wrapped by peft computes; None for a module that is no such wrapper."""
    wraps = hasattr(module, "base_layer") or hasattr(module, "original_module")
    if not wraps or not hasattr(module, "active_adapters"):
        return None
    if module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name not in getattr(module, "merged_adapters", ())]


def _sample(tensor: Tensor) -> list[Any]:
    """Values at even distances; of tensors made of others (quantised weights) those of their parts."""
    tensor = full_tensor(tensor)
    if is_traceable_wrapper_subclass(tensor):
        return [_sample(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0]]
    flat = (tensor.dequantize() if tensor.is_quantized else tensor).detach().flatten()
    picks = torch.linspace(0, max(0, len(flat) - 1), min(_SAMPLES, len(flat)), dtype=torch.float64).long()
    sample = flat[picks.to(flat.device)].cpu()
    return (sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample).tolist()
