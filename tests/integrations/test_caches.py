"""What transformers calls a cache, whatever its version, and which models take one, or position ids."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache

from qtuning_fast.integrations.transformers import PrefixInjector, without_head
from qtuning_fast.integrations.transformers.caches import CACHE, cache_among, takes_cache

WITHOUT = {"DistilBERT", "ModernBERT", "ViT", "DINOv2", "DeiT", "CLIP vision tower"}


def test_a_model_takes_a_cache_by_the_name_by_which_it_hands_it_back(decoder: Any) -> None:
    model, ids = decoder.base_model(), torch.arange(5, 10)[None]
    with torch.no_grad():
        output = model(input_ids=ids[:, :3], use_cache=True)
        assert isinstance(output[CACHE], Cache)
        behind = model(input_ids=ids[:, 3:], **{CACHE: output[CACHE]}).logits
        torch.testing.assert_close(behind, model(input_ids=ids).logits[:, 3:], atol=1e-5, rtol=0)


def test_a_cache_is_found_under_any_name() -> None:
    cache = DynamicCache()
    assert cache_among({"input_ids": torch.ones(1, 2), "as_it_is_called_tomorrow": cache}) is cache
    assert cache_among({"input_ids": torch.ones(1, 2), CACHE: None}) is None


def test_which_models_take_a_cache_is_found_by_trying(family: Any) -> None:
    model = without_head(family.base_model()).train()
    assert takes_cache(model) == (family.name not in WITHOUT)
    assert all(module.training for module in model.modules())


def test_whether_position_ids_are_read_is_found_by_trying(family: Any) -> None:
    follows = family.kind == "image" or family.name in ("T5", "mT5", "BART")
    assert PrefixInjector(family.base_model()).positions.are_taken == (not follows)
