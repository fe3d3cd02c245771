"""What is kept of a finished task: its folded prefix, its gate and its head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
        return [
            {"prefix_key": key.to(device), "prefix_value": value.to(device), **_gate(self.gate, alpha, tau, device)}
            for key, value, alpha, tau in zip(self.keys, self.values, *self._gates())
        ]

    def logits(self, features: Tensor) -> Tensor:
        """`[B, hidden]` to `[B, classes]`."""
        return F.linear(features, self.head_weight.to(features), self.head_bias.to(features))

    def _gates(self) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        nothing = [None] * len(self.keys)
        return (self.alphas or nothing), (self.taus or nothing)

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

    bank = []
    for layer in range(len(adapters[0].keys)):
        arguments: dict[str, Any] = {
            "prefix_key": stacked([adapter.keys[layer] for adapter in adapters]),
            "prefix_value": stacked([adapter.values[layer] for adapter in adapters]),
            "prefix_index": index,
            "prefix_length": lengths,
        }
        gate = adapters[0].gate
        if gate is None:
            bank.append(arguments | _gate(None, None, None, device))
            continue
        alpha, tau = (
            torch.stack([getattr(adapter, kind)[layer].reshape(-1) for adapter in adapters])
            for kind in ("alphas", "taus")
        )
        bank.append(arguments | _gate(gate, alpha, tau, device))
    return bank


def _gate(gate: str | None, alpha: Tensor | None, tau: Tensor | None, device: torch.device) -> dict[str, Any]:
    if gate is None or alpha is None or tau is None:
        return {"gate": None}
    return {"gate": gate, "gate_alpha": alpha.to(device), "gate_tau": tau.to(device)}
