"""The attention layers of one frozen model, and the switch between their own attention and prefix attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers.attention import NAME, PREFIX, watched
from qtuning_fast.integrations.transformers.checkpointing import carry_prefixes, checkpointing_layers, leave_prefixes
from qtuning_fast.integrations.transformers.layers import (
    AttentionLayer,
    configs_of,
    dummy_inputs,
    find_layers,
    without_head,
)
from qtuning_fast.integrations.transformers.offload import input_device
from qtuning_fast.integrations.transformers.positions import Shift, shift_positions, takes_positions
from qtuning_fast.integrations.transformers.prompt_tokens import Prompt, put_in_front
from qtuning_fast.nn.gate import NO_GATE
from qtuning_fast.nn.prefix import Prefix

_ATTACHED = "qtuning_attached"  # on a base model that is attached to


class AttachedAttention:
    """The self-attention layers of one frozen model, and the switch between their own attention and ours.

    Args:
        base_model: a transformers model in which every layer calls the attention interface.
        placement: `"prefix"` or `"input"`, as in `QTuningConfig`.

    Attributes:
        layers: its self-attention layers, in the order in which they run, an encoder's before its decoder's.

    Raises:
        TypeError: `base_model` is not a transformers model.
        ValueError: the model is attached to already.
        NotImplementedError: a layer does not call the interface, or needs what prefix attention cannot do.
    """

    def __init__(self, base_model: PreTrainedModel, placement: str = "prefix") -> None:
        if not isinstance(base_model, PreTrainedModel):
            raise TypeError(f"base_model is a {type(base_model).__name__}; it must be a transformers PreTrainedModel")
        if hasattr(base_model, _ATTACHED):
            raise ValueError("base_model has a QTuningModel attached already; call its detach() first")
        self._base_model = base_model
        self._original: list[tuple[Any, str]] = []  # while ours is on: what each config named before
        self._placement = placement
        self._hooks: list[RemovableHandle] = []
        self._placed: tuple[Sequence[int], Prefix] | None = None
        self._prompt: Prompt | None = None  # that stands in front of the sequence now
        self._shift: Shift | None = None  # of the position ids now
        self.layers: list[AttentionLayer] = []
        # By module and name: accelerate puts new parameters in place of those that it moves.
        self._required_grad = [
            (module, name, parameter.requires_grad)
            for module in base_model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        self._was_training = [(module, module.training) for module in base_model.modules()]
        base_model.requires_grad_(False)  # before it computes: FSDP2 looks then what requires gradients
        self.switch()
        try:
            self.layers = find_layers(base_model)
            self.restore()
            self.switch()  # with the hooks that the layers ask for
        except Exception:
            self.detach()
            raise
        self.restore()
        setattr(base_model, _ATTACHED, True)
        self.freeze(training=False)

    @property
    def model(self) -> PreTrainedModel:
        """The model below the head."""
        return without_head(self._base_model)

    @property
    def encoder(self) -> PreTrainedModel:
        """The stack that reads the input: an encoder-decoder's encoder, or all there is below the head."""
        # Some models keep their one stack within another module, and their heads call it there.
        return self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model.get_decoder()

    @property
    def is_causal(self) -> bool:
        """Whether the stack that reads the input is causal."""
        return self.layers[0].is_causal

    @property
    def checkpoints(self) -> bool:
        """Whether layers checkpoint their activations now."""
        return any(layer.training for layer in checkpointing_layers(self._base_model))

    @property
    def prompt_tokens(self) -> int:
        """How many tokens stand in front of the sequence now."""
        return 0 if self._prompt is None else self._prompt.tokens

    def switch(self) -> None:
        """Attention by `prefix_attention` from here on."""
        if not self._original:
            self._original = [(config, config._attn_implementation) for config in configs_of(self._base_model)]
            if self.layers:
                self._hooks = self._new_hooks()
        for config, _ in self._original:
            config._attn_implementation = NAME

    def _new_hooks(self) -> list[RemovableHandle]:
        """On the stack that reads the input; they do nothing while there is no prompt in front and no shift."""
        hooks = []
        if self._placement == "input" and not self.is_causal:
            hooks += put_in_front(self.model, self.encoder, lambda: self._prompt)
        if takes_positions(self.encoder):
            hooks.append(shift_positions(self.encoder, lambda: self._shift))
        return hooks

    def restore(self) -> None:
        """The original attention and mask functions from here on, and no prefix anywhere."""
        for config, implementation in self._original:
            config._attn_implementation = implementation
        self._original = []
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._clear()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """After the block the prefix stands that stood before it, or the model computes by its own attention."""
        before = self._placed
        try:
            yield
        finally:
            if before is None:
                self.restore()
            else:
                self.switch()
                self.place(*before)

    def freeze(self, *, training: bool) -> None:
        """The base model in eval mode; while prompts train, its layers that checkpoint their activations excepted."""
        self._base_model.eval()
        carry_prefixes(self._base_model)
        for layer in checkpointing_layers(self._base_model):  # which they do in training mode only
            layer.training = training

    def detach(self) -> None:
        """The base model as it was; another may be attached from here on."""
        self.restore()
        leave_prefixes(self._base_model)
        self._base_model.__dict__.pop(_ATTACHED, None)
        for module, name, required in self._required_grad:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(required)
        for module, training in self._was_training:
            module.training = training

    def place(self, layers: Sequence[int], prefix: Prefix) -> None:
        """From here on the layers with these indices attend to `prefix`, whichever stood there before."""
        self._clear()
        if prefix.embeddings is not None and self.is_causal:
            rows = self.rows_of_prompt(layers, prefix.embeddings)
            layers_with_rows = [each | row for each, row in zip(prefix.layers, rows)]
            prefix = Prefix(layers_with_rows, None, prefix.lengths, prefix.embeddings.shape[-2])
        self._placed = layers, prefix
        arguments, shift = prefix.layers, prefix.position_shift
        if prefix.embeddings is not None:
            bank = prefix.layers[0]
            self._prompt = Prompt(prefix.embeddings, bank.get("prefix_index"), bank.get("prefix_length"))
            arguments = [each | {"prompt_tokens": self.prompt_tokens} for each in arguments]
        if shift is not None:
            index = prefix.layers[0].get("prefix_index")
            by = shift if index is None else shift[index.to(shift.device)]
            self._shift = Shift(by, prefix.largest_shift)
        for index, each in zip(layers, arguments):
            setattr(self.layers[index].module, PREFIX, each)

    def passes_gradient(self, layers: Sequence[int]) -> bool:
        """Whether gradients reach prefixes on all of these layers; no prefix stands anywhere afterwards.

        Layers that quantise what passes through them stop gradients, some without an error. So this tries it out.
        """
        shapes, device = [self.layers[index].shape for index in layers], input_device(self.model)
        keys = [torch.zeros(shape.num_kv_heads, 1, shape.key_size, device=device) for shape in shapes]
        values = [torch.zeros(shape.num_kv_heads, 1, shape.value_size, device=device) for shape in shapes]
        rows = [{"prefix_key": k, "prefix_value": v.requires_grad_(), **NO_GATE} for k, v in zip(keys, values)]
        self.freeze(training=False)
        self.switch()
        self.place(layers, Prefix(rows))
        try:
            with torch.enable_grad():
                total = self.model(**dummy_inputs(self.model))[0].sum()
            found = torch.autograd.grad(total, values, allow_unused=True) if total.requires_grad else [None]
        finally:
            self.restore()
        return all(gradient is not None for gradient in found)

    def _clear(self) -> None:
        self._placed = self._prompt = self._shift = None
        for layer in self.layers:
            layer.module.__dict__.pop(PREFIX, None)

    def rows_of_prompt(self, layers: Sequence[int], embeddings: Tensor) -> list[dict[str, Tensor]]:
        """For each layer the keys and values of a prompt `[P, E]` or of a bank of them, `[T, P, E]`.

        In a causal model they do not depend on what follows, so one pass over the prompt serves all samples. What
        stood on the layers is taken off.
        """
        self._clear()
        found: dict[int, dict[str, Tensor]] = {}

        def keep(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
            bank = embeddings.ndim == 3
            found[id(module)] = {
                "prefix_key": key if bank else key.squeeze(0),
                "prefix_value": value if bank else value.squeeze(0),
            }

        checkpointing = [layer for layer in checkpointing_layers(self.model) if layer.training]
        for layer in checkpointing:
            layer.training = False  # a few tokens; and what a checkpoint computes within it keeps to itself
        try:
            with watched(self.encoder, keep):
                batch = embeddings if embeddings.ndim == 3 else embeddings[None]
                self.encoder(inputs_embeds=batch.to(self.model.dtype), use_cache=False)
        finally:
            for layer in checkpointing:
                layer.training = True
        return [found[id(self.layers[index].module)] for index in layers]
