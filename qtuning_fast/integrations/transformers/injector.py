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
from qtuning_fast.integrations.transformers.checkpointing import carry_prefixes, checkpointable_layers, leave_prefixes
from qtuning_fast.integrations.transformers.interface import NAME, AttentionCall, watched
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
from qtuning_fast.integrations.transformers.padding import move_padding_behind, moved_back
from qtuning_fast.integrations.transformers.positions import Positions, Shift, give_positions
from qtuning_fast.integrations.transformers.prompt_tokens import Prompt, put_in_front
from qtuning_fast.method.gate import NO_GATE
from qtuning_fast.method.prefix import PlacedPrefix, Prefix, place

# For the id of each config that names our attention: the previous name, and the number of its models with a task set.
_SWITCHED: dict[int, tuple[Any, str, int]] = {}

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
        self._configs: list[Any] = []  # the configs that name our attention while it is on
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
                self._check_in_front()
        except Exception:
            self.detach()
            raise
        self.restore()
        self._mark_attached()

    def _mark_attached(self) -> None:
        setattr(self._base_model, _ATTACHED, id(self._base_model))
        _INJECTORS.add(self)

    @torch.no_grad()
    def _check_in_front(self) -> None:
        """Raise a NotImplementedError if a placed prompt gives another result than prompt and input as one sequence.

        Positions may depend on the sequence, a state may pass between tokens outside attention, or embeddings may
        depend on more than the token. So the method tries it, on so few tokens that no window hides one.
        """
        stack, name = self.encoder, f"{type(self.model).__name__} cannot take a prompt in front of its input"
        first_stack = [index for index, layer in enumerate(self.layers) if layer.stack == self.layers[0].stack]

        def states(**inputs: Tensor) -> Tensor:
            return stack(**inputs, **({"use_cache": False} if self.is_causal else {})).last_hidden_state

        def behind(row: Tensor, **inputs: Tensor) -> Tensor:
            self.place(first_stack, Prefix([NO_GATE] * len(first_stack), row))
            return states(**inputs)[:, self.prompt_tokens :]

        inputs = dummy_inputs(self.model)
        try:
            if "pixel_values" in inputs:
                alone = states(**inputs)
                same = alone.shape == behind(alone.new_zeros(1, stack.config.hidden_size), **inputs).shape
            else:
                ids = inputs["input_ids"][:, :2]
                embeds = stack.get_input_embeddings()(ids)
                row = embeds[:, :1]
                pairs = [(states(input_ids=ids), states(inputs_embeds=embeds.clone()))]
                whole = states(inputs_embeds=torch.cat([row, embeds], dim=1))[:, 1:]
                pairs.append((behind(row[0], input_ids=ids), whole))
                tolerance = 0.1 if whole.dtype.itemsize < 4 else 1e-4
                same = all((mine - its).abs().max() <= tolerance * its.abs().max() for mine, its in pairs)
        except Exception as error:
            raise NotImplementedError(f"{name}: {error}; use placement='prefix'") from error
        if not same:
            raise NotImplementedError(f"{name}: both as one sequence give another output; use placement='prefix'")

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

    def in_order_of_input(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Return the encoder's states `[B, N, hidden]` in the order of its input with this padding mask `[B, N]`."""
        return moved_back(states, mask) if mask is not None and self._configs and self._moves_padding else states

    def switch(self) -> None:
        """Switch the layers to `prefix_attention`."""
        if not self._configs:
            self._configs = configs_of(self._base_model)
            # The private name, because the public setter does more and would warn each time that a task is set.
            for config in self._configs:
                _, before, users = _SWITCHED.get(id(config), (config, config._attn_implementation, 0))
                _SWITCHED[id(config)] = config, before, users + 1
            if self.layers:
                self._hooks = self._new_hooks()
        for config in self._configs:
            config._attn_implementation = NAME

    def check_switched(self) -> None:
        """Raise a RuntimeError if the model's attention was changed while ours was on: it would see no prefix."""
        for config in self._configs:
            if config._attn_implementation != NAME:
                raise RuntimeError(
                    f"the base model's attention is {config._attn_implementation!r}, which was chosen while a task was "
                    "set and ignores prefixes; call set_task again, and choose attention while no task is set"
                )

    def _new_hooks(self) -> list[RemovableHandle]:
        """Add hooks that prepare the inputs; they look up the current prompt in front and the current shift."""
        hooks = []
        if self._moves_padding:
            hooks += move_padding_behind(self.model, self.encoder)
        if self._placement == "input" and not self.is_causal:
            hooks += put_in_front(self.model, self.encoder, self.positions, lambda: self._prompt)
        if self.positions.are_taken:
            hooks.append(give_positions(self.encoder, self.positions, lambda: self._shift))
        return hooks

    def restore(self) -> None:
        """Restore the original attention and mask functions, and remove all prefixes."""
        for config in self._configs:
            _, before, users = _SWITCHED.pop(id(config))
            if users > 1:  # other models that share it still compute with their prefixes
                _SWITCHED[id(config)] = config, before, users - 1
            else:
                config._attn_implementation = before
        self._configs = []
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
