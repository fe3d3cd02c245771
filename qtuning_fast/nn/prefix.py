"""What one attention layer attends to before its context: `[P* ; P_new ; W ∘ Q_old]`, and the gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtuning_fast.nn.gate import NO_GATE, Gate
from qtuning_fast.nn.reweighting import Reweighting

KEY_STD = 0.5  # keys that start tiny collapse onto one direction
VALUE_STD = 0.02


@dataclass(frozen=True)
class LayerShape:
    """The sizes of an attention layer: query heads, key/value heads, head size of keys and of values."""

    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int

    @property
    def row_features(self) -> int:
        """Length of a row's feature vector `[k ; v]`."""
        return self.num_kv_heads * (self.key_size + self.value_size)

    def to_rows(self, key: Tensor, value: Tensor) -> Tensor:
        """`[Hkv, n, D]` and `[Hkv, n, Dv]` as rows `[n, F]`."""
        return torch.cat([key.transpose(0, 1).flatten(1), value.transpose(0, 1).flatten(1)], dim=1)

    def from_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `[n, F]` as a key `[Hkv, n, D]` and a value `[Hkv, n, Dv]`."""
        sizes = (self.num_kv_heads * self.key_size, self.num_kv_heads * self.value_size)
        key, value = rows.split(sizes, dim=1)
        heads = (len(rows), self.num_kv_heads, -1)
        return key.reshape(heads).transpose(0, 1), value.reshape(heads).transpose(0, 1)


class LayerPrefix(nn.Module):
    """The trainable prefix of one attention layer (Q-tuning, arXiv 2404.14607; gate: NoRGa, arXiv 2405.14124).

    Rows are kept as feature vectors `[n, F]`, `F = Hkv * (D + Dv)`, the shape in which the queue holds them.

    Attributes:
        shared: `[S, F]`, the prefix prompt `P*` of all tasks.
        prompt: `[l, F]`, the prompt of the task in training; none before the first task.
        old: `[n, F]`, the queue's rows, frozen.
        reweight_key, reweight_value: `W` of the old rows; none while there are no old rows.
        gate: None for plain prefix tuning.
    """

    old: Tensor
    reweight_key: Reweighting | None
    reweight_value: Reweighting | None
    gate: Gate | None

    def __init__(self, shape: LayerShape, *, shared_length: int, rank: int, gate: str | None, per_head: bool) -> None:
        super().__init__()
        self.shape = shape
        self.rank = rank
        self.shared = nn.Parameter(self._new_rows(shared_length))
        self.prompt = nn.Parameter(self._new_rows(0))
        self.register_buffer("old", torch.zeros(0, shape.row_features), persistent=False)  # the queue saves its rows
        self.register_module("reweight_key", None)
        self.register_module("reweight_value", None)
        self.register_module("gate", None if gate is None else Gate(gate, shape.num_heads if per_head else None))

    def _new_rows(self, n: int) -> Tensor:
        """`n` rows, keys from N(0, 0.5²) and values from N(0, 0.02²)."""
        shape = self.shape
        keys = KEY_STD * torch.randn(n, shape.num_kv_heads * shape.key_size)
        values = VALUE_STD * torch.randn(n, shape.num_kv_heads * shape.value_size)
        return torch.cat([keys, values], dim=1)

    def no_rows(self) -> tuple[Tensor, Tensor]:
        """Rows and scale of an empty queue."""
        return self.old.new_zeros(0, self.shape.row_features), self.old.new_zeros(0)

    def begin(self, prompt_length: int, old: Tensor, row_scale: Tensor) -> None:
        """A new prompt in front of the queue's rows, whose reweighting starts at `row_scale` (`[n]`)."""
        device = self.shared.device
        shape = self.shape
        self.prompt = nn.Parameter(self._new_rows(prompt_length).to(device))
        self.old = old.to(device)
        self.reweight_key = self.reweight_value = None
        if len(old):
            heads = shape.num_kv_heads
            self.reweight_key = Reweighting(row_scale, heads, shape.key_size, self.rank).to(device)
            self.reweight_value = Reweighting(row_scale, heads, shape.value_size, self.rank).to(device)

    def row_weights(self) -> Tensor:
        """`W` of the old rows as `[n, F]`."""
        if self.reweight_key is None or self.reweight_value is None:
            return torch.ones_like(self.old)
        return self.shape.to_rows(self.reweight_key.weights(), self.reweight_value.weights())

    def arguments(self, prompt: Tensor) -> dict[str, Any]:
        """The prefix as keyword arguments of `prefix_attention`.

        Args:
            prompt: `[l, F]`, the new prompt as it is or after a reparametrisation.
        """
        key, value = self.shape.from_rows(torch.cat([self.shared, prompt, self.old]))
        n_shared = len(self.shared) + len(prompt)
        arguments: dict[str, Any] = {"prefix_key": key, "prefix_value": value, "n_shared": n_shared}
        if self.reweight_key is not None and self.reweight_value is not None:
            for name, weighting in (("reweight_key", self.reweight_key), ("reweight_value", self.reweight_value)):
                unweighted = weighting.U.new_zeros(n_shared, self.rank)
                arguments[name] = (torch.cat([unweighted, weighting.U]), weighting.V)
        return arguments | (NO_GATE if self.gate is None else self.gate.arguments())

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """The prefix with `W` baked in: key `[Hkv, P, D]`, value `[Hkv, P, Dv]`."""
        key, value = self.shape.from_rows(torch.cat([self.shared, self.prompt, self.row_weights() * self.old]))
        return key.clone(), value.clone()
