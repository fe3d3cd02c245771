"""Caches of keys and values: their name in this version of transformers, and which models take one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from qtuning_fast.integrations.transformers.layers import dummy_inputs, in_eval_mode

CACHE = next((field.name for field in fields(BaseModelOutputWithPast) if Cache in get_args(field.type)), "cache")
"""The name under which models take and return a cache: `past_key_values`, and `cache` since transformers 5.24."""


def cache_among(inputs: Mapping[str, Any]) -> Cache | None:
    """Return the cache among a call's inputs, under any name: transformers also accepts former names."""
    for value in inputs.values():
        if isinstance(value, Cache):
            return value
    return None


@torch.no_grad()
def takes_cache(model: PreTrainedModel) -> bool:
    """Return whether a model reads and writes a cache, found by passing it an empty one."""
    cache = DynamicCache()
    try:
        with in_eval_mode(model):
            model(**dummy_inputs(model), **{CACHE: cache})
    except TypeError:  # it has no argument of this name
        return False
    return cache.get_seq_length() > 0
