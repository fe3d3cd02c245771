"""Packed rows are known by their position ids, and so is whether a stack keeps their sequences apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.integrations.transformers.caches import CACHE
from qtuning_fast.integrations.transformers.packing import are_packed, check_position_ids, without_cache

PACKED = torch.tensor([[0, 1, 2, 0, 1]])


def test_position_ids_that_start_again_tell_packed_rows() -> None:
    assert are_packed({"position_ids": PACKED})
    assert are_packed({"position_ids": PACKED + 7})  # behind a prompt
    assert not are_packed({"position_ids": torch.arange(5)[None] + 7})
    assert not are_packed({"position_ids": torch.tensor([[3]])}) and not are_packed({})
    assert not are_packed({"position_ids": PACKED, "attention_mask": torch.ones(1, 5)})


def test_position_ids_of_images_start_again_where_time_goes_back() -> None:
    image = torch.tensor([[[0, 1, 1, 1, 1, 3]], [[0, 1, 1, 2, 2, 3]], [[0, 1, 2, 1, 2, 3]]])
    assert not are_packed({"position_ids": image})
    assert are_packed({"position_ids": torch.cat([image, image], dim=2)})
    text = torch.arange(6).expand(1, 1, 6)  # with a further row of text positions, that row tells
    assert not are_packed({"position_ids": torch.cat([text, image])})
    assert are_packed({"position_ids": torch.cat([text % 3, image])})
    with pytest.raises(ValueError, match="which Stack does not keep apart"):
        without_cache({"position_ids": torch.cat([image, image], dim=2)}, kept_apart=True, kind="Stack")


def test_what_changes_in_the_inputs_of_a_stack() -> None:
    def changed(kept_apart: bool = True, **inputs: Any) -> dict[str, Any]:
        return without_cache({"position_ids": PACKED} | inputs, kept_apart=kept_apart, kind="Stack")

    assert changed() == changed(use_cache=False) == {"use_cache": False}
    assert changed(position_ids=torch.arange(5)[None], use_cache=True) == {}
    for inputs in ({"use_cache": True}, {CACHE: DynamicCache()}):
        with pytest.raises(ValueError, match="which Stack keeps apart only without a cache"):
            changed(**inputs)
    with pytest.raises(ValueError, match="which Stack does not keep apart"):
        changed(kept_apart=False)


def test_boundaries_by_other_names_need_position_ids_beside_them() -> None:
    boundaries = {"cu_seq_lens_q": torch.tensor([0, 3, 5])}
    with pytest.raises(ValueError, match="cu_seq_lens_q is given without position_ids"):
        check_position_ids(boundaries, taken=True, kind="Model")
    check_position_ids(boundaries | {"position_ids": PACKED}, taken=True, kind="Model")
    with pytest.raises(ValueError, match="which Model does not keep apart"):
        check_position_ids({"position_ids": PACKED}, taken=False, kind="Model")


def test_whether_a_stack_keeps_them_apart_is_found_by_trying(family: Any) -> None:
    apart = family.kind == "decoder" and family.name not in ("OPT", "GPT-OSS")  # nor do they in eager attention
    assert PrefixInjector(family.base_model()).positions.keeps_packed_rows_apart == apart
