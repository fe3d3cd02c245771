"""Calls whose tasks are inferred: features of the base model alone, then each sample under its own adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtuning_fast.integrations.transformers.caches import cache_among
from qtuning_fast.method.labels import SINGLE
from qtuning_fast.method.task_inference import TaskInference
from qtuning_fast.method.task_rule import Evidence
from qtuning_fast.model.known_tasks import INFER
from qtuning_fast.model.output import batch_size, read_inputs

if TYPE_CHECKING:
    from qtuning_fast.model.model import QTuningModel

_OPTIONS = "priors, threshold, false_alarm_rate"


@dataclass(frozen=True)
class Inferred:
    """The tasks of a call.

    Attributes:
        names: each sample's task.
        index: the place of each among the model's tasks, `[B]` int64.
        is_known: whether each sample seems to be of any known task, `[B]` bool.
    """

    names: list[str]
    index: Tensor
    is_known: Tensor


@torch.compiler.disable  # locks and numbers read off tensors would break its graph into dozens, each to be compiled
@torch.no_grad()
def infer(model: QTuningModel, inputs: Mapping[str, Any], **options: Any) -> TaskInference:
    """Return which task each input is of; see `QTuningModel.infer_tasks`.

    Args:
        options: those of `FittedRule.infer`.
    """
    cache = cache_among(inputs)
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            "the tasks of inputs that continue a cache cannot be inferred; call infer_tasks with the whole input once, "
            "and give its task_names to each call"
        )
    if inputs.get("encoder_outputs") is not None:
        raise ValueError(
            "the tasks of encoder_outputs, which may be those under a task, cannot be inferred; give the input itself, "
            "or its task_names"
        )
    read = read_inputs(inputs)
    with model.backbone.injector.lock:
        fitted = model.fit_task_rule()
        features = model.features(read, task=None)
        return fitted.infer(Evidence(features, lambda: _ask_adapters(model, fitted.order, read)), **options)


def check_inputs(inputs: Mapping[str, Any]) -> None:
    """Raise a TypeError if something is no input of a model, such as a misspelt option, which would have no effect."""
    for name, x in inputs.items():
        if not isinstance(x, Tensor | bool | None):
            raise TypeError(
                f"infer_tasks got {name}={x!r}, which is neither an input (a tensor) nor one of its options: {_OPTIONS}"
            )


@contextmanager
def inferred(model: QTuningModel, task_names: Any, inputs: Mapping[str, Any], top_k: int = 1) -> Iterator[Inferred]:
    """Within the block, make each sample compute under the task that is inferred for it.

    Args:
        task_names: must be `"infer"`.
        top_k: see `QTuningModel.forward`.

    Raises:
        TypeError, ValueError: an argument is invalid, or no task can be inferred.
    """
    _check_options(model, task_names, inputs, top_k)
    with model._active.block():
        found = infer(model, inputs)
        names = found.task_names if top_k == 1 else _surest(model, inputs, found, top_k)
        places = {name: place for place, name in enumerate(model.tasks)}
        with _together(model, names):
            index = torch.tensor([places[name] for name in names], device=model.device)
            yield Inferred(names, index, found.is_known.to(model.device))


@contextmanager
def _together(model: QTuningModel, names: list[str]) -> Iterator[None]:
    """Make each sample compute under its task within the block; an error says that the tasks were inferred."""
    with ExitStack() as stack:
        try:
            stack.enter_context(model.using(names, len(names)))
        except ValueError as error:
            raise ValueError(
                f"the tasks were inferred, and one batch cannot hold them: {error}. Call infer_tasks, and then the "
                "model for some of the samples at a time, with their task_names"
            ) from None
        yield


def _check_options(model: QTuningModel, task_names: Any, inputs: Mapping[str, Any], top_k: int) -> None:
    if task_names != INFER:
        if isinstance(task_names, str):
            raise ValueError(f'task_names is {task_names!r}; it must hold one name for each sample, or be "{INFER}"')
        raise ValueError(f'top_k is {top_k}, but task_names is not "{INFER}"; leave top_k out')
    for name in _OPTIONS.split(", "):
        if name in inputs:
            raise TypeError(f"{name} is an option of infer_tasks; call that, and give its task_names to this call")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; it must be an integer, at least 1")
    if top_k > 1 and not model.has_heads:
        raise ValueError(
            f"top_k is {top_k}, but task_type={model.qtuning_config.task_type!r} has no heads, whose answers could be "
            "weighed; leave top_k out"
        )


def _surest(model: QTuningModel, inputs: Mapping[str, Any], found: TaskInference, top_k: int) -> list[str]:
    """Return, of each sample's likeliest tasks, the one with the most probable answer."""
    ranked, read = [[name for name, _ in tasks] for tasks in found.top(top_k)], read_inputs(inputs)
    by_rank = [list(names) for names in zip(*ranked)]
    asked = []
    for names in by_rank:
        with torch.no_grad(), _together(model, names):
            asked.append(model(**read, task_names=names).logits)
    sureness = torch.stack([logits.double().softmax(-1).amax(-1).cpu() for logits in asked], dim=1)
    compares = torch.tensor([[model.problem_type(name) == SINGLE for name in tasks] for tasks in ranked])
    chosen = found.surest(len(by_rank), sureness, compares)
    return [tasks[place] for tasks, place in zip(ranked, chosen.tolist())]


def _ask_adapters(model: QTuningModel, tasks: Sequence[str], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return by task the probabilities `[B, classes]` that its adapter gives."""
    if not model.has_heads:
        raise ValueError(
            f"rule {model.task_rule.name!r} compares heads, but task_type={model.qtuning_config.task_type!r} has none; "
            "set another task_rule"
        )
    asked = {}
    for name in tasks:
        logits = model(**inputs, task_names=[name] * batch_size(inputs)).logits
        asked[name] = logits[:, : len(model.label_names(name))].double().softmax(-1).cpu()
    return asked
