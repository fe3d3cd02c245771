"""What is kept of a finished task: its folded prefix, its gate and its head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtuning_fast.nn.gate import NO_GATE, gate_arguments


@dataclass(frozen=True)
class TaskAdapter:
    """A finished task, small and, once the queue is full, constant in size (Q-tuning, arXiv 2404.14607).

    Attributes:
        name: of the task.
        label_names: one a class.
        keys, values: the folded prefix, `[Hkv, P, D]` and `[Hkv, P, Dv]` a layer.
        gate: NoRGa's activation, or None.
        alphas, taus: `[]` or `[Hq]` a layer; empty without a gate.
        head_weight, head_bias: `[classes, hidden]` and `[classes]`.
    """

    name: str
    label_names: tuple[str, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    gate: str | None
    alphas: tuple[Tensor, ...]
    taus: tuple[Tensor, ...]
    head_weight: Tensor
    head_bias: Tensor

    @property
    def prefix_rows(self) -> int:
        return self.keys[0].shape[1]

    def arguments(self, device: torch.device) -> list[dict[str, Any]]:
        """For each layer the prefix as keyword arguments of `prefix_attention`."""
        placed = []
        for layer, (key, value) in enumerate(zip(self.keys, self.values)):
            gate = NO_GATE
            if self.gate is not None:
                gate = gate_arguments(self.gate, self.alphas[layer].to(device), self.taus[layer].to(device))
            placed.append({"prefix_key": key.to(device), "prefix_value": value.to(device), **gate})
        return placed

    def logits(self, features: Tensor) -> Tensor:
        """`[B, hidden]` to `[B, classes]`."""
        return F.linear(features, self.head_weight.to(features), self.head_bias.to(features))

    def tensors(self) -> dict[str, Tensor]:
        """By name, for saving."""
        named = {"head.weight": self.head_weight, "head.bias": self.head_bias}
        for kind in ("keys", "values", "alphas", "taus"):
            named |= {f"{kind}.{layer}": tensor for layer, tensor in enumerate(getattr(self, kind))}
        return named

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], *, name: str, label_names: Sequence[str], gate: str | None
    ) -> TaskAdapter:
        """What `tensors` gave."""

        def layers(kind: str) -> tuple[Tensor, ...]:
            count = sum(key.startswith(f"{kind}.") for key in tensors)
            return tuple(tensors[f"{kind}.{layer}"] for layer in range(count))

        return cls(
            name=name,
            label_names=tuple(label_names),
            keys=layers("keys"),
            values=layers("values"),
            gate=gate,
            alphas=layers("alphas"),
            taus=layers("taus"),
            head_weight=tensors["head.weight"],
            head_bias=tensors["head.bias"],
        )


def checked_labels(name: object, num_labels: object, label_names: Sequence[str] | None) -> tuple[str, ...]:
    """The label names of a new task, from what `start_task` was given.

    Raises:
        TypeError, ValueError: the name or the labels are not usable.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}; it must be a string")
    if not name:
        raise ValueError("name is empty; a task needs one")
    if label_names is None:
        if isinstance(num_labels, bool) or not isinstance(num_labels, int):
            raise TypeError(f"num_labels is {num_labels!r}; it must be an integer, or label_names must be given")
        label_names = [str(label) for label in range(num_labels)]
    elif num_labels not in (None, len(label_names)):
        raise ValueError(f"num_labels is {num_labels}, but label_names has {len(label_names)}")
    if len(label_names) < 2 or len(set(label_names)) < len(label_names):
        raise ValueError(f"num_labels: task {name!r} has the labels {list(label_names)}; it needs two, all different")
    return tuple(label_names)


def bank_arguments(adapters: Sequence[TaskAdapter], index: Tensor) -> list[dict[str, Any]]:
    """For each layer a bank of these adapters' prefixes, as keyword arguments of `prefix_attention`.

    Args:
        adapters: T adapters of one model.
        index: `[B]`, which of them each sample uses.
    """
    device = index.device
    lengths = torch.tensor([adapter.prefix_rows for adapter in adapters], device=device)
    longest = max(adapter.prefix_rows for adapter in adapters)

    def stacked(prefixes: Sequence[Tensor]) -> Tensor:
        return torch.stack([F.pad(prefix, (0, 0, 0, longest - prefix.shape[1])) for prefix in prefixes]).to(device)

    def gate(layer: int) -> dict[str, Any]:
        activation = adapters[0].gate
        if activation is None:
            return NO_GATE
        alpha = torch.stack([adapter.alphas[layer].reshape(-1) for adapter in adapters])
        tau = torch.stack([adapter.taus[layer].reshape(-1) for adapter in adapters])
        return gate_arguments(activation, alpha.to(device), tau.to(device))

    return [
        {
            "prefix_key": stacked([adapter.keys[layer] for adapter in adapters]),
            "prefix_value": stacked([adapter.values[layer] for adapter in adapters]),
            "prefix_index": index,
            "prefix_length": lengths,
            **gate(layer),
        }
        for layer in range(len(adapters[0].keys))
    ]
