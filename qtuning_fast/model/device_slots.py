"""Batches of several tasks: adapters in slots on the device, and a slot number for each sample.

An adapter is written into a slot when a batch first names it. It stays there until another needs the slot; the least
recently used adapter goes first. A forward pass therefore stacks no adapters, and a batch carries one number a sample.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtuning_fast.attention.arguments import PrefixArguments
from qtuning_fast.method.adapter import NO_HEAD, AdapterInfo, TaskAdapter
from qtuning_fast.method.gate import NO_GATE, gate_arguments
from qtuning_fast.method.prefix import Prefix
from qtuning_fast.model.backbone import Backbone
from qtuning_fast.model.registry import AdapterRegistry, Stored

StoredAdapter = Stored[AdapterInfo, TaskAdapter]

_FIRST_SLOTS = 4


@dataclass(frozen=True)
class MixedBatch:
    """A batch of B samples, each under its own task.

    Attributes:
        prefix: the prefixes in the slots as a bank, with each sample's slot as `index`, ready to be placed.
        names: each sample's task.
        classes: number of outputs of each sample's task; 0 without a head.
        problem_types: the problem type of each sample's task.
        head_weight, head_bias: `[slots, most classes, hidden]` and `[slots, most classes]`, −inf beyond a task's
            classes; None without heads.
    """

    prefix: Prefix
    names: tuple[str, ...]
    classes: tuple[int, ...]
    problem_types: tuple[str, ...]
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None

    def logits(self, features: Tensor) -> Tensor:
        """Map features `[B, hidden]` to logits `[B, most classes]` by each sample's head; −inf beyond its classes.

        Raises:
            RuntimeError: a task has no head.
        """
        if 0 in self.classes:
            raise RuntimeError(NO_HEAD.format(self.names[self.classes.index(0)]))
        assert self.head_weight is not None and self.head_bias is not None
        most, slots = max(self.classes), self.prefix.index
        weight = self.head_weight[:, :most][slots].to(features)  # [B, most classes, hidden]
        bias = self.head_bias[:, :most][slots].to(features)
        logits = torch.baddbmm(bias[..., None], weight, features[..., None]).squeeze(-1)
        return logits.to(features.dtype)  # under autocast the product is 16-bit

    @property
    def problem_type(self) -> str:
        """The problem type of all samples; raises a ValueError if there are several, which have no loss in common."""
        first = self.problem_types[0]
        for name, problem_type in zip(self.names, self.problem_types):
            if problem_type != first:
                raise ValueError(
                    f"labels: task {self.names[0]!r} has problem_type={first!r}, but task {name!r} has "
                    f"{problem_type!r}; give labels for tasks of one problem type at a time, or none"
                )
        return first


@dataclass(frozen=True)
class _SlotSize:
    """The capacity of a slot: rows P of a prefix, classes of a head, one gate a head or a layer."""

    rows: int = 0
    classes: int = 0
    gate_per_head: bool = False

    @classmethod
    def of(cls, infos: Iterable[AdapterInfo]) -> _SlotSize:
        """Return the smallest size that holds each of these adapters."""
        infos = list(infos)
        return cls(
            max((info.prefix_rows for info in infos), default=0),
            max((info.classes for info in infos), default=0),
            any(info.gate_per == "head" for info in infos),
        )

    def holds(self, other: _SlotSize) -> bool:
        return self.rows >= other.rows and self.classes >= other.classes and self.gate_per_head >= other.gate_per_head


@dataclass(frozen=True)
class _Part:
    """One tensor of a slot, and its value where an adapter has no entries."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    empty: float = 0.0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class AdapterSlots:
    """Adapters on a model's device, each in a slot: one tensor a layer holds the keys of all slots, and so on.

    Rows have the precision of their layer, to which attention rounds them anyway. In a causal model embeddings are
    stored as the keys and values that they become, which do not depend on the context.

    Args:
        store: source of the adapters. An adapter that is removed from it or replaced is never used again.
        backbone: model whose layers take the prefixes.
        layers: indices of these layers.
        embedding_size: E, if prefixes are embeddings in front of the input.
        hidden_size: size of the features that heads take; None without heads.
        device_bytes: bound on the slots' memory; None: at least as many slots as any batch has needed.
    """

    def __init__(
        self,
        store: AdapterRegistry,
        backbone: Backbone,
        layers: Sequence[int],
        *,
        embedding_size: int | None,
        hidden_size: int | None,
        device_bytes: int | None = None,
    ) -> None:
        self.device_bytes = device_bytes
        self._store = store
        self._backbone = backbone
        self._layers = layers
        self._embedding_size = embedding_size
        self._hidden_size = hidden_size
        self.clear()

    def clear(self) -> None:
        """Free all slots; they are allocated again when a batch needs them."""
        self._size = _SlotSize()
        self._where: tuple[Any, ...] = ()
        self._parts: dict[str, _Part] = {}
        self._slots: dict[str, Tensor] = {}  # name of an adapter's tensor -> [slots, ...]
        self._count = 0
        self._free: list[int] = []
        self._held: OrderedDict[str, tuple[StoredAdapter, int]] = OrderedDict()  # least recently used first

    @property
    def slots(self) -> int:
        """The current number of slots."""
        return self._count

    @property
    def bytes(self) -> int:
        """The size of all current slots in bytes."""
        return sum(tensor.nbytes for tensor in self._slots.values())

    @property
    def most(self) -> float:
        """How many adapters have room within the bound on memory, and so how many tasks a batch may have."""
        self._make_fit({})
        return self._most

    @property
    def held(self) -> list[str]:
        """The tasks that have a slot, least recently used first."""
        return list(self._held)

    def discard(self, name: str) -> None:
        """Free a task's slot, if it has one."""
        if name in self._held:
            self._free.append(self._held.pop(name)[1])

    def batch(self, names: Sequence[str]) -> MixedBatch:
        """Put the adapters of a batch into slots and return the batch.

        Args:
            names: a task of the store for each sample.

        Raises:
            ValueError: the tasks have different gates, or need more slots than the bound on memory allows.
            CorruptFileError: an adapter's file is missing or damaged.
        """
        entries = {name: self._store.entry(name) for name in dict.fromkeys(names)}
        gates = {entry.info.gate for entry in entries.values()} - {None}
        if len(gates) > 1:
            raise ValueError(f"one batch cannot use adapters with different gates, {sorted(map(str, gates))}")
        self._make_fit(entries)
        for name, entry in entries.items():
            if name in self._held and self._held[name][0] is entry:
                self._held.move_to_end(name)
            else:
                self.discard(name)
        for name, entry in entries.items():
            if name not in self._held:
                self._take_in(name, entry)
        infos = [entry.info for entry in entries.values()]
        index = self._index([self._held[name][1] for name in names])
        return MixedBatch(
            prefix=self._prefix(index, infos, next(iter(gates), None)),
            names=tuple(names),
            classes=tuple(entries[name].info.classes for name in names),
            problem_types=tuple(entries[name].info.problem_type for name in names),
            head_weight=self._slots.get("head.weight"),
            head_bias=self._slots.get("head.bias"),
        )

    # Slots

    def _make_fit(self, entries: dict[str, StoredAdapter]) -> None:
        """Allocate enough slots, large enough for these adapters, on the model's current devices."""
        where = self._backbone.device, self._backbone.dtype
        needed = _SlotSize.of(entry.info for entry in entries.values())
        if where != self._where or not self._size.holds(needed):
            self.clear()
            self._size = _SlotSize.of(entry.info for entry in self._store.entries())  # for all, so that this is rare
            self._where, self._parts = where, self._slot_parts()
        most = self._most
        if len(entries) > most:
            raise ValueError(
                f"the batch names {len(entries)} tasks, but device_bytes={self.device_bytes} has room for {most} "
                f"adapters of {self._slot_bytes} bytes; name fewer tasks, or raise the bound with set_memory_limits"
            )
        short = sum(name not in self._held for name in entries) - len(self._free)
        if short > 0:
            self._grow(int(min(max(self._count + short, 2 * self._count, _FIRST_SLOTS), most)))

    @property
    def _slot_bytes(self) -> int:
        return sum(part.bytes for part in self._parts.values())

    @property
    def _most(self) -> float:
        return math.inf if self.device_bytes is None else self.device_bytes // self._slot_bytes

    def _slot_parts(self) -> dict[str, _Part]:
        """Return the tensors of a slot by their names in an adapter."""
        backbone, size = self._backbone, self._size
        number = _Part((), torch.int64, backbone.device)
        parts = {"length": number, "position_shift": number}
        for layer, index in enumerate(self._layers):
            module, shape = backbone.injector.layers[index].module, backbone.injector.layers[index].shape
            dtype, device = _where_computes(module, backbone)
            if self._keeps_rows:
                parts[f"keys.{layer}"] = _Part((shape.num_kv_heads, size.rows, shape.key_size), dtype, device)
                parts[f"values.{layer}"] = _Part((shape.num_kv_heads, size.rows, shape.value_size), dtype, device)
            heads, wide = shape.num_heads if size.gate_per_head else 1, torch.promote_types(dtype, torch.float32)
            parts[f"alphas.{layer}"] = _Part((heads,), wide, device)  # alpha 0 for a task without a gate
            parts[f"taus.{layer}"] = _Part((heads,), wide, device, empty=1.0)
        wide = torch.promote_types(backbone.dtype, torch.float32)
        if not self._keeps_rows:
            assert self._embedding_size is not None
            parts["embeddings"] = _Part((size.rows, self._embedding_size), backbone.dtype, backbone.device)
        if self._hidden_size is not None:
            parts["head.weight"] = _Part((size.classes, self._hidden_size), wide, backbone.device)
            parts["head.bias"] = _Part((size.classes,), wide, backbone.device, empty=-math.inf)
        return parts

    @property
    def _keeps_rows(self) -> bool:
        return self._embedding_size is None or self._backbone.injector.is_causal

    @torch.no_grad()
    @torch.inference_mode(False)  # inference tensors cannot be written outside that mode
    def _grow(self, count: int) -> None:
        for name, part in self._parts.items():
            before = self._slots.get(name)
            slots = torch.full((count, *part.shape), part.empty, dtype=part.dtype, device=part.device)
            if before is not None:
                slots[: self._count] = before[: self._count]
            self._slots[name] = slots
        self._free += range(self._count, count)
        self._count = count

    def _take_in(self, name: str, entry: StoredAdapter) -> None:
        """Read an adapter and write it into a free slot, or else into the least recently used one."""
        adapter = self._store.load(entry)  # on an error the slots are unchanged
        if not self._free:
            self.discard(next(iter(self._held)))
        self._write(self._free[-1], adapter)
        self._held[name] = entry, self._free.pop()

    @torch.no_grad()
    @torch.inference_mode(False)
    def _write(self, slot: int, adapter: TaskAdapter) -> None:
        tensors = adapter.tensors()
        tensors["length"], tensors["position_shift"] = map(torch.tensor, (adapter.prefix_rows, adapter.position_shift))
        if adapter.embeddings is not None and self._keeps_rows:
            tensors |= self._rows_of(adapter.embeddings)
        for name, part in self._parts.items():
            room, tensor = self._slots[name][slot], tensors.get(name)
            room.fill_(part.empty)
            if tensor is not None:  # smaller than the slot, or a scalar to fill it with
                room[tuple(slice(size) for size in tensor.shape)] = tensor.to(room.device)

    def _rows_of(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Return the keys and values that a prompt `[P, E]` becomes in each layer of a causal model."""
        backbone = self._backbone
        with torch.autocast(backbone.device.type, enabled=False):  # slots outlive autocast
            rows = backbone.injector.rows_of_prompt(self._layers, embeddings.to(backbone.device))
        keys = {f"keys.{layer}": each["prefix_key"] for layer, each in enumerate(rows)}
        return keys | {f"values.{layer}": each["prefix_value"] for layer, each in enumerate(rows)}

    # A batch

    def _index(self, slots: list[int]) -> Tensor:
        device = self._backbone.device
        if device.type != "cuda":
            return torch.tensor(slots, device=device)
        return torch.tensor(slots, pin_memory=True).to(device, non_blocking=True)  # the host does not wait

    def _prefix(self, index: Tensor, infos: Sequence[AdapterInfo], gate: str | None) -> Prefix:
        slots, longest = self._slots, max(info.prefix_rows for info in infos)
        layers: list[PrefixArguments] = []
        for layer in range(len(self._layers)):
            alpha, tau = slots[f"alphas.{layer}"], slots[f"taus.{layer}"]
            arguments: PrefixArguments = {**(NO_GATE if gate is None else gate_arguments(gate, alpha, tau))}
            if self._keeps_rows:
                arguments |= {"prefix_key": slots[f"keys.{layer}"], "prefix_value": slots[f"values.{layer}"]}
            layers.append(arguments)
        if self._keeps_rows and self._embedding_size is not None:
            shift, largest = slots["length"], longest  # the prompt's keys and values take these positions
        else:
            shift, largest = slots["position_shift"], max(info.position_shift for info in infos)
        return Prefix(
            layers,
            # Rows cost as much time as tokens, so keep no more than the batch needs.
            embeddings=None if self._keeps_rows else slots["embeddings"][:, :longest],
            index=index,
            lengths=slots["length"],
            position_shift=shift if largest else None,
            largest_shift=largest,
        )


def _where_computes(module: nn.Module, backbone: Backbone) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and the device of an attention module, judged by its parameters."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            return parameter.dtype, parameter.device
    return torch.float32, backbone.device
