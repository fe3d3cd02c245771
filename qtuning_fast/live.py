"""The live prefix of a model: in every layer the new prompt in front of the queue, and what trains them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from qtuning_fast.adapter import TaskAdapter
from qtuning_fast.config import QTuningConfig
from qtuning_fast.nn import LayerPrefix, LayerShape, ResidualReparameterization
from qtuning_fast.queue import Eviction, PromptQueue


class LivePrefix(nn.Module):
    """`[P* ; P_new ; W ∘ Q_old]` in every chosen layer, the gates, and the queue that holds `Q_old`.

    Args:
        shapes: of the layers that get a prefix.
        config: see `QTuningConfig`.

    Attributes:
        queue: the rows of finished prompts.
        last_eviction: what the start of the current task evicted, or None.
        reparameterization: what new prompts pass through while they train.

    Raises:
        ValueError: the config does not fit these layers.
    """

    reparameterization: ResidualReparameterization | None

    def __init__(self, shapes: Sequence[LayerShape], config: QTuningConfig) -> None:
        super().__init__()
        _check_rows(config, {shape.row_features for shape in shapes})
        self.config = config
        self._layers = nn.ModuleList(
            LayerPrefix(
                shape,
                shared_length=config.shared_length,
                rank=config.rank,
                gate=config.gate,
                per_head=config.gate_per == "head",
            )
            for shape in shapes
        )
        self._layers.requires_grad_(False)
        self.register_module("reparameterization", None)
        self.queue = PromptQueue(config.queue_size, config.prompt_length, eviction=config.eviction)
        self.last_eviction: Eviction | None = None

    @property
    def layers(self) -> list[LayerPrefix]:
        return cast("list[LayerPrefix]", list(self._layers))

    def begin_task(self, *, first: bool) -> None:
        """Take the finished prompt into the queue and begin a new one; everything but old rows is trainable.

        Args:
            first: whether this is the model's first task, with nothing finished before it.
        """
        if not first:
            prompts = [layer.prompt.detach().cpu() for layer in self.layers]  # the queue stays on the CPU
            weights = [layer.row_weights().cpu() for layer in self.layers]
            self.last_eviction = self.queue.push(prompts, weights, seed=int(torch.randint(2**31, ())))
        self.begin_prompts(self.config.prompt_length)
        self._layers.requires_grad_(True)
        for layer in self.layers:
            if layer.gate is not None and self.config.gate_training == "first-task":
                layer.gate.requires_grad_(first)
        if self.config.reparameterization == "mlp":
            row = self.layers[0].shared
            self.reparameterization = ResidualReparameterization(row.shape[1]).to(row.device)

    def begin_prompts(self, prompt_length: int) -> None:
        """New prompts over the queue as it is."""
        for index, layer in enumerate(self.layers):
            held = (self.queue.rows[index], self.queue.row_scale[index]) if self.queue.rows else layer.no_rows()
            layer.begin(prompt_length, *held)

    @torch.no_grad()
    def finish_task(self, name: str, label_names: Sequence[str], head: nn.Linear) -> TaskAdapter:
        """Fold the reparametrisation into the prompts, freeze them, and give what is kept of the task."""
        for layer, prompt in zip(self.layers, self._prompts()):
            layer.prompt = nn.Parameter(prompt.clone())
        self.reparameterization = None
        self._layers.requires_grad_(False)
        folded = [layer.folded() for layer in self.layers]
        gates = [layer.gate for layer in self.layers if layer.gate is not None]
        return TaskAdapter(
            name=name,
            label_names=tuple(label_names),
            keys=_kept(key for key, _ in folded),
            values=_kept(value for _, value in folded),
            gate=self.config.gate,
            alphas=_kept(gate.alpha for gate in gates),
            taus=_kept(gate.tau for gate in gates),
            head_weight=head.weight.detach().cpu().clone(),
            head_bias=head.bias.detach().cpu().clone(),
        )

    def _prompts(self) -> Sequence[Tensor]:
        """The new prompt of each layer, `[l, F]`, through the reparametrisation while there is one."""
        prompts: list[Tensor] = [layer.prompt for layer in self.layers]
        if self.reparameterization is None:
            return prompts
        return self.reparameterization(torch.stack(prompts)).unbind()

    def arguments(self) -> list[dict[str, Any]]:
        """For each layer the prefix as keyword arguments of `prefix_attention`."""
        return [layer.arguments(prompt) for layer, prompt in zip(self.layers, self._prompts())]

    def arguments_with_shared(self, index: Tensor) -> list[dict[str, Any]]:
        """For each layer a bank of two: 0 is the live prefix, 1 the shared prompt alone, with the gate held fixed.

        Since the shared rows come first, the second is the first one cut to their length.

        Args:
            index: `[B]`, which of the two each sample uses.
        """
        return [_with_shared(live, self.config.shared_length, index) for live in self.arguments()]


def _kept(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().cpu().clone() for tensor in tensors)


def _with_shared(live: dict[str, Any], shared_length: int, index: Tensor) -> dict[str, Any]:
    bank = dict(live)
    for name in ("prefix_key", "prefix_value"):
        bank[name] = torch.stack([live[name], live[name]])
    for name in ("reweight_key", "reweight_value"):
        if name in live:
            bank[name] = tuple(torch.stack([factor, factor]) for factor in live[name])
    for name in ("gate_alpha", "gate_tau"):
        if name in live:
            bank[name] = torch.stack([live[name].reshape(-1), live[name].detach().reshape(-1)])
    lengths = torch.tensor([live["prefix_key"].shape[1], shared_length], device=index.device)
    return bank | {"prefix_index": index, "prefix_length": lengths}


def _check_rows(config: QTuningConfig, features: set[int]) -> None:
    rows = (config.queue_size - 1) * config.prompt_length
    if config.eviction == "pca" and rows > min(features):
        raise ValueError(
            f"queue_size={config.queue_size} with prompt_length={config.prompt_length} keeps {rows} rows, more than "
            f"the {min(features)} features of a row: DQ-PCA cannot; use less, or another eviction"
        )
    if config.reparameterization is not None and len(features) > 1:
        raise ValueError(
            f"reparameterization={config.reparameterization!r} is shared by all layers, but rows have "
            f"{sorted(features)} features in different layers; use None"
        )
