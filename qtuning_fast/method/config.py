"""The choices that make a Q-tuning model, as one dataclass that goes to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from qtuning_fast.attention.common import GATES
from qtuning_fast.method.gate import GATE_PER
from qtuning_fast.method.queue import EVICTIONS

GATE_TRAINING = ("every-task", "first-task")
PLACEMENTS = ("prefix", "input")
REPARAMETERIZATIONS = ("mlp", None)
STACKS = ("encoder", "decoder", "both")
HEAD_TASK_TYPES = ("sequence-classification", "image-classification")  # a head for each task
TASK_TYPES = (*HEAD_TASK_TYPES, "text-to-text", "causal-lm")


@dataclass(frozen=True)
class QTuningConfig:
    """What a `QTuningModel` attaches to a base model.

    Q-tuning: Guo et al., NAACL Findings 2024, arXiv 2404.14607. NoRGa: Le et al., NeurIPS 2024, arXiv 2405.14124.

    Args:
        prompt_length: rows `l` of one task's prompt.
        queue_size: capacity `C` of the queue, in prompts; a prefix never exceeds `shared_length + C * l` rows.
        shared_length: rows of the prefix prompt `P*` that all tasks share; 0 leaves it out.
        rank: rank `R` of the reweighting `W = U Vᵀ` of older rows.
        gate: NoRGa's activation (`"tanh"`, `"sigmoid"`, `"gelu"`, `"relu"`, `"softplus"`, `"elu"`, `"identity"`), or
            None for plain prefix tuning.
        gate_per: one (alpha, tau) pair per `"layer"` or per `"head"`.
        gate_training: `"every-task"`, or `"first-task"` and frozen afterwards, as in NoRGa's published runs.
        placement: `"prefix"`, rows are keys and values in attention layers; `"input"`, rows are embeddings in front
            of the input.
        layers: indices of the attention layers that get a prefix; None for all of them.
        stack: where an encoder-decoder gets its prefixes: self-attention of the `"encoder"` (Q-tuning's own), of the
            `"decoder"`, or `"both"`. Models with one stack have only that one.
        reparameterization: `"mlp"`, one residual two-layer MLP shared by all layers while a prompt trains; or None.
        eviction: how a full queue makes room: `"pca"` (DQ-PCA), `"fifo"` or `"random"`.
        retention_weight: weight η of the memory retention loss; 0 switches it off, and so does `stack="decoder"`, since
            features are those of the encoder.
        task_type: `"sequence-classification"` and `"image-classification"` give each task a head on pooled features;
            `"text-to-text"` (encoder-decoders) and `"causal-lm"` use the base model's own language modelling head.

    Raises:
        TypeError, ValueError: a field is not what it must be; the message names it.
    """

    prompt_length: int = 10
    queue_size: int = 5
    shared_length: int = 10
    rank: int = 1
    gate: str | None = "tanh"
    gate_per: str = "layer"
    gate_training: str = "every-task"
    placement: str = "prefix"
    layers: tuple[int, ...] | None = None
    stack: str = "encoder"
    reparameterization: str | None = "mlp"
    eviction: str = "pca"
    retention_weight: float = 0.1
    task_type: str = "sequence-classification"

    def __post_init__(self) -> None:
        for name, least in (("prompt_length", 1), ("queue_size", 1), ("shared_length", 0), ("rank", 1)):
            _check_integer(name, getattr(self, name), least)
        for name, choices in (
            ("gate", (None, *GATES)),
            ("gate_per", GATE_PER),
            ("gate_training", GATE_TRAINING),
            ("placement", PLACEMENTS),
            ("stack", STACKS),
            ("reparameterization", REPARAMETERIZATIONS),
            ("eviction", EVICTIONS),
            ("task_type", TASK_TYPES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, choices))}"
                )
        weight = self.retention_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"retention_weight is {weight!r}; it must be a number")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"retention_weight is {weight}; it must be finite and not negative")
        object.__setattr__(self, "retention_weight", float(weight))
        if self.placement == "input":
            for name, only in (("layers", None), ("stack", "encoder")):
                if getattr(self, name) != only:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}; with placement='input' it must be {only!r}, since prompts "
                        "pass through all layers as tokens"
                    )
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))

    @property
    def longest_prompt(self) -> int:
        """The most rows that a task's prefix ever has."""
        return self.shared_length + self.queue_size * self.prompt_length

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        values = asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QTuningConfig:
        """The config of `to_dict`; a field this version does not know is a `ValueError`."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields in the config: {', '.join(unknown)}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> QTuningConfig:
        return cls.from_dict(json.loads(text))


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def _checked_layers(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise TypeError(f"layers is {layers!r}; it must be None or a list of layer indices")
    for index in layers:
        _check_integer("layers", index, 0)
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers is {list(layers)}; it must name at least one layer and none twice")
    return tuple(layers)
