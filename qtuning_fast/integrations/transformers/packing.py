"""Packed rows: several sequences, one after another, in one row of a batch; their position ids start again.

transformers' `DataCollatorWithFlattening` makes such rows, without a padding mask. Most decoders then keep the
sequences apart by their position ids, but only while they make no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from qtuning_fast.integrations.transformers.caches import cache_among
from qtuning_fast.integrations.transformers.layers import dummy_inputs

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # further names under which collators say where they begin

_NOT_APART = (
    "position_ids start again within a row, as in packed rows, which {} does not keep apart; pad the sequences, "
    "or give an attention_mask of ones if each row is one sequence"
)


def are_packed(inputs: Mapping[str, Any]) -> bool:
    """Return whether position ids start again within a row, and no mask says that it is one sequence.

    This reads the position ids, for which an accelerator has to wait. Traced code cannot, and gets False.
    """
    if not _may_be_packed(inputs) or torch.compiler.is_compiling():
        return False
    positions = inputs["position_ids"]
    if _of_images(positions):  # the tokens of an image share their time, but time never goes back
        return bool((positions[0].diff(dim=-1) < 0).any())
    return find_packed_sequence_indices(positions if positions.ndim == 2 else positions[0]) is not None


def _may_be_packed(inputs: Mapping[str, Any]) -> bool:
    positions = inputs.get("position_ids")
    return positions is not None and inputs.get("attention_mask") is None and positions.shape[-1] > 1


def _of_images(positions: Tensor) -> bool:
    """Return whether position ids are those of time, height and width, without a further row of text positions."""
    return positions.ndim == 3 and positions.shape[0] == 3


def check_position_ids(inputs: Mapping[str, Any], *, taken: bool, kind: str) -> None:
    """Raise a ValueError if a model's inputs say that rows are packed, but not to the model.

    Args:
        inputs: the inputs by name.
        taken: whether the model uses position ids; otherwise it may ignore them.
        kind: name of the model's class.
    """
    for name in _BOUNDARIES:
        if inputs.get(name) is not None and inputs.get("position_ids") is None:
            raise ValueError(
                f"{name} is given without position_ids, which tell packed sequences apart; give both, as "
                "DataCollatorWithFlattening does with return_position_ids=True"
            )
    if not taken and are_packed(inputs):
        raise ValueError(_NOT_APART.format(kind))


def without_cache(inputs: Mapping[str, Any], *, kept_apart: bool, kind: str) -> dict[str, Any]:
    """Return what to change in a stack's inputs so that the sequences of packed rows do not see each other.

    Args:
        inputs: the inputs by name.
        kept_apart: whether the stack keeps the sequences of packed rows apart.
        kind: name of the stack's class.

    Raises:
        ValueError: rows are packed, but the sequences would see each other.
    """
    has_cache = inputs.get("use_cache") or cache_among(inputs) is not None
    if torch.compiler.is_compiling():  # positions cannot be read, so every row is taken for a packed one
        return {"use_cache": False} if _may_be_packed(inputs) and kept_apart and not has_cache else {}
    if not are_packed(inputs):
        return {}
    if not kept_apart or _of_images(inputs["position_ids"]):
        raise ValueError(_NOT_APART.format(kind))
    if has_cache:
        raise ValueError(
            f"position_ids start again within a row, as in packed rows, which {kind} keeps apart only without a cache; "
            "leave the cache out, or give an attention_mask of ones if each row is one sequence"
        )
    return {"use_cache": False}


@torch.no_grad()
def keeps_packed_rows_apart(stack: PreTrainedModel, first: int) -> bool:
    """Return whether no token sees another sequence of its row: it changes the first one, and looks at the second.

    Attention may see the first, and so may a state that passes between tokens outside attention.

    Args:
        stack: a stack that takes position ids, with its attention set to ours.
        first: the position id of the first token.
    """
    ids = dummy_inputs(stack)["input_ids"]
    begin = ids.shape[1] // 2
    places = torch.arange(ids.shape[1], device=ids.device)
    positions = torch.where(places < begin, places, places - begin)[None] + first

    def second(ids: Tensor) -> Tensor:
        try:
            states = stack(input_ids=ids, position_ids=positions, use_cache=False)[0]
        except TypeError:  # it has no argument of this name, and makes no cache
            states = stack(input_ids=ids, position_ids=positions)[0]
        return states[:, begin:]

    other = torch.where(places < begin, ids + 1, ids)
    try:
        return torch.equal(second(ids), second(other))  # what is not seen has a weight of exactly zero
    except (IndexError, RuntimeError, TypeError):  # its layers calculate with masks, which here are none of numbers
        return False
