"""What the study of images runs, its stream and its arms, and which answers it compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qtuning_fast.attention.common import GATES
from qtuning_fast.lifelong.methods import Method, method_by_name
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.method.task_rules import ClosedForm

STREAM = "clipart-8"
SEEDS = 5

STEPS = {"steps": 50, "eval_every": 10}
# The rate is 0.03 · B/256 with B = 64; a task has 48 or 64 training images, so a step is a pass.
PUBLISHED = {"batch_size": 64, "prompt_rate": 0.0075, "head_rate": 0.00075}
PROMPTS = {"prompt_length": 20}


@dataclass(frozen=True)
class Arm:
    """A method by name, with settings on top of its own.

    Attributes:
        method: its name.
        config, training: what differs.
    """

    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """How the task of an image is inferred."""
        return self._method.rule or ClosedForm.name

    @property
    def _method(self) -> Method:
        return method_by_name(self.method)

    def settings(self, queue_size: int, seed: int) -> tuple[QTuningConfig, TrainingOptions]:
        """The config and the training options of a run."""
        config = {"task_type": "image-classification", "queue_size": queue_size, **self._method.config, **self.config}
        return self._method.settings(config, {**STEPS, "seed": seed, **self._method.training, **self.training})


ARMS = {
    "default": Arm("q-tuning"),
    "norga": Arm("norga", PROMPTS, PUBLISHED),
    "hide": Arm("hide", PROMPTS, PUBLISHED),
    "ranpac": Arm("ranpac"),
    "simple-cil": Arm("simple-cil"),
}

ROWS = {
    "default": ("default", "adapters"),
    "norga": ("norga", "joint_head"),
    "hide": ("hide", "joint_head"),
    "hide, each task's own head": ("hide", "adapters"),
    "ranpac": ("ranpac", "ranpac"),
    "closed form": ("simple-cil", "closed_form"),
    "simple-cil": ("simple-cil", "nearest_class_mean"),
    "probe-joint": ("simple-cil", "joint_regression"),
}
"""What is compared: the answers of a run, by arm and by the name that they have there."""

GATE_ARMS = {f"norga, {gate}": Arm("norga", PROMPTS | {"gate": gate}, PUBLISHED) for gate in GATES if gate != "tanh"}
"""NoRGa with each other gate, on one seed."""


@dataclass(frozen=True)
class Run:
    """One arm from one seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """A name that is a path, too."""
        return f"{self.arm.replace(' ', '-').replace(',', '')}/{self.seed}"


def all_runs() -> list[Run]:
    """Every run, seed by seed."""
    runs = [Run(arm, seed) for seed in range(SEEDS) for arm in ARMS]
    return runs + [Run(arm, 0) for arm in GATE_ARMS]
