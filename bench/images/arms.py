"""What the study of images runs, its stream and its arms, and which answers it compares."""

from __future__ import annotations

from dataclasses import dataclass

from qtuning_fast.attention.common import GATES
from qtuning_fast.bench.learning.arms import Arm
from qtuning_fast.lifelong.methods import method_by_name
from qtuning_fast.method.task_rules import ClosedForm

STREAM = "clipart-8"
SEEDS = 5

STEPS = {"steps": 50, "eval_every": 10}
# The rate is 0.03 · B/256 with B = 64; a task has 48 or 64 training images, so a step is a pass.
PUBLISHED = {"batch_size": 64, "prompt_rate": 0.0075, "head_rate": 0.00075}
IMAGES = {"task_type": "image-classification"}
PROMPTS = IMAGES | {"prompt_length": 20}

ARMS = {
    "default": Arm("q-tuning", IMAGES, STEPS),
    "norga": Arm("norga", PROMPTS, STEPS | PUBLISHED),
    "hide": Arm("hide", PROMPTS, STEPS | PUBLISHED),
    "ranpac": Arm("ranpac", IMAGES),
    "simple-cil": Arm("simple-cil", IMAGES),
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

GATE_ARMS = {
    f"norga, {gate}": Arm("norga", PROMPTS | {"gate": gate}, STEPS | PUBLISHED) for gate in GATES if gate != "tanh"
}
"""NoRGa with each other gate, on one seed."""


def rule_of(arm: Arm) -> str:
    """Return the name of the rule by which an arm infers the task of an image."""
    return method_by_name(arm.method).rule or ClosedForm.name


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
