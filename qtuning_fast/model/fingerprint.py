"""The fingerprint of a base model: a hash of samples of its weights, in whatever form they are stored."""

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

_SAMPLES = 64  # sampled values of each tensor


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash that identifies a base model: of the name, shape and evenly spaced samples of every weight.

    Samples are rounded to bfloat16, so a model has the same fingerprint in float32 and bfloat16. A quantised model,
    which computes something else, has another one. So does a model with an active peft adapter such as LoRA, whatever
    the adapter's name; inactive adapters do not count, and a merged one counts through the merged weights. The pooler
    is left out: features do not pass through it, and transformers initialises it at random if a checkpoint has none.

    Raises:
        ValueError: a weight is on the meta device and nowhere else.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_weights(model), key=lambda each: each[0]):
        if not name.startswith("pooler."):
            digest.update(json.dumps([name, list(tensor.shape), _sample(tensor)]).encode())
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield everything that determines the model's output, by its name without peft's wrappers.

    This includes the saved state beside parameters: quantised layers keep weights in buffers or packed objects.
    """
    named: dict[str, Any] = dict(model.named_parameters())
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # names of tied weights
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
    """Return a weight's name without peft's wrappers and adapter names; None for a weight that is not in use."""
    module: Any = model
    kept: list[str] = []
    parts = iter(name.split("."))
    for part in parts:
        in_use = _adapters_in_use(module)
        if in_use is None:
            kept.append(part)
        elif part == "original_module" and in_use:
            return None
        elif part not in ("base_layer", "original_module"):  # a container with one entry for each adapter
            module, container, part = getattr(module, part), part, next(parts, "")
            if part not in in_use:
                return None
            kept += [] if container == "modules_to_save" else [container, str(in_use.index(part))]
        module = getattr(module, part, None)
    return ".".join(kept)


def _adapters_in_use(module: Any) -> list[str] | None:
    """Return the adapters that affect a layer wrapped by peft; None for a module that is not such a wrapper."""
    wraps = hasattr(module, "base_layer") or hasattr(module, "original_module")
    if not wraps or not hasattr(module, "active_adapters"):
        return None
    if module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name not in getattr(module, "merged_adapters", ())]


def _sample(tensor: Tensor) -> list[Any]:
    """Return evenly spaced values; of composite tensors (quantised weights), those of their parts."""
    tensor = full_tensor(tensor)
    if is_traceable_wrapper_subclass(tensor):
        return [_sample(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0]]
    flat = (tensor.dequantize() if tensor.is_quantized else tensor).detach().flatten()
    picks = torch.linspace(0, max(0, len(flat) - 1), min(_SAMPLES, len(flat)), dtype=torch.float64).long()
    sample = flat[picks.to(flat.device)].cpu()
    return (sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample).tolist()
