"""Gradient checkpointing of layers with a prefix: the prefix is an input of the layer, as the hidden states are.

A checkpoint computes its layer again in the backward pass. By then another prefix may be on the attention modules, or
the model may use its own attention, and reentrant checkpoints pass gradients only to the layer's inputs. So both kinds
take the prefix's tensors as inputs, and they recompute with the attention and the prefix of the forward pass.

transformers checkpoints layers only in training mode, in which some layers drop activations. A frozen layer is
therefore in training mode up to the checkpoint and in eval mode within it. If nothing requires a gradient, transformers
5.24 and later run no checkpoint, and the layer is in eval mode throughout.

Enabling and disabling replaces the layers' checkpoint function, so the function that is there tells whether a layer
carries its prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

from qtuning_fast.integrations.transformers.layers import configs_of
from qtuning_fast.integrations.transformers.lock import ComputeLock
from qtuning_fast.method.prefix import place, placed

_FUNCTION = "_gradient_checkpointing_func"
_HOOKS = "qtuning_checkpoint_hooks"  # the handles of our hooks on a layer
_PAUSED = "qtuning_training_paused"  # marks a layer in training mode that currently runs without gradients


def checkpointable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers of a model that can checkpoint their activations."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def carry_prefixes(layers: Iterable[GradientCheckpointingLayer], lock: ComputeLock, *, training: bool) -> None:
    """Make checkpoints of these layers take prefixes as inputs.

    Args:
        lock: held while a layer is computed again.
        training: whether layers with checkpointing enabled are in training mode, in which alone they checkpoint.
    """
    for layer in layers:
        checkpoints = layer.gradient_checkpointing
        if checkpoints and type(getattr(layer, _FUNCTION)) is not _Carrying:
            setattr(layer, _FUNCTION, _Carrying(layer, getattr(layer, _FUNCTION), lock))
            if not hasattr(layer, _HOOKS):
                hooks = layer.register_forward_pre_hook(_pause), layer.register_forward_hook(_resume, always_call=True)
                setattr(layer, _HOOKS, hooks)
        layer.training = training and checkpoints


def leave_prefixes(layers: Iterable[GradientCheckpointingLayer]) -> None:
    """Undo `carry_prefixes`, except for the training mode."""
    for layer in layers:
        function = getattr(layer, _FUNCTION, None)
        if type(function) is _Carrying:
            setattr(layer, _FUNCTION, function.checkpoint)
        for hook in layer.__dict__.pop(_HOOKS, ()):
            hook.remove()


class _Carrying:
    """A layer's checkpoint function that takes the prefixes of the layer's modules as inputs.

    Args:
        layer: the layer.
        checkpoint: the function in whose place this one stands.
        lock: held while the layer is computed again.
    """

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any], lock: ComputeLock) -> None:
        self.layer = layer
        self.checkpoint = checkpoint
        self.lock = lock

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layer, lock, thread = self.layer, self.lock, get_ident()
        attention = [(config, config._attn_implementation) for config in configs_of(layer)]
        modules = [module for module in layer.modules() if placed(module) is not None]
        leaves, structure = tree_flatten([placed(module) for module in modules])

        def run(*inputs: Any) -> Any:
            prefixes = tree_unflatten(inputs[: len(leaves)], structure)
            with (
                lock.recomputing_for(thread),
                _attending_by(attention),
                _in_place(modules, prefixes),
                _in_eval_mode(layer),
            ):
                return function(*inputs[len(leaves) :])

        return self.checkpoint(run, *leaves, *args, **kwargs)


def _pause(layer: nn.Module, *_: Any) -> None:
    if layer.training and not torch.is_grad_enabled():
        layer.training = False
        setattr(layer, _PAUSED, True)


def _resume(layer: nn.Module, *_: Any) -> None:
    if layer.__dict__.pop(_PAUSED, False):
        layer.training = True


@contextmanager
def _attending_by(attention: Sequence[tuple[Any, str]]) -> Iterator[None]:
    """Make these configs name these attention functions within the block."""
    before = [config._attn_implementation for config, _ in attention]
    try:
        for config, name in attention:
            config._attn_implementation = name
        yield
    finally:
        for (config, _), name in zip(attention, before):
            config._attn_implementation = name


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
