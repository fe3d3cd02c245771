"""Gradient checkpointing of layers with a prefix: the prefix is an input of the layer, as the hidden states are.

A checkpoint computes its layer again in the backward pass. By then another prefix may be on the attention modules, and
reentrant checkpoints pass gradients only to the layer's inputs. So both kinds take the prefix's tensors as inputs and
place them again when they recompute.

transformers checkpoints layers only in training mode, in which some layers drop activations. A frozen layer is
therefore in training mode up to the checkpoint and in eval mode within it. If nothing requires a gradient, transformers
5.24 and later run no checkpoint, and the layer is in eval mode throughout.
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
_BEFORE = "qtuning_checkpoint_before"  # transformers' own function, while ours replaces it, and our hooks
_PAUSED = "qtuning_training_paused"  # marks a layer in training mode that currently runs without gradients


def checkpointing_layers(model: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """Yield the layers of a model that would checkpoint their activations in training mode."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            yield module


def carry_prefixes(model: nn.Module) -> None:
    """Make checkpoints of the model's layers take prefixes as inputs."""
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
    """Place these prefixes on these modules within the block."""
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
