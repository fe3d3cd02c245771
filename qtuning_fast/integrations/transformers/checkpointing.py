"""Gradient checkpointing of layers that hold a prefix: the prefix is an input of the layer, as the hidden states are.

A checkpoint computes its layer a second time in the backward pass. What stands on the attention modules by then may be
another prefix, and the reentrant kind of checkpoint passes gradients to the layer's inputs only. So both kinds are
given the prefix's tensors, and put them back in place when they recompute.

transformers checkpoints layers in training mode only, in which some layers drop activations. A frozen layer is in
training mode up to the checkpoint, and in eval mode within; and where there is no checkpoint, since nothing asks for a
gradient (from transformers 5.24 on), in eval mode altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

from qtuning_fast.method.prefix import place, placed

_FUNCTION = "_gradient_checkpointing_func"
_BEFORE = "qtuning_checkpoint_before"  # transformers' own function, while ours is in its place, and our hooks
_PAUSED = "qtuning_training_paused"  # on a layer in training mode that runs without gradients now


def checkpointing_layers(model: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """The layers of a model that would checkpoint their activations in training mode."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            yield module


def carry_prefixes(model: nn.Module) -> None:
    """Checkpoints of the model's layers take prefixes as inputs from here on."""
    for layer in checkpointing_layers(model):
        if not hasattr(layer, _BEFORE):
            before = getattr(layer, _FUNCTION)
            hooks = layer.register_forward_pre_hook(_pause), layer.register_forward_hook(_resume, always_call=True)
            setattr(layer, _BEFORE, (before, hooks))
            setattr(layer, _FUNCTION, _carrying(layer, before))


def leave_prefixes(model: nn.Module) -> None:
    """Undo `carry_prefixes`."""
    for layer in model.modules():
        if hasattr(layer, _BEFORE):
            before, hooks = layer.__dict__.pop(_BEFORE)
            setattr(layer, _FUNCTION, before)
            for hook in hooks:
                hook.remove()


def _carrying(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def carrying(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        modules = [module for module in layer.modules() if placed(module) is not None]
        leaves, structure = tree_flatten([placed(module) for module in modules])

        def run(*inputs: Any) -> Any:
            prefixes = tree_unflatten(inputs[: len(leaves)], structure)
            with _in_place(modules, prefixes), _in_eval_mode(layer):
                return function(*inputs[len(leaves) :])

        return checkpoint(run, *leaves, *args, **kwargs)

    return carrying


def _pause(layer: nn.Module, *_: Any) -> None:
    if layer.training and not torch.is_grad_enabled():
        layer.training = False
        setattr(layer, _PAUSED, True)


def _resume(layer: nn.Module, *_: Any) -> None:
    if layer.__dict__.pop(_PAUSED, False):
        layer.training = True


@contextmanager
def _in_place(modules: Sequence[nn.Module], prefixes: Sequence[Any]) -> Iterator[None]:
    """Within the block these prefixes stand on these modules."""
    before = [placed(module) for module in modules]
    try:
        for module, prefix in zip(modules, prefixes):
            place(module, prefix)
        yield
    finally:
        for module, prefix in zip(modules, before):
            place(module, prefix)


@contextmanager
def _in_eval_mode(layer: nn.Module) -> Iterator[None]:
    training, layer.training = layer.training, False
    try:
        yield
    finally:
        layer.training = training
