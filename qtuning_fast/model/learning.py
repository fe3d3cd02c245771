"""The trainable parts of a model: the training prefix, the head and the discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtuning_fast.method.adapter import TaskAdapter
from qtuning_fast.method.closed_form import LinearHead
from qtuning_fast.method.labels import SINGLE
from qtuning_fast.method.retention import Discriminator, RetentionPairs, pairs_loss, retention_loss
from qtuning_fast.model.stale_optimizers import watch
from qtuning_fast.model.training_prefix import TrainingPrefix


class Learning(nn.Module):
    """The task in training.

    Args:
        prefix: `[P* ; P_new ; W ∘ Q_old]` with its gates and the queue.
        hidden_size: size of the features that heads and the discriminator take.
        has_heads: whether each task has a head of its own.

    Attributes:
        task: name of the task in training, or None between tasks.
        label_names, problem_type: the labels of the task in training, and what they mean.
        last_learned: the task learned last.
    """

    discriminator: Discriminator | None
    head: nn.Linear | None

    def __init__(self, prefix: TrainingPrefix, *, hidden_size: int, has_heads: bool) -> None:
        super().__init__()
        self.prefix = prefix
        # Registered now, so that the order of parameters does not depend on how the model was made. Otherwise sums over
        # them (gradient clipping) would differ in the last bits between a run and the same run resumed.
        self.register_module("discriminator", None)
        self.register_module("head", None)
        self.register_load_state_dict_pre_hook(_name_no_task)
        self._hidden_size = hidden_size
        self._has_heads = has_heads
        self.label_names: tuple[str, ...] = ()
        self.problem_type = SINGLE
        self.task: str | None = None
        self.last_learned: str | None = None

    # A state names its task, so that one task's checkpoint is not taken for another's. It is a tensor for safetensors.

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list((self.task or "").encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        name = bytes(state.tolist()).decode() or None
        if name != self.task:
            now = "no task is in training" if self.task is None else f"task {self.task!r} is in training"
            then = "between tasks" if name is None else f"within task {name!r}"
            raise ValueError(f"the state was saved {then}, but {now}; load it {then}")

    def check_idle(self) -> None:
        """Raise a RuntimeError while a task is in training."""
        if self.task is not None:
            raise RuntimeError(f"task {self.task!r} is in training; call finish_task first")

    def start(
        self,
        name: str,
        label_names: tuple[str, ...],
        device: torch.device,
        *,
        retains: bool,
        problem_type: str = SINGLE,
    ) -> None:
        """Make room in the queue and start a new prompt and head.

        Args:
            retains: whether memory retention applies once the queue has evicted rows.
        """
        first = self.last_learned is None and not self.prefix.prompt_length  # the task learned last may be removed
        self.prefix.begin_task(first=first)
        if retains and self.prefix.queue.evictions > 0 and self.discriminator is None:
            self.discriminator = Discriminator(self._hidden_size)
        if self.discriminator is not None:
            self.discriminator.to(device).requires_grad_(True)
        self.head = nn.Linear(self._hidden_size, len(label_names)).to(device) if self._has_heads else None
        self.task, self.label_names, self.problem_type = name, label_names, problem_type

    def finish(self) -> TaskAdapter:
        """Fold the trained prompt into an adapter, and free what only training needed.

        Raises:
            RuntimeError: no task is in training.
            ValueError: training has diverged.
        """
        if self.task is None:
            raise RuntimeError("no task is in training; call start_task first")
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():  # such an adapter could not be read again
                raise ValueError(
                    f"task {self.task!r} has diverged: {name} holds values that are not finite; load an earlier state "
                    "of it (load_trainable_state_dict), and train on at a lower learning rate"
                )
        adapter = self.prefix.finish_task(self.task, self.label_names, self.head, problem_type=self.problem_type)
        self.last_learned, self.task = self.task, None
        self.head = None
        kept = {id(parameter) for parameter in self.parameters()}
        watch((parameter for parameter in trained if id(parameter) not in kept), self.check_optimizer)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
        return adapter

    @torch.no_grad()
    def set_head(self, head: LinearHead) -> None:
        """Set the head in training to these values."""
        assert self.head is not None
        self.head.weight.copy_(head.weight)
        self.head.bias.copy_(head.bias)

    def check_optimizer(self, held: set[int]) -> None:
        """Raise a RuntimeError if parameters of the task in training are not among those with these ids."""
        if self.task is not None and any(id(each) not in held for each in self.parameters() if each.requires_grad):
            raise RuntimeError(
                f"the optimizer holds parameters of a finished task but not all of those of task {self.task!r}; make a "
                "new Trainer, or a new optimizer, after each start_task"
            )

    def logits(self, features: Tensor) -> Tensor:
        """Map features `[B, hidden]` to logits `[B, classes]` by the head in training."""
        assert self.head is not None
        return self.head(features.to(self.head.weight.dtype))

    def retention_loss(self, shared_features: Tensor, old_features: Tensor | RetentionPairs) -> Tensor:
        """Return `L_MR` of features `[B, hidden]` under the shared prompt and under the previous task's adapter."""
        assert self.discriminator is not None
        if isinstance(old_features, RetentionPairs):
            return pairs_loss(self.discriminator, shared_features, old_features)
        shift = int(torch.randint(1, len(shared_features), ()))
        return retention_loss(self.discriminator, shared_features, old_features.to(shared_features), shift)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """See `QTuningModel.parameter_groups`."""
        groups: dict[str, Sequence[nn.Module | None]] = {
            "gate": self.prefix.gates,
            "reweighting": self.prefix.reweightings,
            "head": [self.head],
            "network": [self.prefix.reparameterization, self.discriminator],
        }
        found = {
            kind: [parameter for module in modules if module is not None for parameter in module.parameters()]
            for kind, modules in groups.items()
        }
        others = {id(parameter) for parameters in found.values() for parameter in parameters}
        found["prompt"] = [parameter for parameter in self.prefix.parameters() if id(parameter) not in others]
        return {kind: [each for each in parameters if each.requires_grad] for kind, parameters in found.items()}

    def load_trained(self, state: dict[str, Tensor]) -> None:
        """Restore a state dict of the same task.

        Raises:
            ValueError: the state belongs to another task.
        """
        missing, unexpected = self.load_state_dict(state, strict=False)
        if missing or unexpected:
            raise ValueError(f"the state does not fit the task in training: missing {missing}, unexpected {unexpected}")

    def restore(self, state: dict[str, Tensor], device: torch.device, last_learned: str | None) -> None:
        """Restore the state between tasks from a checkpoint; the queue is restored already.

        Raises:
            ValueError: the state is not one of this model.
        """
        self.last_learned = last_learned
        self.prefix.begin_prompts(len(state["prefix._rows.0.prompt"]))
        if any(name.startswith("discriminator.") for name in state):
            self.discriminator = Discriminator(self._hidden_size).to(device)
            self.discriminator.requires_grad_(False)
        self.prefix.requires_grad_(False)
        own = self.state_dict()  # PyTorch would convert what is of another kind
        for name in own.keys() & state.keys():
            found, kind = state[name], own[name]
            if found.shape != kind.shape or found.is_floating_point() != kind.is_floating_point():
                raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {kind.dtype} {list(kind.shape)}")
        self.load_trained(state)


def _name_no_task(learning: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take a state without a name, as earlier versions saved it, for one of the task in training."""
    state.setdefault(f"{prefix}_extra_state", learning.get_extra_state())
