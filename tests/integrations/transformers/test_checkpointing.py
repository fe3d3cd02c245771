"""Checkpoints take a layer's prefix as an input: what stands there later does not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.integrations.transformers.checkpointing import carry_prefixes, checkpointing_layers, leave_prefixes
from qtuning_fast.method.prefix import Prefix

NAMES = ["BERT", "Llama"]


@pytest.fixture(params=NAMES)
def base(request: pytest.FixtureRequest, families: Any) -> Any:
    return families[request.param].base_model()


def prefix_for(injector: PrefixInjector, seed: int) -> Prefix:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for layer in injector.layers:
        key, value = (torch.randn(layer.shape.num_kv_heads, 2, 8, generator=generator) for _ in range(2))
        rows.append({"prefix_key": key.requires_grad_(), "prefix_value": value.requires_grad_(), "gate": None})
    return Prefix(rows)  # type: ignore[arg-type]


def leaves(prefix: Prefix) -> list[Tensor]:
    return [layer[name] for layer in prefix.layers for name in ("prefix_key", "prefix_value")]  # type: ignore[literal-required]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_the_prefix_that_stood_there_before(base: Any, reentrant: bool) -> None:
    inputs = {"input_ids": torch.arange(5, 12)[None]}
    injector = PrefixInjector(base)
    indices = range(len(injector.layers))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        injector.freeze(training=True)
        injector.switch()
        prefix = prefix_for(injector, seed=0)
        injector.place(indices, prefix)
        output = base(**inputs)[0]
        injector.place(indices, prefix_for(injector, seed=1))  # by now another one
        output.square().sum().backward()
        found.append([output.detach(), *(leaf.grad for leaf in leaves(prefix))])
        injector.restore()
    for mine, plain in zip(found[1], found[0]):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


def test_leaving_gives_back_the_functions_and_takes_the_hooks(base: Any) -> None:
    base.gradient_checkpointing_enable()
    layers = [*checkpointing_layers(base)]
    before = [layer._gradient_checkpointing_func for layer in layers]
    assert layers
    for _ in range(2):  # the second time nothing is wrapped again
        carry_prefixes(base)
    assert all(layer._gradient_checkpointing_func is not old for layer, old in zip(layers, before))
    assert all(len(layer._forward_hooks) == 1 for layer in layers)
    leave_prefixes(base)
    assert [layer._gradient_checkpointing_func for layer in layers] == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_a_layer_in_training_mode_drops_nothing_within_a_checkpoint_or_without_gradients(base: Any) -> None:
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    injector = PrefixInjector(base)
    injector.freeze(training=True)
    injector.switch()
    injector.place(range(len(injector.layers)), prefix_for(injector, seed=0))
    layers = [*checkpointing_layers(base)]
    assert all(layer.training for layer in layers) and injector.checkpoints
    modes = []
    for layer, found in zip(layers, injector.layers):
        found.module.register_forward_pre_hook(lambda *_, layer=layer: modes.append(layer.training))
    inputs = {"input_ids": torch.arange(5, 12)[None]}
    base(**inputs)
    with torch.no_grad():
        base(**inputs)
    assert modes == [False] * 2 * len(layers) and all(layer.training for layer in layers)
