"""The settings of Q-tuning and NoRGa, as one dataclass that goes to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qtuning_fast.attention.common import GATES
from qtuning_fast.method.gate import GATE_PER
from qtuning_fast.method.queue import EVICTIONS
from qtuning_fast.method.settings import check_integer, check_settings, documented, from_file, setting, to_file

GATE_TRAINING = ("every-task", "first-task")
PROMPT_INITS = ("default", "uniform")
PLACEMENTS = ("prefix", "input")
REPARAMETERIZATIONS = ("default", "mlp", None)
REWEIGHTINGS = ("low-rank", None)
STACKS = ("encoder", "decoder", "both")
HEAD_TASK_TYPES = ("sequence-classification", "image-classification")  # a head for each task
TASK_TYPES = (*HEAD_TASK_TYPES, "text-to-text", "causal-lm")


@documented
@dataclass(frozen=True)
class QTuningConfig:
    """What a `QTuningModel` attaches to a base model.

    Q-tuning: Guo et al., NAACL Findings 2024, arXiv 2404.14607. NoRGa: Le et al., NeurIPS 2024, arXiv 2405.14124.

    Raises:
        TypeError, ValueError: a setting has a wrong value; the message names the setting.
    """

    prompt_length: int = setting(10, "Rows of a task's prompt; 0: heads alone.", "Q-tuning calls it `l`.", least=0)
    prompt_init: str = setting(
        "default",
        "{choices}.",
        "What random rows are. `default`: keys from N(0, 0.5²) and values from N(0, 0.02²); in front of the input, "
        "embeddings of random words, or N(0, 0.02²) where there are none. `uniform`: U(−1, 1), as in NoRGa.",
        choices=PROMPT_INITS,
        absent="default",
    )
    queue_size: int = setting(
        5,
        "Capacity in prompts.",
        "A prefix never has more than `shared_length + queue_size * prompt_length` rows, unless `eviction` is `none`.",
    )
    shared_length: int = setting(
        10, "Rows of the shared prompt.", "All tasks share this prompt `P*`; 0 leaves it out.", least=0
    )
    reweighting: str | None = setting(
        "low-rank",
        "{choices}.",
        "`low-rank` learns a weight for each feature of older rows, `W = U V`. With `none` they keep the scale at "
        "which the queue holds them, 1 before any eviction.",
        choices=REWEIGHTINGS,
        absent="low-rank",
    )
    rank: int = setting(1, "Rank of the reweighting.", "It is the `R` of `W = U V`.")
    gate: str | None = setting(
        "tanh", "{choices}.", "NoRGa's activation; `none` is plain prefix tuning.", choices=(*GATES, None)
    )
    gate_per: str = setting(
        "layer", "{choices}.", "Each layer, or each head, has its own alpha and tau.", choices=GATE_PER
    )
    gate_training: str = setting(
        "every-task",
        "{choices}.",
        "`first-task` freezes the gate after the first task, as NoRGa's published runs do.",
        choices=GATE_TRAINING,
    )
    placement: str = setting(
        "prefix",
        "prefix, in each layer; or input, in front of it.",
        "The rows are keys and values in attention layers, or embeddings in front of the input.",
        choices=PLACEMENTS,
    )
    layers: tuple[int, ...] | None = setting(
        None, "Layers with a prefix, such as 0,1,2; default all.", "The numbers are indices of attention layers."
    )
    stack: str = setting(
        "encoder",
        "Of an encoder-decoder: {choices}.",
        "The prefixes go into the self-attention of this stack; Q-tuning uses the encoder. A model with one stack has "
        "only that one.",
        choices=STACKS,
    )
    reparameterization: str | None = setting(
        "default",
        "{choices}.",
        "While a prompt trains, `mlp` computes it by one residual two-layer MLP that all layers share. `default` is "
        "`mlp` with heads, and `none` for language models, whose prompts train at higher rates. Once made, a config "
        "says which.",
        choices=REPARAMETERIZATIONS,
    )
    eviction: str | None = setting(
        "pca",
        "{choices}.",
        "A full queue makes room in this way; `pca` is DQ-PCA. With `none` the queue is never full: it keeps every "
        "prompt, and each task costs more than the last.",
        choices=EVICTIONS,
    )
    retention_weight: float = setting(
        0.1,
        "Weight of memory retention; 0: off.",
        "Q-tuning calls it `η`. It keeps what the shared prompt knows, from the first eviction on. Without a shared "
        "prompt or evictions it is off, and with `stack='decoder'`, since its features come from the encoder.",
    )
    task_type: str = setting(
        "sequence-classification",
        "{choices}.",
        "The two classifications give each task a head on pooled features; `text-to-text` (for encoder-decoders) and "
        "`causal-lm` use the base model's own language modelling head.",
        choices=TASK_TYPES,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "retention_weight", float(self.retention_weight))
        if self.reparameterization == "default":
            object.__setattr__(self, "reparameterization", "mlp" if self.task_type in HEAD_TASK_TYPES else None)
        if self.prompt_length == 0 and self.task_type not in HEAD_TASK_TYPES:
            raise ValueError(f"prompt_length is 0, but task_type={self.task_type!r} has no heads to train; raise it")
        if self.placement == "input":
            for name, only in (("layers", None), ("stack", "encoder")):
                if getattr(self, name) != only:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}; with placement='input' it must be {only!r}, since prompts "
                        "pass through all layers as tokens"
                    )
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))

    def most_rows(self, tasks: int) -> int:
        """The most rows that a prefix has after so many tasks; once the queue is full, it has no more."""
        prompts = tasks if self.eviction is None else min(tasks, self.queue_size)
        return self.shared_length + prompts * self.prompt_length

    @property
    def longest_prompt(self) -> int:
        """The most rows that a task's prefix ever has.

        Raises:
            ValueError: with `eviction=None` there is no such number; see `most_rows`.
        """
        if self.eviction is None:
            raise ValueError("eviction is None, so prefixes grow with every task; ask for most_rows(tasks)")
        return self.most_rows(self.queue_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, for `from_dict`."""
        return to_file(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QTuningConfig:
        """The config of `to_dict`, also of an earlier version; a field this version does not know is a `ValueError`."""
        return from_file(cls, values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> QTuningConfig:
        return cls.from_dict(json.loads(text))


def _checked_layers(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise TypeError(f"layers is {layers!r}; it must be None or a list of layer indices")
    for index in layers:
        check_integer("layers", index, 0)
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers is {list(layers)}; it must name at least one layer and none twice")
    return tuple(layers)
