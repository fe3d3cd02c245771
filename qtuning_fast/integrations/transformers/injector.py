"""The attention layers of one frozen model, and the switch between their own attention and prefix attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qtuning_fast.attention.arguments import PrefixArguments
from qtuning_fast.integrations.transformers.checkpointing import carry_prefixes, checkpointing_layers, leave_prefixes
from qtuning_fast.integrations.transformers.interface import NAME, watched
from qtuning_fast.integrations.transformers.layers import (
    AttentionLayer,
    configs_of,
    dummy_inputs,
    find_layers,
    without_head,
)
from qtuning_fast.integrations.transformers.offload import input_device
from qtuning_fast.integrations.transformers.positions import Positions, Shift, shift_positions
from qtuning_fast.integrations.transformers.prompt_tokens import Prompt, put_in_front
from qtuning_fast.method.gate import NO_GATE
from qtuning_fast.method.prefix import PlacedPrefix, Prefix, place

# By id, each config that names ours now: what it named before, and how many models that share it have a task set.
_SWITCHED: dict[int, tuple[Any, str, int]] = {}

_ATTACHED = "qtuning_attached"  # on a base model that is attached to


class PrefixInjector:
    """The self-attention layers of one frozen model, and the switch between their own attention and ours.

    Args:
        base_model: a transformers model in which every layer calls the attention interface.
        placement: `"prefix"` or `"input"`, as in `QTuningConfig`.

    Attributes:
        layers: its self-attention layers, in the order in which they run, an encoder's before its decoder's.
        positions: how the stack that reads the input gives its tokens positions.

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
        self._configs: list[Any] = []  # while ours is on: those that name it
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
            self.freeze(training=False)
            self.positions = Positions(self.encoder)
            if placement == "input":
                self.restore()
                self.switch()  # with hooks, which also refuse what cannot stand in front
                self._check_in_front()
        except Exception:
            self.detach()
            raise
        self.restore()
        setattr(base_model, _ATTACHED, True)

    @torch.no_grad()
    def _check_in_front(self) -> None:
        """Raise a NotImplementedError where a placed prompt is not what the model itself makes of prompt and input.

        Positions may follow the sequence, a state may pass from token to token beside attention, embeddings may depend
        on more than the token. So this tries it out, on so few tokens that no window hides one.
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
            raise NotImplementedError(f"{name}: what follows is not what it computes of both; use placement='prefix'")

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
        if not self._configs:
            self._configs = configs_of(self._base_model)
            # The private name: the public setter does more, and warns, each time that a task is set.
            for config in self._configs:
                _, before, users = _SWITCHED.get(id(config), (config, config._attn_implementation, 0))
                _SWITCHED[id(config)] = config, before, users + 1
            if self.layers:
                self._hooks = self._new_hooks()
        for config in self._configs:
            config._attn_implementation = NAME

    def check_switched(self) -> None:
        """Raise a RuntimeError where the model was given other attention while ours was on: it would see no prefix."""
        for config in self._configs:
            if config._attn_implementation != NAME:
                raise RuntimeError(
                    f"the base model's attention is {config._attn_implementation!r}, which was chosen while a task was "
                    "set and knows nothing of prefixes; call set_task again, and choose it while none is set"
                )

    def _new_hooks(self) -> list[RemovableHandle]:
        """On the stack that reads the input; they do nothing while there is no prompt in front and no shift."""
        hooks = []
        if self._placement == "input" and not self.is_causal:
            hooks += put_in_front(self.model, self.encoder, self.positions, lambda: self._prompt)
        if self.positions.are_taken:
            hooks.append(shift_positions(self.encoder, self.positions, lambda: self._shift))
        return hooks

    def restore(self) -> None:
        """The original attention and mask functions from here on, and no prefix anywhere."""
        for config in self._configs:
            _, before, users = _SWITCHED.pop(id(config))
            if users > 1:  # models that share it compute by ours, with their prefixes
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
        """After the block the prefix stands that stood before it, or the model computes by its own attention."""
        before = self.placed
        try:
            yield
        finally:
            self.put_back(before)

    @property
    def placed(self) -> tuple[Sequence[int], Prefix] | None:
        """What stands on the layers now, for `put_back`; None while the model computes by its own attention."""
        return self._placed

    def put_back(self, placed: tuple[Sequence[int], Prefix] | None) -> None:
        """What stood on the layers stands there again."""
        if placed is None:
            self.restore()
        else:
            self.switch()
            self.place(*placed)

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
            parameter = module._parameters.get(name)  # getattr would also find what is no parameter any more
            if parameter is not None:
                parameter.requires_grad_(required)
        for module, training in self._was_training:
            module.training = training

    def place(self, layers: Sequence[int], prefix: Prefix) -> None:
        """From here on the layers with these indices attend to `prefix`, whichever stood there before."""
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
        """Whether gradients reach prefixes on all of these layers; no prefix stands anywhere afterwards.

        Layers that quantise what passes through them stop gradients, some without an error. So this tries it out.
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
        """For each layer the keys and values of a prompt `[P, E]` or of a bank of them, `[T, P, E]`.

        In a causal model they do not depend on what follows, so one pass over the prompt serves all samples. What
        stood on the layers is taken off.
        """
        self._clear()
        found: dict[int, PrefixArguments] = {}

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
                # Cloned, since some models (CTRL) scale what they are given in place.
                self.encoder(inputs_embeds=batch.to(self.model.dtype).clone(), use_cache=False)
        finally:
            for layer in checkpointing:
                layer.training = True
        return [found[id(self.layers[index].module)] for index in layers]
