"""The training prefix of a model: shared prompt, new prompt and queue, with the gates and the reparametrisation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from qtuning_fast.attention.arguments import PrefixArguments
from qtuning_fast.method.adapter import AdapterInfo, TaskAdapter
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.method.gate import NO_GATE, Gate
from qtuning_fast.method.labels import SINGLE
from qtuning_fast.method.prefix import Prefix
from qtuning_fast.method.prompts import InputPrompt, LayerPrefix, LayerShape, PromptRows
from qtuning_fast.method.queue import Eviction, PromptQueue
from qtuning_fast.method.reparameterization import ResidualReparameterization
from qtuning_fast.method.reweighting import Reweighting
from qtuning_fast.model.distributed import synchronize


class TrainingPrefix(nn.Module):
    """The training prefix `[P* ; P_new ; W ∘ Q_old]`, the gates, and the queue that holds `Q_old`.

    With `placement="prefix"` each chosen layer has its own rows of keys and values; with `placement="input"` all layers
    share one set of rows, which are embeddings. Each layer has its own gate in both cases.

    Args:
        shapes: sizes of the layers that get a prefix.
        config: see `QTuningConfig`.
        vocabulary, embedding_size: for rows that are embeddings, their source and their length.

    Attributes:
        queue: the rows of finished prompts.
        last_eviction: the eviction at the start of the current task, or None.
        reparameterization: the network that new prompts pass through while they train.

    Raises:
        ValueError: the config does not fit these layers.
    """

    reparameterization: ResidualReparameterization | None

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        config: QTuningConfig,
        *,
        vocabulary: nn.Embedding | None = None,
        embedding_size: int = 0,
    ) -> None:
        super().__init__()
        in_input = config.placement == "input"
        _check_rows(config, {embedding_size} if in_input else {shape.row_features for shape in shapes})
        self.config = config
        rank = None if config.reweighting is None else config.rank
        settings: dict[str, Any] = {
            "shared_length": config.shared_length,
            "rank": rank,
            "uniform": config.prompt_init == "uniform",
        }
        self._rows = nn.ModuleList(
            [InputPrompt(vocabulary, embedding_size, **settings)]
            if in_input
            else [LayerPrefix(shape, **settings) for shape in shapes]
        )
        heads = [shape.num_heads if config.gate_per == "head" else None for shape in shapes]
        self._gates = nn.ModuleList() if config.gate is None else nn.ModuleList(Gate(config.gate, n) for n in heads)
        self._layer_count = len(shapes)
        self.requires_grad_(False)
        self.register_module("reparameterization", None)
        self.queue = PromptQueue(config.queue_size, config.prompt_length, eviction=config.eviction)
        self.last_eviction: Eviction | None = None

    def load_queue(self, state: dict[str, Tensor]) -> None:
        """Restore the state of the queue.

        Raises:
            ValueError: it is not one of these layers.
        """
        self.queue.load_state_dict(state)
        held = list(zip(self.queue.rows, self.queue.row_scale)) or [rows.no_rows() for rows in self.rows]
        sizes = [rows.no_rows()[0].shape[1] for rows in self.rows]
        right = len(held) == len(sizes) and self.queue.evictions >= 0 and not state["evictions"].is_floating_point()
        for (rows, scale), size in zip(held, sizes):
            right = right and rows.is_floating_point() and scale.is_floating_point()
            right = right and rows.shape == (len(held[0][0]), size) and scale.shape == rows.shape[:1]
        if not right:
            raise ValueError("the queue of the checkpoint is not one of this model's layers")

    @property
    def rows(self) -> list[PromptRows]:
        """The rows of each layer; a single entry if they are embeddings."""
        return cast("list[PromptRows]", list(self._rows))

    @property
    def gates(self) -> list[Gate]:
        """The gate of each layer; empty without a gate."""
        return cast("list[Gate]", list(self._gates))

    @property
    def reweightings(self) -> list[Reweighting]:
        """The parts of `W` of all layers."""
        return [reweighting for rows in self.rows for reweighting in rows.reweightings]

    def reweighting_loss(self) -> Tensor:
        """Return the mean squared distance of `W` from where it starts; 0 where nothing is reweighted."""
        far = [
            (rows.row_weights() - rows.row_scale[:, None]).square().mean() for rows in self.rows if rows.reweightings
        ]
        return torch.stack(far).mean() if far else self.rows[0].shared.new_zeros(())

    @property
    def prompt_length(self) -> int:
        """The number of rows of the newest prompt; 0 before the first task."""
        return len(self.rows[0].prompt)

    def begin_task(self, *, first: bool) -> None:
        """Push the finished prompt into the queue and start a new one; everything except old rows is trainable.

        Args:
            first: whether no task was learned before, so that there is no finished prompt.
        """
        prompts = [rows.prompt.detach().cpu() for rows in self.rows]  # the queue stays on the CPU
        if not first:
            weights = [rows.row_weights().detach().cpu() for rows in self.rows]
            seed = torch.randint(2**31, ())
            synchronize([seed])
            self.last_eviction = self.queue.push(prompts, weights, seed=int(seed))
        self.begin_prompts(self.config.prompt_length)
        self._rows.requires_grad_(True)
        self._gates.requires_grad_(first or self.config.gate_training == "every-task")
        if self.config.reparameterization == "mlp":
            row = self.rows[0].shared
            self.reparameterization = ResidualReparameterization(row.shape[1]).to(row.device)

    def begin_prompts(self, prompt_length: int) -> None:
        """Start new random prompts of this length in front of the current queue."""
        for index, rows in enumerate(self.rows):
            held = (self.queue.rows[index], self.queue.row_scale[index]) if self.queue.rows else rows.no_rows()
            rows.begin(rows.new_rows(prompt_length), *held)

    # Where new prompts start; each of these is `[l, F]` a layer.

    def prompts(self) -> list[Tensor]:
        """Return a copy of the new prompts."""
        return [rows.prompt.detach().clone() for rows in self.rows]

    @torch.no_grad()
    def start_prompts(self, prompts: Sequence[Tensor]) -> None:
        """Set the new prompts to these values."""
        for rows, values in zip(self.rows, prompts):
            rows.prompt.copy_(values)

    def queue_mean(self) -> list[Tensor] | None:
        """Return the mean of the queue's rows, prompt by prompt, as they are weighted; None if it holds none."""
        length = self.config.prompt_length
        if not length or not len(self.queue):
            return None
        weighted = (scale[:, None] * rows for rows, scale in zip(self.queue.rows, self.queue.row_scale))
        return [rows.unflatten(0, (-1, length)).mean(0) for rows in weighted]

    def has_own_prompts(self, info: AdapterInfo) -> bool:
        """Return whether a finished task's prefix has enough rows to hold a prompt of its own."""
        length = self.config.prompt_length
        return 0 < length <= info.prefix_rows - self.config.shared_length

    def own_prompts(self, adapter: TaskAdapter) -> list[Tensor]:
        """Return the rows of a finished task's prefix that the task itself trained, if its lengths were this model's.

        Raises:
            ValueError: the prefix has too few rows to hold them.
        """
        first = self.config.shared_length
        last = first + self.config.prompt_length
        if not self.has_own_prompts(adapter.info):
            raise ValueError(
                f"task {adapter.name!r} has {adapter.prefix_rows} prefix rows, which do not hold a prompt of "
                f"{self.config.prompt_length} behind {first} shared rows; start from another"
            )
        if adapter.embeddings is not None:
            return [adapter.embeddings[first:last]]
        return [
            rows.shape.to_rows(key[:, first:last], value[:, first:last])
            for rows, key, value in zip(self.rows, adapter.keys, adapter.values)
            if isinstance(rows, LayerPrefix)
        ]

    @torch.no_grad()
    def finish_task(
        self, name: str, label_names: Sequence[str], head: nn.Linear | None, *, problem_type: str = SINGLE
    ) -> TaskAdapter:
        """Fold the reparametrisation into the prompts, freeze them, and return the task's adapter."""
        for rows, prompt in zip(self.rows, self._prompts()):
            rows.prompt = nn.Parameter(prompt.clone())
        self.reparameterization = None
        self.requires_grad_(False)
        folded = [rows.folded() for rows in self.rows if isinstance(rows, LayerPrefix)]
        embeddings = [rows.embeddings(rows.prompt) for rows in self.rows if isinstance(rows, InputPrompt)]
        return TaskAdapter(
            name=name,
            label_names=tuple(label_names),
            keys=_kept(key for key, _ in folded),
            values=_kept(value for _, value in folded),
            embeddings=_kept(embeddings)[0] if embeddings else None,
            gate=self.config.gate,
            alphas=_kept(gate.alpha for gate in self.gates),
            taus=_kept(gate.tau for gate in self.gates),
            head_weight=None if head is None else _kept([head.weight])[0],
            head_bias=None if head is None else _kept([head.bias])[0],
            problem_type=problem_type,
        )

    def _prompts(self) -> Sequence[Tensor]:
        """Return the new prompts, `[l, F]` each, passed through the reparametrisation if there is one."""
        prompts: list[Tensor] = [rows.prompt for rows in self.rows]
        if self.reparameterization is None:
            return prompts
        return self.reparameterization(torch.stack(prompts)).unbind()

    def prefix(self) -> Prefix:
        """Return the current training prefix."""
        gates = [gate.arguments() for gate in self.gates] or [NO_GATE] * self._layer_count
        layers: list[PrefixArguments] = []
        embeddings = None
        for rows, prompt in zip(self.rows, self._prompts()):
            if isinstance(rows, InputPrompt):
                embeddings = rows.embeddings(prompt)
            elif isinstance(rows, LayerPrefix):
                layers.append(rows.arguments(prompt))
        layers = layers or [{}] * self._layer_count
        return Prefix([rows | gate for rows, gate in zip(layers, gates)], embeddings)

    def prefix_with_shared(self, index: Tensor) -> Prefix:
        """Return a bank of two: 0 is the training prefix, 1 the shared prompt alone, with a fixed gate.

        The shared rows come first, so the second prefix is the first one cut to their length.

        Args:
            index: `[B]`, the prefix of each sample.
        """
        one = self.prefix()
        rows = sum(len(part) for part in (self.rows[0].shared, self.rows[0].prompt, self.rows[0].old))
        lengths = torch.tensor([rows, self.config.shared_length], device=index.device)
        embeddings = None if one.embeddings is None else torch.stack([one.embeddings, one.embeddings])
        return Prefix([_twice(layer) for layer in one.layers], embeddings, index, lengths)


def _kept(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().cpu().clone() for tensor in tensors)


def _twice(prefix: PrefixArguments) -> PrefixArguments:
    """Stack a layer's arguments into a bank of two equal prefixes, the second one's gate without gradient."""
    bank: dict[str, Any] = dict(prefix)
    for name, x in prefix.items():
        if isinstance(x, tuple):
            bank[name] = tuple(torch.stack([factor, factor]) for factor in x)
        elif isinstance(x, Tensor):
            is_gate = name in ("gate_alpha", "gate_tau")
            bank[name] = torch.stack([x.reshape(-1), x.detach().reshape(-1)] if is_gate else [x, x])
    return cast(PrefixArguments, bank)


def _check_rows(config: QTuningConfig, features: set[int]) -> None:
    rows = (config.queue_size - 1) * config.prompt_length
    if config.eviction == "pca" and rows > min(features):
        raise ValueError(
            f"queue_size={config.queue_size} with prompt_length={config.prompt_length} keeps {rows} rows, more than "
            f"the {min(features)} features of a row, which DQ-PCA cannot do; reduce either, or choose another eviction"
        )
    if config.reparameterization is not None and len(features) > 1:
        raise ValueError(
            f"reparameterization={config.reparameterization!r} is shared by all layers, but rows have "
            f"{sorted(features)} features in different layers; set it to None"
        )
