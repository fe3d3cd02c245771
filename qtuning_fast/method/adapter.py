"""The adapter of a finished task: its folded prefix, its gate and its head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixArguments
from qtuning_fast.method.gate import NO_GATE, gate_arguments
from qtuning_fast.method.labels import REGRESSION, SINGLE, check_problem_type
from qtuning_fast.method.prefix import Prefix

RANDOM, PREVIOUS, VALIDATION = "random", "previous", "validation"
"""What a task starts from, where it is not a finished task: random rows, the task before, or what suits it best."""

RESERVED_NAMES = ("infer", VALIDATION, RANDOM, PREVIOUS)
NO_HEAD = "task {!r} has no head, only a prompt: it yields features, but no logits"


@dataclass(frozen=True)
class AdapterInfo:
    """The description of an adapter, without its tensors; see `TaskAdapter`.

    Attributes:
        gate_per: `"layer"` or `"head"`: one pair (alpha, tau) for a layer or for each head; None without a gate.
        prefix_rows: P.
        classes: outputs of the head: its classes, or the numbers that regression predicts; 0 without a head.
        bytes: size of all tensors.
        problem_type: what the labels of the task mean (`qtuning_fast.method.labels`).
    """

    name: str
    label_names: tuple[str, ...]
    gate: str | None
    gate_per: str | None
    position_shift: int
    prefix_rows: int
    classes: int
    bytes: int
    problem_type: str = SINGLE


@dataclass(frozen=True)
class TaskAdapter:
    """A finished task, small and, once the queue is full, of constant size (Q-tuning, arXiv 2404.14607).

    Attributes:
        name: name of the task.
        label_names: one name a class, or a number that regression predicts; empty for a task without labels.
        keys, values: the folded prefix, `[Hkv, P, D]` and `[Hkv, P, Dv]` a layer; empty if there are embeddings.
        embeddings: the folded prompt `[P, E]` in front of the input, or None.
        gate: NoRGa's activation, or None.
        alphas, taus: `[]` or `[Hq]` a layer; empty without a gate.
        head_weight, head_bias: `[classes, hidden]` and `[classes]`; None without a head.
        position_shift: the number added to the context's position ids under this adapter.
        problem_type: what the labels of the task mean (`qtuning_fast.method.labels`).
    """

    name: str
    label_names: tuple[str, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    gate: str | None
    alphas: tuple[Tensor, ...]
    taus: tuple[Tensor, ...]
    head_weight: Tensor | None
    head_bias: Tensor | None
    embeddings: Tensor | None = None
    position_shift: int = 0
    problem_type: str = SINGLE

    @property
    def prefix_rows(self) -> int:
        return self.keys[0].shape[1] if self.embeddings is None else len(self.embeddings)

    @property
    def info(self) -> AdapterInfo:
        """Return the adapter's description."""
        per_head = any(alpha.ndim > 0 for alpha in self.alphas)
        return AdapterInfo(
            name=self.name,
            label_names=self.label_names,
            gate=self.gate,
            gate_per=None if self.gate is None else "head" if per_head else "layer",
            position_shift=self.position_shift,
            prefix_rows=self.prefix_rows,
            classes=0 if self.head_bias is None else len(self.head_bias),
            bytes=sum(tensor.nbytes for tensor in self.tensors().values()),
            problem_type=self.problem_type,
        )

    def prefix(self, device: torch.device, *, num_layers: int) -> Prefix:
        """Return the stored prefix, ready to be placed on this many layers."""
        layers = [self._rows(layer, device) | self._gate(layer, device) for layer in range(num_layers)]
        shift = torch.tensor([self.position_shift], device=device) if self.position_shift else None
        embeddings = None if self.embeddings is None else self.embeddings.to(device)
        return Prefix(layers, embeddings, position_shift=shift, largest_shift=self.position_shift)

    def _rows(self, layer: int, device: torch.device) -> PrefixArguments:
        if self.embeddings is not None:
            return {}
        return {"prefix_key": self.keys[layer].to(device), "prefix_value": self.values[layer].to(device)}

    def _gate(self, layer: int, device: torch.device) -> PrefixArguments:
        if self.gate is None:
            return NO_GATE
        return gate_arguments(self.gate, self.alphas[layer].to(device), self.taus[layer].to(device))

    def logits(self, features: Tensor) -> Tensor:
        """Map features `[B, hidden]` to logits `[B, classes]`.

        Raises:
            RuntimeError: the task has no head.
        """
        if self.head_weight is None or self.head_bias is None:
            raise RuntimeError(NO_HEAD.format(self.name))
        return F.linear(features, self.head_weight.to(features), self.head_bias.to(features))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for saving."""
        single = {"head.weight": self.head_weight, "head.bias": self.head_bias, "embeddings": self.embeddings}
        named = {name: tensor for name, tensor in single.items() if tensor is not None}
        for kind in ("keys", "values", "alphas", "taus"):
            named |= {f"{kind}.{layer}": tensor for layer, tensor in enumerate(getattr(self, kind))}
        return named

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: AdapterInfo) -> TaskAdapter:
        """Rebuild an adapter from the result of `tensors` and what `info` says of the rest."""

        def layers(kind: str) -> tuple[Tensor, ...]:
            count = sum(key.startswith(f"{kind}.") for key in tensors)
            return tuple(tensors[f"{kind}.{layer}"] for layer in range(count))

        return cls(
            name=info.name,
            label_names=info.label_names,
            keys=layers("keys"),
            values=layers("values"),
            embeddings=tensors.get("embeddings"),
            gate=info.gate,
            alphas=layers("alphas"),
            taus=layers("taus"),
            head_weight=tensors.get("head.weight"),
            head_bias=tensors.get("head.bias"),
            position_shift=info.position_shift,
            problem_type=info.problem_type,
        )


def check_not_reserved(name: str) -> None:
    """Raise a ValueError if a task's name means something else where tasks are named."""
    if name in RESERVED_NAMES:
        raise ValueError(
            f"name is {name!r}, which is no task name: {', '.join(map(repr, RESERVED_NAMES))} have a meaning of their "
            "own where tasks are named; choose another"
        )


def checked_labels(
    name: object,
    num_labels: object,
    label_names: Sequence[str] | None,
    *,
    required: bool,
    problem_type: str = SINGLE,
) -> tuple[str, ...]:
    """Return the label names of a new task, given the arguments of `start_task`.

    Args:
        required: whether the task needs labels; if not, it may have none.

    Raises:
        TypeError, ValueError: the name, the labels or the problem type are invalid.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}; it must be a string")
    if not name:
        raise ValueError("name is empty; a task needs a name")
    check_not_reserved(name)
    check_problem_type(problem_type)
    if label_names is None and num_labels is None and not required:
        return ()
    regresses = problem_type == REGRESSION
    if label_names is None:
        if num_labels is None and regresses:
            num_labels = 1
        if isinstance(num_labels, bool) or not isinstance(num_labels, int):
            raise TypeError(f"num_labels is {num_labels!r}; give an integer, or give label_names")
        label_names = [str(label) for label in range(num_labels)]
    elif num_labels not in (None, len(label_names)):
        raise ValueError(f"num_labels is {num_labels}, but label_names has {len(label_names)}")
    needed = "one" if regresses else "two"
    if len(label_names) < 2 - regresses or len(set(label_names)) < len(label_names):
        message = f"num_labels: task {name!r} has the labels {list(label_names)}; it needs {needed}, all different"
        if len(label_names) == 1:
            message += f'; a task that predicts a number has problem_type="{REGRESSION}"'
        raise ValueError(message)
    return tuple(label_names)
