"""Whether a model can take a prompt in front of its input: an injector's model is run with one, on a few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qtuning_fast.integrations.transformers.layers import dummy_inputs
from qtuning_fast.method.gate import NO_GATE
from qtuning_fast.method.prefix import Prefix

if TYPE_CHECKING:
    from qtuning_fast.integrations.transformers.injector import PrefixInjector


@torch.no_grad()
def check_takes_prompt(injector: PrefixInjector) -> None:
    """Raise a NotImplementedError if a placed prompt gives another result than prompt and input as one sequence.

    Positions may depend on the sequence, a state may pass between tokens outside attention, or embeddings may depend on
    more than the token.
    """
    inputs, name = dummy_inputs(injector.model), type(injector.model).__name__
    try:
        reads_images = "pixel_values" in inputs
        same = _keeps_patches(injector, **inputs) if reads_images else _is_one_sequence(injector, inputs["input_ids"])
    except Exception as error:
        message = f"{name} cannot take a prompt in front of its input: {error}; use placement='prefix'"
        raise NotImplementedError(message) from error
    if not same:
        raise NotImplementedError(
            f"{name} cannot take a prompt in front of its input: both as one sequence give another output; use "
            "placement='prefix'"
        )


def _keeps_patches(injector: PrefixInjector, pixel_values: Tensor) -> bool:
    """Return whether an image has as many states behind a prompt as alone."""
    alone = _states(injector, pixel_values=pixel_values)
    row = alone.new_zeros(1, injector.encoder.config.hidden_size)
    return alone.shape == _states_behind(injector, row, pixel_values=pixel_values).shape


def _is_one_sequence(injector: PrefixInjector, ids: Tensor) -> bool:
    """Return whether tokens behind a prompt have the states that they have in one sequence with it."""
    ids = ids[:, :2]  # so few that no window hides one
    embeds = injector.encoder.get_input_embeddings()(ids)
    row = embeds[:, :1]
    whole = _states(injector, inputs_embeds=torch.cat([row, embeds], dim=1))[:, 1:]
    pairs = [
        (_states(injector, input_ids=ids), _states(injector, inputs_embeds=embeds.clone())),
        (_states_behind(injector, row[0], input_ids=ids), whole),
    ]
    tolerance = 0.1 if whole.dtype.itemsize < 4 else 1e-4
    return all(bool((mine - its).abs().max() <= tolerance * its.abs().max()) for mine, its in pairs)


def _states(injector: PrefixInjector, **inputs: Tensor) -> Tensor:
    options = {"use_cache": False} if injector.is_causal else {}
    return injector.encoder(**inputs, **options).last_hidden_state


def _states_behind(injector: PrefixInjector, row: Tensor, **inputs: Tensor) -> Tensor:
    """Return the states of inputs behind a prompt of one row, `[1, E]`."""
    layers = [index for index, layer in enumerate(injector.layers) if layer.stack == injector.layers[0].stack]
    injector.place(layers, Prefix([NO_GATE] * len(layers), row))
    return injector.states_of_input(_states(injector, **inputs), None)
