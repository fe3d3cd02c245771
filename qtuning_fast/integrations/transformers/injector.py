"""The injector of prefixes: a frozen model's attention layers, and the switch between its attention and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qtuning_fast.attention.arguments import PrefixArguments
from qtuning_fast.integrations.transformers.attention_switch import AttentionSwitch
from qtuning_fast.integrations.transformers.checkpointing import carry_prefixes, checkpointable_layers, leave_prefixes
from qtuning_fast.integrations.transformers.interface import AttentionCall, forget_watchers, watched
from qtuning_fast.integrations.transformers.layers import (
    AttentionLayer,
    configs_of,
    dummy_inputs,
    find_layers,
    main_input,
    without_head,
)
from qtuning_fast.integrations.transformers.lock import ComputeLock
from qtuning_fast.integrations.transformers.offload import input_device
from qtuning_fast.integrations.transformers.outputs import put_output_in_order
from qtuning_fast.integrations.transformers.padding import move_padding_behind, moved_back
from qtuning_fast.integrations.transformers.positions import Positions, Shift, give_positions
from qtuning_fast.integrations.transformers.prompt_check import check_takes_prompt
from qtuning_fast.integrations.transformers.prompt_tokens import Prompt, put_in_front
from qtuning_fast.method.prefix import PlacedPrefix, Prefix, place

_ATTACHED = "qtuning_attached"  # holds the id of a base model with a QTuningModel; in a copy of it, not the copy's id

_INJECTORS: WeakSet[PrefixInjector] = WeakSet()


class PrefixInjector:
    """The self-attention layers of a frozen model, and the switch between their own attention and ours.

    Args:
        base_model: a transformers model in which every layer calls the attention interface.
        placement: `"prefix"` or `"input"`, as in `QTuningConfig`.

    Attributes:
        layers: its self-attention layers, in the order in which they run, an encoder's before its decoder's.
        reads_images: whether its input are images; otherwise it is text.
        positions: how the encoder assigns positions to tokens.
        lock: who computes or changes what stands on the layers holds it; models that share a config share it.

    Raises:
        TypeError: `base_model` is not a transformers model.
        ValueError: a QTuningModel is attached to the model already.
        NotImplementedError: a layer does not call the interface, or needs what prefix attention cannot compute.
    """

    def __init__(self, base_model: PreTrainedModel, placement: str = "prefix") -> None:
        if not isinstance(base_model, PreTrainedModel):
            raise TypeError(f"base_model is a {type(base_model).__name__}; it must be a transformers PreTrainedModel")
        if getattr(base_model, _ATTACHED, None) == id(base_model):
            raise ValueError("base_model has a QTuningModel attached already; call its detach() first")
        self._base_model = base_model
        self.lock = _lock_for(configs_of(base_model))
        self._switch = AttentionSwitch(base_model)
        self._placement = placement
        self._hooks: list[RemovableHandle] = []
        self._placed: tuple[Sequence[int], Prefix] | None = None
        self._prompt: Prompt | None = None  # the prompt in front of the sequence
        self._shift: Shift | None = None  # the current shift of the position ids
        self.layers: list[AttentionLayer] = []
        self._checkpointable = checkpointable_layers(base_model)
        self._training = False
        # By module and name, because accelerate replaces the parameters that it moves.
        self._required_grad = [
            (module, name, parameter.requires_grad)
            for module in base_model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        self._was_training = [(module, module.training) for module in base_model.modules()]
        base_model.requires_grad_(False)  # before the first pass, when FSDP2 checks what requires gradients
        self.switch()
        try:
            self.layers = find_layers(base_model)
            self.reads_images = main_input(self.encoder) == "pixel_values"
            self.freeze(training=False)
            self.positions = Positions(self.encoder)
            if placement == "input":
                self.restore()
                self.switch()  # with hooks, which also refuse models that cannot take a prompt in front
                check_takes_prompt(self)
        except Exception:
            self.detach()
            raise
        self.restore()
        self._mark_attached()

    def _mark_attached(self) -> None:
        setattr(self._base_model, _ATTACHED, id(self._base_model))
        _INJECTORS.add(self)

    @property
    def model(self) -> PreTrainedModel:
        """The model below the head."""
        return without_head(self._base_model)

    @property
    def encoder(self) -> PreTrainedModel:
        """The stack that reads the input: an encoder-decoder's encoder, or the whole model below the head."""
        # In some models the only stack is inside another module, and their heads call it there.
        return self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model.get_decoder()

    @property
    def is_causal(self) -> bool:
        """Whether the stack that reads the input is causal."""
        return self.layers[0].is_causal

    @property
    def checkpoints(self) -> bool:
        """Whether layers currently checkpoint their activations."""
        return any(layer.training and layer.gradient_checkpointing for layer in self._checkpointable)

    @property
    def prompt_tokens(self) -> int:
        """The number of prompt tokens in front of the sequence."""
        return 0 if self._prompt is None else self._prompt.tokens

    @property
    def _moves_padding(self) -> bool:
        """Whether hooks move padding behind the tokens, because the answer would depend on its place."""
        if self.is_causal or self.reads_images:
            return False
        return self._placement == "input" or self.positions.follow_the_sequence

    @property
    def _has_reader(self) -> bool:
        """Whether something in the model reads the encoder's output: a decoder, or a causal stack's own head."""
        return self.is_causal or self.model.config.is_encoder_decoder

    def states_of_input(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Return the encoder's states as `[B, N, hidden]`, without a prompt's rows, in the order of the input.

        Args:
            states: what the encoder returned.
            mask: the padding mask `[B, N]` of its input.
        """
        return self.in_order_of_input(states, mask) if self._has_reader else states  # otherwise a hook has done it

    def in_order_of_input(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Do the same to states that are as the encoder's own code returned them."""
        states = states[:, self.prompt_tokens :] if self.prompt_tokens else states
        if mask is None or not self._switch.is_on or not self._moves_padding:
            return states
        return moved_back(states, mask)

    def switch(self) -> None:
        """Switch the layers to `prefix_attention`."""
        was_on = self._switch.is_on
        self._switch.on()
        if not was_on and self.layers:
            self._hooks = self._new_hooks()

    def check_switched(self) -> None:
        """Raise a RuntimeError if the model's attention was changed while ours was on: it would see no prefix."""
        self._switch.check()

    def _new_hooks(self) -> list[RemovableHandle]:
        """Add hooks around the encoder; they look up the current prompt in front and the current shift."""
        hooks: list[RemovableHandle] = []
        if not self._has_reader and (self._placement == "input" or self._moves_padding):
            hooks += put_output_in_order(self.encoder, self.in_order_of_input)
        if self._moves_padding:
            hooks += move_padding_behind(self.model, self.encoder)
        if self._placement == "input" and not self.is_causal:
            hooks += put_in_front(self.model, self.encoder, self.positions, lambda: self._prompt)
        if self.positions.are_taken:
            hooks.append(give_positions(self.encoder, self.positions, lambda: self._shift))
        return hooks

    def restore(self) -> None:
        """Restore the original attention and mask functions, and remove all prefixes."""
        self._switch.off()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._clear()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Restore the placed prefix, or the model's own attention, after the block."""
        before = self.placed
        try:
            yield
        finally:
            self.put_back(before)

    @property
    def placed(self) -> tuple[Sequence[int], Prefix] | None:
        """Return the placed prefix and its layers, for `put_back`; None while the model uses its own attention."""
        return self._placed

    def put_back(self, placed: tuple[Sequence[int], Prefix] | None) -> None:
        """Place the result of `placed` again."""
        if placed is None:
            self.restore()
        else:
            self.switch()
            self.place(*placed)

    def freeze(self, *, training: bool) -> None:
        """Set eval mode, except, while prompts train, for layers that checkpoint their activations."""
        self._training = training
        self._base_model.eval()
        carry_prefixes(self._checkpointable, self.lock, training=training)

    def follow_checkpointing(self) -> None:
        """Follow a change of checkpointing on the base model since the last call, before anything is computed."""
        if self._training:
            carry_prefixes(self._checkpointable, self.lock, training=True)

    def add_hooks(self, before: Callable[..., None], after: Callable[..., None]) -> list[RemovableHandle]:
        """Add hooks around each call of the base model, the model below its head, and the encoder.

        The second one is called after an error too. (An encoder-decoder's `generate` calls the encoder directly.)
        """
        hooks = []
        for module in {id(each): each for each in (self._base_model, self.model, self.encoder)}.values():
            hooks.append(module.register_forward_pre_hook(before, prepend=True))
            hooks.append(module.register_forward_hook(after, always_call=True))
        return hooks

    def detach(self) -> None:
        """Restore the base model; another QTuningModel can be attached afterwards."""
        self.restore()
        leave_prefixes(self._checkpointable)
        forget_watchers(self._base_model)
        self._base_model.__dict__.pop(_ATTACHED, None)
        _INJECTORS.discard(self)
        for module, name, required in self._required_grad:
            parameter = module._parameters.get(name)  # getattr would also find former parameters
            if parameter is not None:
                parameter.requires_grad_(required)
        for module, training in self._was_training:
            module.training = training

    def place(self, layers: Sequence[int], prefix: Prefix) -> None:
        """Place `prefix` on the layers with these indices, replacing any other."""
        self._clear()
        if prefix.embeddings is not None and self.is_causal:
            prefix = prefix.with_rows(self.rows_of_prompt(layers, prefix.embeddings))
        self._placed = layers, prefix
        shift, index = prefix.position_shift, prefix.index
        placed: list[PlacedPrefix] = [{**each} for each in prefix.arguments()]
        if prefix.embeddings is not None:
            self._prompt = Prompt(prefix.embeddings, index, prefix.lengths)
            for each in placed:
                each["prompt_tokens"] = self.prompt_tokens
        if shift is not None:
            self._shift = Shift(shift if index is None else shift[index.to(shift.device)], prefix.largest_shift)
        for layer, each in zip(layers, placed):
            place(self.layers[layer].module, each)

    def passes_gradient(self, layers: Sequence[int]) -> bool:
        """Return whether gradients reach prefixes on all of these layers; this removes all prefixes.

        Layers that quantise activations stop gradients, some without an error, so the method tries it.
        """
        shapes, device = [self.layers[index].shape for index in layers], input_device(self.model)
        keys = [torch.zeros(shape.num_kv_heads, 1, shape.key_size, device=device) for shape in shapes]
        values = [torch.zeros(shape.num_kv_heads, 1, shape.value_size, device=device) for shape in shapes]
        rows: list[PrefixArguments] = [
            {"prefix_key": k, "prefix_value": v.requires_grad_(), "gate": None} for k, v in zip(keys, values)
        ]
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
            place(layer.module, None)

    def rows_of_prompt(self, layers: Sequence[int], embeddings: Tensor) -> list[PrefixArguments]:
        """Return each layer's keys and values of a prompt `[P, E]` or of a bank of prompts `[T, P, E]`.

        In a causal model they do not depend on later tokens, so one pass over the prompt serves all samples. All
        prefixes are removed.
        """
        self._clear()
        found: dict[int, PrefixArguments] = {}

        def keep(call: AttentionCall) -> None:
            bank = embeddings.ndim == 3
            found[id(call.module)] = {
                "prefix_key": call.key if bank else call.key.squeeze(0),
                "prefix_value": call.value if bank else call.value.squeeze(0),
            }

        checkpointing = [layer for layer in self._checkpointable if layer.training]
        for layer in checkpointing:
            layer.training = False  # few tokens need no checkpoint, which would hide the keys and values in it
        try:
            with watched(self.encoder, keep):
                batch = embeddings if embeddings.ndim == 3 else embeddings[None]
                # Cloned, because some models (CTRL) scale their inputs in place.
                self.encoder(inputs_embeds=batch.to(self.model.dtype).clone(), use_cache=False)
        finally:
            for layer in checkpointing:
                layer.training = True
        return [found[id(self.layers[index].module)] for index in layers]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._mark_attached()  # a copy of the base model has an id of its own


def _lock_for(configs: Sequence[Any]) -> ComputeLock:
    """Return the lock of the models that share one of these configs, or a new one."""
    ids = {id(config) for config in configs}
    sharing = (each.lock for each in _INJECTORS if not ids.isdisjoint(map(id, configs_of(each._base_model))))
    return next(sharing, None) or ComputeLock()
